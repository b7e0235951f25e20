"""Families of models: one file a family, this list, and the modules that they share. Importing this package imports no
torch."""

from lighthouse_core.models.family import Family
from lighthouse_core.models.llama import Llama
from lighthouse_core.models.mistral import Mistral
from lighthouse_core.models.qwen import Qwen2, Qwen3

FAMILIES: dict[str, Family] = {family.name: family for family in (Llama(), Mistral(), Qwen2(), Qwen3())}
