import os
import sysconfig
from pathlib import Path

import pytest

from lighthouse_core.data.documents import keeper, stable_hash
from lighthouse_core.data.sources import fingerprint, list_documents
from lighthouse_core.errors import DataError


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def listed(*paths):
    return list_documents([str(path) for path in paths])


def split(documents, validation):
    """(train, validation)"""
    keeps = [keeper(name, validation) for name in ("train", "validation")]
    return tuple([document for document in documents if keep(document.identity)] for keep in keeps)


def contents(documents):
    return {document.identity: document.read() for document in documents}


def test_a_folder_is_a_document_of_its_own_files_in_order_of_names(tmp_path):
    root = write(
        tmp_path / "src",
        {
            "b.py": b"B",
            "a.py": b"A\n",
            "Z.py": b"Z",
            "notes.txt": b"no",
            "empty.py": b"",
            "pkg/deep/c.py": b"C",
            "only_empty/__init__.py": b"",
            ".hidden/d.py": b"no",
        },
    )
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    (root / "folder.py").mkdir()
    assert contents(listed(root)) == {"src": b"ZA\nB", "src/pkg/deep": b"C"}
    assert [document.size for document in listed(root)] == [4, 1]


def test_identities_do_not_tell_where_the_files_are(tmp_path):
    files = {"a.py": b"1", "x/b.py": b"22", "y/c.py": b"333"}
    here, there = listed(write(tmp_path / "here/src", files)), listed(write(tmp_path / "there/else/src", files))
    assert here == there and here[0].folder != there[0].folder
    assert fingerprint(here) == fingerprint(there)


def test_directories_of_one_name_stay_apart(tmp_path):
    first, second = write(tmp_path / "src", {"a.py": b"1"}), write(tmp_path / "other/src", {"a.py": b"2"})
    assert contents(listed(first, second)) == {"src": b"1", "src:2": b"2"}


@pytest.mark.parametrize("again", ["src", "src/pkg"])
def test_a_folder_reached_twice_is_refused(tmp_path, again):
    root = write(tmp_path / "src", {"a.py": b"1", "pkg/b.py": b"2"})
    with pytest.raises(DataError, match="twice"):
        listed(root, tmp_path / again)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a.py": b"1", "b.py": b"22"}, {"a.py": b"11", "b.py": b"2"}),
        ({"a.py": b"1", "b.py": b"22"}, {"a.py": b"1", "c.py": b"22"}),
        ({"a.py": b"1", "b.py": b"22"}, {"a.py": b"1", "b/b.py": b"22"}),
        ({"a.py": b"1", "b.py": b"22"}, {"a.py": b"1"}),
    ],
    ids=["resized", "renamed", "moved", "removed"],
)
def test_fingerprint_tells_listings_apart(tmp_path, before, after):
    first, second = listed(write(tmp_path / "1/src", before)), listed(write(tmp_path / "2/src", after))
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("content", [b"12345", b"1"])
def test_a_file_of_another_size_than_listed_is_an_error(tmp_path, content):
    root = write(tmp_path / "src", {"a.py": b"123"})
    (document,) = listed(root)
    write(root, {"a.py": content})
    with pytest.raises(DataError, match=f"from 3 to {len(content)} bytes") as error:
        document.read()
    assert error.value.hint


def test_a_file_gone_since_listing_is_an_error(tmp_path):
    root = write(tmp_path / "src", {"a.py": b"123"})
    (document,) = listed(root)
    (root / "a.py").unlink()
    with pytest.raises(DataError, match="cannot read"):
        document.read()


def test_mistakes_are_the_users_errors_with_hints(tmp_path):
    for paths, message in [
        ([str(tmp_path / "nowhere")], "no directory"),
        ([str(tmp_path)], "no Python files"),
        ([], "no Python files"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            list_documents(paths)
        assert error.value.hint


def test_the_top_of_the_stdlib_is_trained_on():
    train, held_out = split(listed("stdlib"), 0.05)
    assert "stdlib" in {document.identity for document in train} and held_out


def test_stdlib_is_the_interpreters_without_what_was_installed_into_it():
    documents = listed("stdlib")
    names = {document.identity: {file.name for file in document.files} for document in documents}
    assert "ast.py" in names["stdlib"] and "decoder.py" in names["stdlib/json"]
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    assert not [file for file in names["stdlib"] if file.startswith("_sysconfigdata")]
    assert contents([d for d in documents if d.identity == "stdlib/json"])["stdlib/json"].startswith(
        Path(sysconfig.get_path("stdlib"), "json/__init__.py").read_bytes()
    )


def test_site_packages_is_the_interpreters():
    root = os.path.realpath(sysconfig.get_path("purelib"))
    assert {Path(d.folder).relative_to(root).as_posix() for d in listed("site-packages")} == {
        d.identity.removeprefix("site-packages").removeprefix("/") or "." for d in listed("site-packages")
    }


def test_split_is_disjoint_complete_and_indifferent_to_other_documents(tmp_path):
    root = write(tmp_path / "src", {f"{i}/a.py": b"text" for i in range(400)})
    documents = listed(root)
    train, held_out = split(documents, 0.25)
    assert sorted([*train, *held_out], key=lambda d: d.identity) == documents
    assert 70 < len(held_out) < 130
    assert not {d.identity for d in train} & {d.identity for d in held_out}
    assert split(documents[::3], 0.25)[1] == [d for d in documents[::3] if d in held_out]
    assert set(split(documents, 0.1)[1]) < set(held_out)
    assert split(documents, 0.0) == (documents, [])


def test_hash_never_changes():
    # A new value would reorder the data of every run and move documents between training and validation.
    assert stable_hash("order", 0, 0, "stdlib/json") == 7810753062235832305
