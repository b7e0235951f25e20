"""Data sets of the hub, which is replaced here by a folder, and of save_to_disk."""

import itertools
import json
from types import SimpleNamespace

import pytest

from lighthouse_core.config import loads_recipe
from lighthouse_core.config.data import DataSection, SourceSection
from lighthouse_core.data.build import build_source
from lighthouse_core.data.documents import Place
from lighthouse_core.data.hub import HubSource, pinned
from lighthouse_core.errors import DataError

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

FIRST, SECOND = "1" * 40, "a" * 40
NAME = "someone/some-data"


def recipe(paths=(NAME,), source="hf", **data):
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"paths": list(paths), **data}.items())
    return loads_recipe(
        "[model]\ndim = 64\nlayers = 2\nheads = 2\nhead_dim = 32\nffn_dim = 64\nvocab_size = 320\n"
        "[lighthouse]\nenabled = false\n[training]\nseq_len = 64\nglobal_batch_size = 1\nsteps = 1\n"
        f'[optimizer]\nlr = 1e-3\n[data]\nsource = "{source}"\n{lines}'
    )


def texts(source, place=None):
    return [
        record.content
        for unit in range(len(source.identities))
        for record in source.records(unit, place or Place(), lambda identity: True)
    ]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub.sha` is the newest commit; every commit has a folder's content. `hub.asked` are the revisions asked for."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    hub = SimpleNamespace(sha=FIRST, asked=[], loaded=[])

    class Api:
        def dataset_info(self, path, revision=None):
            hub.asked.append(revision)
            return SimpleNamespace(sha=hub.sha)

    build = datasets.load_dataset_builder

    def load(path, config=None, revision=None):
        assert path == NAME
        hub.loaded.append(revision)
        builder = build(str(tmp_path / "there"), config)
        builder.hash = revision
        return builder

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return hub


def test_a_pinned_recipe_keeps_its_commit_and_asks_nobody(hub):
    kept = pinned(recipe())
    assert kept.data.hf_revision == FIRST and hub.asked == [None]
    before = build_source(kept.data)
    hub.sha = SECOND
    after = build_source(pinned(kept).data)
    assert texts(after) == ["one", "two"] and after.fingerprint == before.fingerprint
    assert hub.asked == [None] and hub.loaded == [FIRST, FIRST]
    assert pinned(recipe(hf_revision="v1")).data.hf_revision == SECOND and hub.asked == [None, "v1"]
    assert build_source(pinned(recipe()).data).fingerprint != before.fingerprint


def test_each_source_of_a_mixture_is_pinned(hub, tmp_path):
    (tmp_path / "a").mkdir()
    parts = (
        SourceSection(source="hf", paths=[NAME], weight=1),
        SourceSection(source="files", paths=[f"{tmp_path}/a/*.txt"], weight=1),
        SourceSection(source="hf", paths=[NAME], hf_revision="v1", weight=1),
    )
    mixed = recipe().model_copy(update={"data": DataSection(sources=parts)})
    assert [part.hf_revision for part in pinned(mixed).data.parts] == [FIRST, "", FIRST]
    assert hub.asked == [None, "v1"]


def test_nothing_else_is_pinned(hub, tmp_path):
    local = recipe([str(tmp_path)])
    assert pinned(local) == local and not hub.asked


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and a cache of `datasets` without anything in it. Returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_offline_the_cache_has_the_data_set(offline, tmp_path):
    (tmp_path / "some-data").mkdir()
    (tmp_path / "some-data/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    datasets.load_dataset(str(tmp_path / "some-data"))
    made = next(offline.glob("some-data/default/0.0.0/*/"))
    cached = offline / f"someone___some-data/default/0.0.0/{FIRST}"
    cached.parent.mkdir(parents=True)
    made.rename(cached)

    kept = pinned(recipe())
    assert kept.data.hf_revision == FIRST and texts(build_source(kept.data)) == ["one", "two"]
    for revision in (SECOND, "v1"):
        with pytest.raises(DataError, match=f"asked for revision {revision} of .* the cache .* has {FIRST}"):
            build_source(recipe(hf_revision=revision).data)


def test_offline_without_a_cache_is_one_clear_line(offline):
    with pytest.raises(DataError, match="cannot load the data set someone"):
        pinned(recipe())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What save_to_disk writes: 50 rows in 8 files, and a dictionary of them."""
    root = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(50)]})
    rows.save_to_disk(str(root / "eight"), num_shards=8)
    datasets.DatasetDict({"dev": rows}).save_to_disk(str(root / "several"), num_shards={"dev": 3})
    rows.select(range(1)).save_to_disk(str(root / "one"))
    return root


@pytest.mark.parametrize(
    ("name", "split", "units", "count"), [("eight", "train", 8, 50), ("several", "dev", 3, 50), ("one", "train", 1, 1)]
)
def test_a_saved_data_set_has_a_unit_a_file(saved, name, split, units, count):
    source = HubSource(str(saved / name), "", split, "", "text")
    assert len(source.identities) == units
    assert texts(source) == [str(i) for i in range(count)]
    for unit in range(units):
        records = list(source.records(unit, Place(), lambda identity: True))
        for record in records:
            rest = source.records(unit, record.start, lambda identity: True)
            assert list(itertools.islice(rest, 2)) == records[record.start.row :][:2]


@pytest.mark.parametrize(
    ("name", "config", "split", "message"),
    [
        ("eight", "", "dev", 'no split "dev"'),
        ("several", "", "train", 'no split "train".*there are: dev'),
        ("eight", "german", "train", 'no configuration "german"'),
        ("several", "german", "dev", 'no configuration "german"'),
    ],
)
def test_a_saved_data_set_has_no_other_split_or_configuration(saved, name, config, split, message):
    with pytest.raises(DataError, match=message):
        HubSource(str(saved / name), config, split, "", "text")


def test_rows_without_text_are_passed_over_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    source = HubSource(str(tmp_path), "", "train", "", "text")
    assert texts(source) == ["one", "two"] and source.nulls == 2


def test_hints_of_files_and_hf_do_not_send_in_a_circle(tmp_path):
    """What one source refuses and its hint sends to the other is read there."""
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    (tmp_path / "arrow").mkdir()
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "arrow/a.arrow")
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    for path, reader in ((tmp_path / "a.csv", "files"), (tmp_path / "arrow/a.arrow", "hf")):
        with pytest.raises(DataError, match="is not a directory") as error:
            build_source(recipe([str(path)]).data)
        assert (error.value.hint == 'data.source = "files" reads it') == (reader == "files")
        if reader == "files":
            assert texts(build_source(recipe([str(path)], source="files").data)) == ["one", "two"]
        else:
            with pytest.raises(DataError, match="is not one of") as error:
                build_source(recipe([str(path)], source="files").data)
            assert 'data.source = "hf" reads a folder' in error.value.hint
            assert texts(build_source(recipe([str(path.parent)]).data)) == ["one", "two"]


def formats():
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return sorted(_PACKAGED_DATASETS_MODULES)


@pytest.mark.parametrize("name", formats())
def test_a_directory_with_the_name_of_a_format_is_read_itself(tmp_path, monkeypatch, name):
    """The library takes such a name for its own reader, of whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("jsonl", "json", "csv", "txt", "parquet"):
        (tmp_path / f"other.{suffix}").write_text('{"text": "another folder"}\n')
    with pytest.raises(DataError, match="is a format of the datasets library") as error:
        build_source(recipe([name]).data)
    assert "owner/name" in error.value.hint
    with pytest.raises(DataError, match="is a format"):
        pinned(recipe([name]))
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jsonl").write_text('{"text": "this folder"}\n')
    for path in (name, f"{name}/"):
        source = build_source(recipe([path]).data)
        assert texts(source) == ["this folder"] and source.identities == [f"{name}/train/0"]
        assert pinned(recipe([path])) == recipe([path])
