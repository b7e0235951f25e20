"""What a label may be beside a token. Imports no torch."""

# The label of a token that has none: what torch's cross-entropy ignores.
IGNORED = -100
