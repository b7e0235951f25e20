"""Text that a run was trained on is never measured as held-out text, however it is named, and other text always is."""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_recipe import RECIPE

from lighthouse_core import evaluate
from lighthouse_core.config import load_recipe
from lighthouse_core.data import overlap as overlaps
from lighthouse_core.data.build import build_stream
from lighthouse_core.data.overlap import overlap, own_split
from lighthouse_core.data.shards import ShardWriter, write_index
from lighthouse_core.data.stream import NoDocuments
from lighthouse_core.data.tokenizer import BytesTokenizer, build_tokenizer
from lighthouse_core.evaluate import load
from lighthouse_core.runs.create import create_run

# Of several lengths, two of the same; the last has what encodings differ in.
TEXTS = [
    *(f"text {i}, " + "word " * (7 * i) for i in range(1, 9)),
    "text 3, " + "Word " * 21,
    "\u00e9\u4e2d\U0001f600 \t\n" * 9,
]
OTHERS = [text.swapcase() for text in TEXTS[:9]] + ["Of nobody"]
# As good as all.
ALL = 0.999999


def as_txt(folder: Path, texts: list[str]) -> tuple[str, str]:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return "files", f"{folder}/*.txt"


def as_marked(folder: Path, texts: list[str]) -> tuple[str, str]:
    """With a byte-order mark, which is no part of a text."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return "files", f"{folder}/*.md"


def as_jsonl(folder: Path, texts: list[str]) -> tuple[str, str]:
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text, "more": i}) + "\n" for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(lines[::-2]))
    (folder / "b.jsonl").write_text("\n".join(lines[-2::-2]))
    return "files", f"{folder}/*.jsonl"


def as_parquet(folder: Path, texts: list[str]) -> tuple[str, str]:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "all.parquet", row_group_size=3)
    return "files", f"{folder}/*.parquet"


def as_python(folder: Path, texts: list[str]) -> tuple[str, str]:
    for i, text in enumerate(texts):
        (folder / f"{i}").mkdir(parents=True)
        (folder / f"{i}/module.py").write_bytes(text.encode())
    return "python-sources", str(folder)


def as_tokens(folder: Path, texts: list[str]) -> tuple[str, str]:
    folder.mkdir(parents=True)
    tokenizer, splits = BytesTokenizer(), {}
    # What is prepared has its split: all is held out, and all is trained on.
    for split in ("train", "validation"):
        writer = ShardWriter(folder / f"{split}-00000.tokens", tokenizer)
        units = []
        for i, text in enumerate(texts):
            ids = np.concatenate([[256], tokenizer.encode(text), [257]])
            writer.add(ids)
            units.append([f"{folder.name}/{i}", [[0, 1, len(ids)]]])
        splits[split] = {"shards": [list(writer.publish())], "units": units}
    index = {"fingerprint": 1, "tokenizer": tokenizer.fingerprint, "vocab_size": 258, "validation": ALL}
    write_index(folder, index | {"splits": splits})
    return "tokens", str(folder)


def as_data_set(folder: Path, texts: list[str]) -> tuple[str, str]:
    pytest.importorskip("datasets")
    as_jsonl(folder, texts)
    return "hf", str(folder)


FORMS = {
    form.__name__[3:]: form for form in (as_txt, as_marked, as_jsonl, as_parquet, as_python, as_tokens, as_data_set)
}


def recipe(place: Path, source: str, *paths: str, validation: float = ALL, **more: str):
    """A recipe of such data. Prepared tokens have a share held out, and whoever trains on them trains on the rest."""
    lines = [f'source = "{source}"', f"paths = {json.dumps(paths)}", f"validation = {validation}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    path = place / f"r{len(list(place.glob('r?.toml')))}.toml"
    path.write_text(RECIPE + "\n".join(lines) + "\n")
    return load_recipe(path)


def trained(of) -> str:
    """The fingerprint that training notes in a run's ledger."""
    return f"{build_stream(of.data, build_tokenizer(of.data.tokenizer), of.training.seed, 'train')[1]:016x}"


