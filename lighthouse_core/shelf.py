"""The recipes that come with the package. Standard library only: completion waits for it."""

from pathlib import Path

# A wheel carries the recipes inside the package; an editable install has them beside it.
SHELVES = (Path(__file__).parent / "_recipes", Path(__file__).parents[1] / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for shelf in SHELVES if shelf.is_dir() for file in sorted(shelf.glob("*.toml"))}


def recipe_title(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    return line.lstrip("#").strip() if line.startswith("#") else ""
