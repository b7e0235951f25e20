"""[output]: where runs live."""

from lighthouse_core.config.section import PathText, Section


class OutputSection(Section):
    """`name` empty: the recipe's stem and the UTC time."""

    dir: PathText = "runs"
    name: str = ""