def all_of(place: Path, form: str, texts: list[str], name: str):
    """The recipe of a run that was trained on all of some texts."""
    source, path = FORMS[form](place / name, texts)
    return recipe(place, source, path, validation=ALL if source == "tokens" else 0.0)


def seen(own, other):
    return overlap(own, other, trained(own))


@pytest.mark.parametrize("measured", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_in_any_form(tmp_path, form, measured):
    own = all_of(tmp_path, form, TEXTS, "own")
    found = seen(own, recipe(tmp_path, *FORMS[measured](tmp_path / "copy", TEXTS)))
    assert found.trained_on and (found.texts, found.shared, found.share) == (10, 10, 1.0) and not found.unknown
    other = seen(own, recipe(tmp_path, *FORMS[measured](tmp_path / "other", OTHERS)))
    assert not other.trained_on and (other.texts, other.shared, other.unknown) == (10, 0, None)
    assert "held out: none of the 10 texts" in str(other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=20)
@given(
    st.sampled_from(list(FORMS)),
    st.sampled_from(list(FORMS)),
    st.sets(st.integers(0, 9), min_size=1),
    st.sets(st.integers(0, 9), min_size=1),
)
def test_any_part_of_it(tmp_path_factory, form, measured, ours, theirs):
    place = tmp_path_factory.mktemp("part")
    own = all_of(place, form, [TEXTS[i] for i in sorted(ours)], "own")
    found = seen(own, recipe(place, *FORMS[measured](place / "part", [TEXTS[i] for i in sorted(theirs, reverse=True)])))
    assert (found.texts, found.shared, found.unknown) == (len(theirs), len(ours & theirs), None)
    assert found.trained_on == (found.share >= 0.5) and (found.share > 0) == bool(ours & theirs)
    if found.shared:
        assert f"{found.shared} of {found.texts} texts, {found.share:.2%} of their length, are in" in str(found)
    assert ("held out" in str(found)) == (not found.shared)


# Ways to name corpus/a/*.txt and corpus/b/*.txt, which lie in the working directory.
NAMES = {
    "as the run names it": ["corpus/**/*.txt"],
    "in full": ["{here}/corpus/**/*.txt"],
    "from here": ["./corpus/**/*.txt"],
    "with separators": ["corpus//**//*.txt"],
    "by the folder above": ["../{here.name}/corpus/**/*.txt"],
    "by a parent": ["corpus/../corpus/./**/*.txt"],
    "by a glob of folders": ["corpus/*/*.txt"],
    "by a glob of letters": ["c[o]rp*/?/*.txt"],
    "from the home directory": ["~/corpus/**/*.txt"],
    "by folder": ["corpus/a/*.txt", "corpus/b/*.txt"],
    "in another order": ["corpus/b/*.txt", "corpus/a/*.txt"],
    "one of the folders": ["corpus/b/*.txt"],
    "a file and a folder": ["corpus/a/0.txt", "corpus/b/*.txt"],
    "a file": ["corpus/a/0.txt"],
    "everything around it": ["[c]*/**/*.txt"],
    "by a link to the folder": ["ways/link/**/*.txt"],
    "by a link in a folder": ["ways/links/**/*.txt"],
    "by links to the files": ["ways/files/*.txt"],
    "by hard links": ["ways/hard/*.txt"],
    "by a link to a link": ["ways/second/**/*.txt"],
}


@pytest.fixture
def corpus(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    as_txt(here / "corpus/a", TEXTS[:5])
    as_txt(here / "corpus/b", TEXTS[5:])
    ways = here / "ways"
    for folder in ("links", "files", "hard"):
        (ways / folder).mkdir(parents=True)
    (ways / "link").symlink_to("../corpus")
    (ways / "second").symlink_to("link")
    (ways / "links/corpus").symlink_to("../../corpus")
    for i, path in enumerate(sorted(here.glob("corpus/*/*.txt"))):
        (ways / f"files/{i}.txt").symlink_to(path)
        (ways / f"hard/{i}.txt").hardlink_to(path)
    return here


@pytest.fixture
def ask(lighthouse, corpus, monkeypatch):
    """`eval` of a run on other text, without the model: (result, report)."""
    subject = type("Subject", (), {"name": "one step 3", "tokens": 1024, "model": None, "leaky": False})
    mean = {"mean": 1.0, "standard_error": 0.1, "sequences": 2}

    def measure(subject, data, **options):
        return {
            "subject": "one",
            "leaky": False,
            "loss": {"nats_per_token": mean, "bits_per_byte": mean},
            "by_position": [],
        }

    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr(evaluate, "plot", lambda report, folder: [])

    def asked(own, *options: str, data: str | None = "as found"):
        if not (corpus / "runs/one").exists():
            run = create_run(own, "tiny", "one")
            if data:
                run.note(data=trained(own) if data == "as found" else data)
        monkeypatch.setattr(load, "load_checkpoint", lambda path, **named: (subject, own))
        shutil.rmtree(corpus / "out", ignore_errors=True)
        result = lighthouse("eval", "one", "--out", "out", "--only", "loss", *options)
        report = corpus / "out/results.json"
        return result, json.loads(report.read_text())["held_out"] if report.exists() else None

    return asked


def test_an_export_knows_its_run(ask, corpus, lighthouse, monkeypatch):
    own = recipe(corpus, "files", "corpus/**/*.txt", validation=0.5)
    as_txt(corpus / "other", OTHERS)
    recipe(corpus, "files", "other/*.txt")
    ask(own)
    (corpus / "export").mkdir()
    (corpus / "export/config.json").write_text('{"model_type": "llama"}')
    ledger = json.loads((corpus / "runs/one/ledger.json").read_text())
    (corpus / "export/lighthouse.json").write_text(json.dumps({"run": "one", "stages": ledger["stages"]}))
    subject = type("Subject", (), {"name": "export", "tokens": 1024, "model": None, "leaky": False})
    monkeypatch.setattr(load, "load_directory", lambda path, say: subject)

    def held_out(*options):
        shutil.rmtree(corpus / "out", ignore_errors=True)
        result = lighthouse("eval", "export", "--out", "out", "--only", "loss", *options)
        assert result.code == 0, result.err
        return json.loads((corpus / "out/results.json").read_text())["held_out"]

    # By its run, or by what the recipe reads and holds out.
    for named in ("runs/one", "runs/one/recipe.toml", "r0.toml"):
        found = held_out("--recipe", named)
        assert found["known"] and found["words"] == "held out by the run's own split"
    larger = lighthouse("eval", "export", "--recipe", "runs/one", "--set", "data.validation=0.9")
    assert "was trained on this text" in larger.error
    found = held_out("--recipe", "runs/one", "--set", 'data.paths=["other/*.txt"]')
    assert found["known"] and found["texts"] and not found["shared"]
    found = held_out("--recipe", "r1.toml")
    assert not found["known"] and "of the run one" in found["words"]
    # A run of other data is not its run, whatever its name.
    run = create_run(load_recipe(corpus / "r1.toml"), "tiny", "two")
    run.note(data=trained(run.recipe))
    assert not held_out("--recipe", "runs/two")["known"]
    for content in ("", "[]", '{"run": "one", "stages": []}'):
        (corpus / "export/lighthouse.json").write_text(content)
        assert held_out("--recipe", "runs/one")["words"] == "what the model was trained on is not known"
    wrong = lighthouse("eval", "export", "--recipe", "other")
    assert "other is a directory, not a recipe" in wrong.error


@pytest.mark.parametrize("name", NAMES)
def test_the_same_files_by_another_name(ask, corpus, name):
    own = recipe(corpus, "files", "corpus/**/*.txt", validation=0.0)
    paths = [path.format(here=corpus) for path in NAMES[name]]
    recipe(corpus, "files", *paths)
    result, report = ask(own, "--recipe", "r1.toml")
    assert "held out" in result.error or "was trained on this text" in result.error
    assert report is None and not (corpus / "out").exists()


@pytest.mark.parametrize("paths", [["packages"], ["./packages/"], ["{here}/packages"], ["packages/a", "packages/b"],
                                   ["packages/b"], ["other/../packages/b/"], ["linked"]])  # fmt: skip
def test_folders_of_python_by_another_name(ask, corpus, paths):
    (corpus / "other").mkdir()
    (corpus / "linked").symlink_to("packages")
    as_python(corpus / "packages/a", TEXTS[:5])
    as_python(corpus / "packages/b", TEXTS[5:])
    own = recipe(corpus, "python-sources", "packages", validation=0.0)
    recipe(corpus, "python-sources", *(path.format(here=corpus) for path in paths))
    result, _ = ask(own, "--recipe", "r1.toml")
    assert "held out" in result.error or "was trained on this text" in result.error


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_holds_out_itself(ask, corpus, name):
    """Another name may give documents other identities, and these another split: what is the same text decides."""
    own = recipe(corpus, "files", "corpus/**/*.txt", validation=0.5)
    other = recipe(corpus, "files", *(path.format(here=corpus) for path in NAMES[name]), validation=0.5)
    training, measured = set(texts_of(own, "train")), texts_of(other, "validation")
    result, report = ask(own, "--recipe", "r1.toml")
    shared = sum(text in training for text in measured)
    assert (result.code, report and report["shared"]) == ((2, None) if shared else (0, 0))
    if shared:
        assert f"{shared} of {len(measured)} texts" in result.error
    elif measured:
        assert "held out" in report["words"] and report["known"]


def texts_of(own, split: str) -> list[bytes]:
    stream, _ = build_stream(own.data, BytesTokenizer(), 0, split)
    found = []
    with suppress(NoDocuments):
        for before, _, tokens, _ in stream.documents(stream.start):
            if before.epoch:
                break
            found.append(bytes(tokens[1:-1].astype("u1")))
    return found


def test_other_text_by_the_same_names(ask, corpus, monkeypatch):
    """Names and sizes are those of the run's data, in another working directory."""
    own = recipe(corpus, "files", f"{corpus}/corpus/**/*.txt", validation=0.0)
    shutil.copytree(corpus / "corpus", corpus / "elsewhere/corpus")
    for path in (corpus / "elsewhere/corpus").rglob("*.txt"):
        path.write_bytes(path.read_bytes().swapcase().replace(b"\n", b"\t"))
    recipe(corpus, "files", "elsewhere/corpus/**/*.txt")
    result, report = ask(own, "--recipe", "r1.toml")
    assert result.code == 0 and report["known"] and (report["texts"], report["shared"]) == (10, 0)


def test_a_part_is_said(ask, corpus):
    own = recipe(corpus, "files", "corpus/**/*.txt", validation=0.0)
    as_txt(corpus / "mixed", [TEXTS[0], TEXTS[1], *OTHERS[2:]])
    recipe(corpus, "files", "mixed/*.txt")
    result, report = ask(own, "--recipe", "r1.toml")
    assert result.code == 0 and "2 of 10 texts" in result.err and "held out" not in result.err
    assert (report["texts"], report["shared"]) == (10, 2) and 0 < report["share"] < 0.5


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_that_stands_twice_in_a_file_is_no_row_that_was_trained_on(tmp_path, form):
    """The copy is counted; the row that is measured is held out, though it lies in a file that was trained on."""

    def write(texts: list[str]) -> str:
        if form == "parquet":
            return FORMS[form](tmp_path / "own", texts)[1]
        (tmp_path / "own").mkdir()
        (tmp_path / "own/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return f"{tmp_path}/own/*.jsonl"

    rows = [f"row {i}, " + "word " * i for i in range(400)]
    texts = rows + [f"more {i}" for i in range(50)]
    path = write(texts)
    own = recipe(tmp_path, "files", path, validation=0.25)
    held_out = {text.decode() for text in texts_of(own, "validation")}
    # One copy, far enough behind to be trained on.
    twice = next(text for text in rows if text in held_out)
    shutil.rmtree(tmp_path / "own")
    for at in range(len(rows), len(texts)):
        copied = [*texts[:at], twice, *texts[at + 1 :]]
        write(copied)
        if twice.encode() in texts_of(own, "train"):
            break
        shutil.rmtree(tmp_path / "own")
    # The same identities, so that the split is the same, and another listing.
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.jsonl").write_text(json.dumps({"text": "of nobody"}) + "\n")
    other = recipe(tmp_path, "files", path, f"{tmp_path}/more/*.jsonl", validation=0.25)
    found = seen(own, other)
    assert not found.trained_on and found.shared >= 1 and 0 < found.share < 0.1 and not found.unknown
    everything = seen(own, recipe(tmp_path, "files", path, f"{tmp_path}/more/*.jsonl", validation=0.3))
    assert everything.trained_on and everything.same_files and everything.share < 0.5


UNKNOWN = {
    "no fingerprint in the ledger": (None, lambda here: None),
    "another fingerprint in the ledger": ("0" * 16, lambda here: None),
    "a fingerprint that is none": (7, lambda here: None),
    "a file more": ("as found", lambda here: (here / "corpus/a/new.txt").write_text("new")),
    "a file less": ("as found", lambda here: (here / "corpus/a/0.txt").unlink()),
    "another size": ("as found", lambda here: (here / "corpus/a/0.txt").write_text("x")),
    "no files": ("as found", lambda here: shutil.rmtree(here / "corpus")),
    "another working directory": ("as found", lambda here: os.rename(here / "corpus", here / "moved")),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_what_cannot_be_known_is_not_called_held_out(ask, corpus, why):
    data, change = UNKNOWN[why]
    as_txt(corpus / "fresh", OTHERS)
    own = recipe(corpus, "files", "corpus/**/*.txt", validation=0.3)
    recipe(corpus, "files", "fresh/*.txt")
    ask(own, "--recipe", "r1.toml", data=data)
    change(corpus)
    for options in (("--recipe", "r1.toml"), ()):
        result, report = ask(own, *options)
        assert result.code == 0 and "is not known" in result.err and "held out" not in result.err, (why, options)
        assert not report["known"] and "not known" in report["words"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("hf", "owner/name"), ("files", "{here}/corpus/**/*.txt")),
        (("files", "corpus/**/*.txt"), ("hf", "owner/name")),
        (("hf", "owner/name"), ("hf", "owner/other")),
    ],
)
def test_data_sets_of_the_hub_are_not_known(corpus, ours, theirs):
    pytest.importorskip("datasets")
    commit = {"hf_revision": "0" * 40}
    own, other = (
        recipe(corpus, source, path.format(here=corpus), validation=share, **(commit if source == "hf" else {}))
        for (source, path), share in ((ours, 0.1), (theirs, ALL))
    )
    found = overlap(own, other, "0" * 16)
    assert not found.trained_on and "not known" in str(found) and "held out" not in str(found)


@pytest.mark.parametrize(("share", "refused"), [(0.05, False), (0.1, False), (0.2, True)])
def test_the_same_commit_of_the_hub(corpus, share, refused):
    pytest.importorskip("datasets")
    own, other = (recipe(corpus, "hf", "owner/name", validation=v, hf_revision="0" * 40) for v in (0.1, share))
    found = overlap(own, other, "0" * 16)
    assert found.trained_on == refused and found.share == (pytest.approx(0.5) if refused else 0)


def test_what_takes_too_long_is_not_known(tmp_path):
    own = all_of(tmp_path, "jsonl", OTHERS, "own")
    other = recipe(tmp_path, *as_txt(tmp_path / "other", TEXTS))
    found = overlap(own, other, trained(own), seconds=-1e9)
    assert found.unknown and "not known" in str(found) and "held out" not in str(found)


@pytest.mark.parametrize("form", ["**", "*/*/*.jsonl", "python-sources"])
def test_a_listing_without_an_end_is_not_known(ask, corpus, monkeypatch, form):
    """Whoever sends a run may name the root of a file system as its training text."""
    listed, now = [], time.monotonic
    real = os.scandir

    def scandir(folder=None):
        # glob has descriptors.
        path = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) else os.fsdecode(folder or ".")
        listed.append(path)
        return real(folder)

    for name in range(30):
        (corpus / f"endless/{name}/{name}").mkdir(parents=True)
        (corpus / f"endless/{name}/{name}/a.jsonl").write_text('{"text": "a"}')
        (corpus / f"endless/{name}/{name}/a.py").write_text("a")
    source, path = ("python-sources", "endless") if form == "python-sources" else ("files", f"endless/{form}")
    if form == "**":
        path += "/*.jsonl"
    own = recipe(corpus, source, path, validation=0.3)
    as_txt(corpus / "fresh", OTHERS)
    recipe(corpus, "files", "fresh/*.txt")
    ask(own, "--recipe", "r1.toml")
    # The time is up once a tenth of the folders have been listed.
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1e6 * (len(inside()) > 3))

    def inside():
        return [path for path in listed if "endless" in path]

    for options in (("--recipe", "r1.toml"), ()):
        listed.clear()
        result, report = ask(own, *options)
        assert result.code == 0 and "listing the run's training text took too long" in result.err, options
        assert "is not known" in report["words"] and not report["known"] and 3 < len(inside()) < 12


