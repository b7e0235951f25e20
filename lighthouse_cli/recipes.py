"""lighthouse recipes: the recipes that come with the package."""

from pathlib import Path
from typing import Annotated

import typer

from lighthouse_cli import _complete, _output

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and copy the recipes that come along.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="As listed.", autocompletion=_complete.shipped)]


@app.command("list")
def list_recipes() -> None:
    """Every recipe, and what it is."""
    from lighthouse_core.shelf import recipe_title, shipped_recipes

    rows = [(name, recipe_title(path)) for name, path in sorted(shipped_recipes().items())]
    _output.table("", ("name", "what it is"), rows, text_columns=2)


@app.command()
def show(name: Name) -> None:
    """Print a recipe."""
    _output.data(_find(name).read_text(encoding="utf-8").rstrip("\n"))


@app.command()
def copy(
    name: Name,
    dest: Annotated[Path, typer.Argument(metavar="[DEST]", help="File or directory.", show_default=False)] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    from lighthouse_core.errors import UserError, refusal
    from lighthouse_core.files import check_output

    source = _find(name)
    target = dest / source.name if dest.is_dir() else dest
    check_output(target)
    text = source.read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                # Half a recipe, or an empty one, would stand in the way of the next try.
                target.unlink()
                raise
    except FileExistsError:
        raise UserError(f"{target} exists", hint="give another DEST, or remove it") from None
    except OSError as error:
        raise refusal(error, f"cannot write {target}") from None
    _output.data(str(target))


def _find(name: str) -> Path:
    from lighthouse_core.errors import UserError, did_you_mean
    from lighthouse_core.shelf import shipped_recipes

    shipped = shipped_recipes()
    found = shipped.get(name.removesuffix(".toml"))
    if found is None:
        hint = did_you_mean(name, shipped, before="") or f"there are {', '.join(sorted(shipped))}"
        raise UserError(f"no recipe {name} comes with the package", hint=hint)
    return found
