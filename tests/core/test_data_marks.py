"""A byte-order mark is no part of a text, and links between folders neither hide nor repeat a file."""

import codecs
import glob
import itertools
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.config import load_recipe
from lighthouse_core.config.data import DataSection
from lighthouse_core.config.load import loads_recipe
from lighthouse_core.config.sweep import load_sweep
from lighthouse_core.data.build import build_source, build_stream
from lighthouse_core.data.files import _matches, list_files
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import DataError, RecipeError

MARK = codecs.BOM_UTF8
TEXT = "def f():\n    return 'naïve \ufeff 漢字'\n" * 20
# How each kind of file holds a text.
HOLDS = {
    "a.txt": str,
    "a.md": str,
    "a.jsonl": lambda text: '{"text": "one"}\n{"text": "two"}\n' * 3,
    "a.py": str,
}


def data_of(folder, name):
    paths = (str(folder),) if name.endswith(".py") else (str(folder / "*"),)
    source = "python-sources" if name.endswith(".py") else "files"
    return DataSection(source=source, paths=paths, validation=0.0)


def make(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return data_of(folder, name)


def tokens(data, count, position=None):
    stream, fingerprint = build_stream(data, BytesTokenizer(), 1, "train")
    cursor = stream.cursor(stream.start if position is None else position)
    return cursor.take(count)[0].tolist(), tuple(cursor.position), fingerprint


@pytest.mark.parametrize("name", HOLDS)
def test_a_mark_is_no_part_of_the_text(tmp_path, name):
    """Nor of what resumption counts: from any position on, the tokens are those of the file without it."""
    content = HOLDS[name](TEXT).encode()
    plain, marked = make(tmp_path / "src", name, content), None
    expected, _, before = tokens(plain, 400)
    cut = tokens(plain, 137)[1]
    marked = make(tmp_path / "src", name, MARK + content)
    assert tokens(marked, 400)[0] == expected
    first, position, after = tokens(marked, 137)
    assert first == expected[:138]
    # A line file's place is a byte of the file, the mark counted.
    assert position == cut or name.endswith(".jsonl")
    assert tokens(marked, 200, position)[0] == expected[137:338]
    # What a checkpoint was written with before is told apart.
    assert before != after


@pytest.mark.parametrize("name", HOLDS)
def test_marks_change_no_other_fingerprint(tmp_path, name):
    """Recorded before marks were read."""
    known = {
        "a.txt": 7104890684011024905,
        "a.md": 3540747078543236281,
        "a.jsonl": 257396210875804339,
        "a.py": 1096796619470343404,
    }
    data = make(tmp_path / "src", name, HOLDS[name](TEXT).encode())
    assert build_source(data).fingerprint == known[name]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
def test_a_file_of_a_mark_alone_is_empty(tmp_path, name):
    data = make(tmp_path / "src", name, MARK)
    with pytest.raises(DataError, match=r"empty|no Python files"):
        build_source(data)
    (tmp_path / "src" / f"b{name[1:]}").write_bytes(b"text")
    assert tokens(data, 4)[0][1:] == list(b"text")


def test_only_the_first_mark_goes_and_each_python_file_has_its_own(tmp_path):
    data = make(tmp_path / "src", "a.txt", MARK * 2 + b"x")
    assert bytes(tokens(data, 4)[0][1:]) == MARK + b"x"
    folder = tmp_path / "py"
    for name, content in (("a.py", MARK + b"one\n"), ("b.py", b"two\n"), ("c.py", MARK + b"three\n")):
        data = make(folder, name, content)
    assert bytes(tokens(data, 14)[0][1:]) == b"one\ntwo\nthree\n"
    for start in range(1, 14):
        position = tokens(data, start)[1]
        assert tokens(data, 14 - start, position)[0] == tokens(data, 14)[0][start:]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_wide_text_is_named(tmp_path, name, encoding):
    data = make(tmp_path / "src", name, ("\ufeff" * encoding.endswith("be") + '{"text": "a"}\n').encode(encoding))
    with pytest.raises(DataError, match=rf"{name}:1: not UTF-8 text but UTF-16 or UTF-32") as error:
        tokens(data, 2)
    assert "iconv" in error.value.hint


def test_recipes_and_sweeps_may_have_a_mark(tmp_path):
    with open("recipes/quickstart.toml", "rb") as file:
        content = file.read()
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(MARK + content)
    assert load_recipe(recipe) == load_recipe("recipes/quickstart.toml") == loads_recipe("\ufeff" + content.decode())
    recipe.write_bytes(MARK + content + b"\n[nothing]\n")
    line = content.count(b"\n") + 2
    with pytest.raises(RecipeError, match=rf"r.toml:{line}: unknown section"):
        load_recipe(recipe)
    recipe.write_bytes(MARK + content)
    sweep = tmp_path / "s.toml"
    sweep.write_bytes(MARK + b'recipe = "r.toml"\n[runs.a]\nrecover = 0\n')
    assert list(load_sweep(sweep).runs) == ["a"]
    for path, load in ((recipe, load_recipe), (sweep, load_sweep)):
        path.write_text("a = 1\n", encoding="utf-16")
        with pytest.raises(RecipeError, match="toml: not UTF-8 text but UTF-16") as error:
            load(path)
        assert "iconv" in error.value.hint


def link_all(folders, targets):
    """In every folder a link to every target, relative as people write them."""
    for folder, (number, target) in itertools.product(folders, enumerate(targets)):
        (folder / f"l{number}").symlink_to(os.path.relpath(target, folder))


def two_loops(root):
    link_all([root / "a"], [root / "a", root / "a"])


def loops_to_the_top(root):
    link_all([root / "a", root / "a/b", root / "c"], [root] * 3)


def ring(root):
    for here, there in (("a", "c"), ("c", "d"), ("d", "a")):
        (root / here / "next").symlink_to(root / there)


def everyone_to_everyone(root):
    folders = [root / name for name in ("a", "a/b", "c", "d")]
    link_all(folders, folders)


def ring_outside(root):
    outside = root.parent / "outside"
    for name in ("x", "y"):
        (outside / name).mkdir(parents=True)
        (outside / name / f"{name}.txt").write_text(name)
        (outside / name / "back").symlink_to(root)
    (outside / "x/other").symlink_to(outside / "y")
    (outside / "y/other").symlink_to(outside / "x")
    link_all([root], [outside / "x", outside / "y"])


@pytest.mark.parametrize("pattern", ["**/*.txt", "**", "**/a/**/*.txt", "*/**/*.txt", "**/**/*.txt"])
@pytest.mark.parametrize("shape", [two_loops, loops_to_the_top, ring, everyone_to_everyone, ring_outside])
def test_links_that_lead_around_are_followed_once(tmp_path, shape, pattern):
    root = tmp_path / "src"
    for name in ("a/b/1.txt", "a/2.txt", "c/3.txt", "d/4.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    without = [file.identity for file in list_files([str(root / pattern)])]
    shape(root)
    begun = time.monotonic()
    found = [file.identity for file in list_files([str(root / pattern)])]
    assert time.monotonic() - begun < 5
    assert len({os.path.realpath(root.parent / name) for name in found}) == len(found)
    # By the names that they have without the links.
    assert set(without) <= set(found)
    others = {"src/l0/x.txt", "src/l1/y.txt"} if shape is ring_outside else set()
    if pattern != "**/a/**/*.txt":
        assert set(found) == {*without, *others}


def test_a_file_that_is_linked_twice_is_still_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(DataError, match="twice"):
        list_files([str(tmp_path / "**/*.txt")])


NAMES = st.sampled_from(["a", "b", "ab", ".h", "[x]", "c.txt"])
PARTS = st.sampled_from(["**", "*", "a", "b", "a*", "[ab]", ".*", "?", "*.txt", "[[]x]"])


@given(
    tree=st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=12),
    parts=st.lists(PARTS, min_size=1, max_size=4),
    relative=st.booleans(),
)
def test_without_links_it_is_what_glob_finds(tmp_path_factory, tree, parts, relative):
    root = tmp_path_factory.mktemp("tree")
    for path in tree:
        folder = root.joinpath(*path[:-1])
        if not any(root.joinpath(*path[:n]).is_file() for n in range(1, len(path))):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / path[-1]).exists():
                (folder / path[-1]).write_text("x")
    pattern = os.path.join(*([] if relative else [str(root)]), *parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        found = [path for path in _matches(pattern) if os.path.isfile(path)]
        assert len(set(found)) == len(found)
        assert set(found) == {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}


@pytest.mark.parametrize("name", ["a [1].txt", "b*c.txt", "d?.txt", "[e]/f.txt"])
def test_a_name_with_what_means_something_in_a_glob(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("text")
    (found,) = list_files([str(tmp_path / name)])
    assert found.path == str(tmp_path / name) and found.identity.endswith("/" + os.path.basename(name))


def test_a_pipe_is_named_as_one(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is no ordinary file"):
        list_files([str(tmp_path / "a.txt")])
