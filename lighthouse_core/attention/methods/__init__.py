"""How stage 1 may attend: one file a method, and this list. Imports no torch."""

from lighthouse_core.attention.methods.blocks import Blocks
from lighthouse_core.attention.methods.chunked import Chunked
from lighthouse_core.attention.methods.compressed import Compressed
from lighthouse_core.attention.methods.method import Method
from lighthouse_core.attention.methods.pyramid import Pyramid
from lighthouse_core.attention.methods.sliding import Sliding
from lighthouse_core.attention.settings import known

METHODS: dict[str, Method] = {
    method.name: method for method in (Pyramid(), Compressed(), Sliding(), Chunked(), Blocks())
}


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        SettingError: there is none.
    """
    return METHODS[known("method", name, tuple(METHODS))]
