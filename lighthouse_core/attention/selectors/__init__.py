"""How the entries of a pyramid may be chosen: one file a selector, and this list. Imports no torch."""

from lighthouse_core.attention.selectors.block import Block
from lighthouse_core.attention.selectors.dilated import Dilated
from lighthouse_core.attention.selectors.gla import Gla
from lighthouse_core.attention.selectors.norm import Norm
from lighthouse_core.attention.selectors.random import Random
from lighthouse_core.attention.selectors.selector import Selector
from lighthouse_core.attention.settings import known

SELECTORS: dict[str, Selector] = {selector.name: selector for selector in (Norm(), Random(), Block(), Dilated(), Gla())}


def selector_of(name: str) -> Selector:
    """The selector of that name.

    Raises:
        SettingError: there is none.
    """
    return SELECTORS[known("scorer", name, tuple(SELECTORS))]