def test_one_file_that_takes_too_long_is_not_read_to_its_end(tmp_path, monkeypatch):
    """The time is looked at between the parts of a text."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large/a.txt").write_bytes(b"text\n" * (12 << 18))
    own = all_of(tmp_path, "jsonl", OTHERS, "own")
    read, content, now, late = [], overlaps._Look._content, time.monotonic, 0.0

    def slow(look, record):
        nonlocal late
        read.append(record)
        late += 1000
        return content(look, record)

    monkeypatch.setattr(time, "monotonic", lambda: now() + late)
    monkeypatch.setattr(overlaps._Look, "_content", slow)
    found = overlap(own, recipe(tmp_path, "files", f"{tmp_path}/large/*.txt"), trained(own))
    assert len([record for record in read if len(record.content) > 1 << 20]) == 1
    assert found.texts == 0 and "too much text" in str(found)


def test_what_cannot_be_read_is_not_known(tmp_path):
    own = all_of(tmp_path, "jsonl", OTHERS, "own")
    with (tmp_path / "own/b.jsonl").open("a") as file:
        file.write("\nno JSON")
    found = seen(own, recipe(tmp_path, *as_txt(tmp_path / "other", TEXTS)))
    assert "not valid JSON" in found.unknown and "not known" in str(found)


def test_an_exported_model_says_nothing_of_its_text(lighthouse, corpus, monkeypatch):
    subject = type("Subject", (), {"name": "exported", "tokens": 1024, "model": None, "leaky": False})
    mean = {"mean": 1.0, "standard_error": 0.1, "sequences": 2}
    report = {
        "subject": "one",
        "leaky": False,
        "loss": {"nats_per_token": mean, "bits_per_byte": mean},
        "by_position": [],
    }
    monkeypatch.setattr(evaluate, "evaluate", lambda subject, data, **options: report)
    monkeypatch.setattr(evaluate, "plot", lambda report, folder: [])
    monkeypatch.setattr(load, "load_directory", lambda path, say: subject)
    (corpus / "exported").mkdir()
    (corpus / "exported/config.json").write_text("{}")
    recipe(corpus, "files", "corpus/**/*.txt")
    result = lighthouse("eval", "exported", "--recipe", "r0.toml", "--out", "out", "--only", "loss")
    assert result.code == 0 and "is not known" in result.err
    assert not json.loads((corpus / "out/results.json").read_text())["held_out"]["known"]


def test_the_split_of_a_run(tmp_path):
    own = recipe(tmp_path, *as_txt(tmp_path / "own", TEXTS), validation=0.3)
    assert str(own_split(own, trained(own))) == "held out by the run's own split"
