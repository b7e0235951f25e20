"""The operations of Lighthouse Attention. Each folder holds one: its maths (README.md), its plain truth
(reference.py) and, where there is one, its kernel. `geometry` says how the pyramid is laid out."""
