"""The recipe language: strict TOML sections, overrides, and errors that name file and line."""

from lighthouse_core.config.dump import dump_recipe
from lighthouse_core.config.load import find_recipe, load_recipe, loads_recipe
from lighthouse_core.config.recipe import Recipe

__all__ = ["Recipe", "dump_recipe", "find_recipe", "load_recipe", "loads_recipe"]
