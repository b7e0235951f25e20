"""Mixtures: shares, tokens, positions, reports, and everything else that reads a recipe's data."""

import itertools
import json
import logging
import random
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from lighthouse_core.config import dump_recipe, loads_recipe
from lighthouse_core.config.data import DataSection, SourceSection
from lighthouse_core.data import check
from lighthouse_core.data.build import build_stream, build_streams, check_apart
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.mixture import next_source
from lighthouse_core.data.overlap import overlap
from lighthouse_core.data.prepare import import_tokens, prepare
from lighthouse_core.data.survey import (
    Survey,
    mixed_ignored,
    mixed_padding,
    mixed_pieces,
    quantiles,
    survey,
)
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.data.tokenizers.train import texts_of
from lighthouse_core.errors import DataError, RecipeError
from lighthouse_core.evaluate.report import held_out

RECIPE = """\
[model]
dim = 64
layers = 1
heads = 2
ffn_dim = 96
vocab_size = 320
[lighthouse]
enabled = false
[training]
seq_len = 32
global_batch_size = 4
steps = 50
[optimizer]
lr = 1e-3
"""
MIXTURE = """\
[data]
validation = 0.2
[[data.sources]]
source = "files"
paths = ["web/*.jsonl"]
weight = 0.7
[[data.sources]]
source = "python-sources"
paths = ["code"]
weight = 0.3
"""
SEQ = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text of three sources that share no byte, so that a token tells its source."""
    root = tmp_path_factory.mktemp("mixture")
    for folder in ("web", "books"):
        (root / folder).mkdir()
    draw = random.Random(1)
    lines = ["".join(draw.choices("abcdefgh", k=draw.randrange(1, 90))) for _ in range(60)]
    (root / "web/a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (root / "web/b.jsonl").write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines[:20]))
    for i in range(20):
        (root / f"code/{i}").mkdir(parents=True)
        (root / f"code/{i}/a.py").write_text("".join(draw.choices("01234567", k=draw.randrange(1, 200))))
        (root / f"books/{i}.txt").write_text("".join(draw.choices("STUVWXYZ", k=draw.randrange(1, 300))))
    return root


@pytest.fixture(scope="module")
def prepared(place):
    """The books as prepared tokens, in the default order of prepared tokens: shuffled samples."""
    data = DataSection(source="files", paths=[f"{place}/books/*.txt"], validation=0.2)
    prepare(recipe(data), place / "tokens", 1, lambda progress: None)
    return place / "tokens"


def recipe(data):
    return loads_recipe(RECIPE).model_copy(update={"data": data})


def source(place, weight, kind="files", **more):
    path = {"files": "web/*.jsonl", "python-sources": "code", "tokens": "tokens"}[kind]
    return SourceSection(source=kind, paths=[f"{place}/{path}"], weight=weight, **more)


def mixture(*sources, **more):
    return DataSection(sources=sources, **{"validation": 0.2} | more)


@pytest.fixture(scope="module")
def mixed(place, prepared):
    """Sources of each kind of position: walked, known, and of shuffled samples."""
    return mixture(
        source(place, 0.5), source(place, 0.3, "python-sources"), source(place, 0.2, "tokens"), shuffle="auto"
    )


def loader(data, local_batch_size=1, rank=0, ranks=1, seed=0, split="train"):
    return build_loader(data, SEQ, local_batch_size, rank, ranks, seed, split)


def rows(batch):
    return torch.cat([batch[0]["input"], batch[1][:, -1:]], dim=1).tolist()


def taken(loaders, steps):
    """Samples of so many micro-batches of all ranks, in their global order."""
    batches = [[rows(batch) for batch in itertools.islice(one, steps)] for one in loaders]
    return [row for step in zip(*batches, strict=True) for part in step for row in part]


def of_source(sample):
    """Which of "a", "0" and "S" a sample's text is of, by its letters; BOS and EOS are of any."""
    [kind] = {"a" if token >= 97 else "S" if token >= 65 else "0" for token in sample if token < 256}
    return kind


RANDOM = [[random.Random(seed).choice([1, 3, 0.01, 2.5, 1e-3, 17]) for _ in range(2 + seed)] for seed in range(5)]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1], [1, 1, 1, 1], *RANDOM])
def test_every_source_has_its_share_at_any_time(weights):
    parts = tuple(SourceSection(weight=weight) for weight in weights)
    exact = [Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights) for weight in weights]
    whole = DataSection(sources=parts).weights
    assert [Fraction(weight, sum(whole)) for weight in whole] == exact
    for seed in range(3):
        counts = [0] * len(weights)
        for samples in range(1, 1001):
            counts[next_source(counts, whole, seed)] += 1
            assert all(abs(count - share * samples) < 1 for count, share in zip(counts, exact, strict=True))
        assert all(abs(count / 1000 - share) < 0.01 for count, share in zip(counts, exact, strict=True))


def test_the_seed_decides_where_nothing_else_does():
    def turns(seed):
        counts = [0, 0, 0]
        for _ in range(60):
            one = next_source(counts, [1, 1, 1], seed)
            counts[one] += 1
            yield one

    assert list(turns(1)) == list(turns(1)) != list(turns(2))
    # No rhythm: what every third sample is of varies.
    assert len(set(list(turns(1))[::3])) > 1


def test_a_mixture_has_the_samples_of_each_source_alone_in_their_order(mixed):
    count = 400
    together = taken([loader(mixed)], count)
    alone = [taken([loader(part)], count) for part in mixed.parts]
    found = {kind: [sample for sample in together if of_source(sample) == kind] for kind in "a0S"}
    assert [len(samples) for samples in found.values()] == [200, 120, 80]
    for samples, own in zip(found.values(), alone, strict=True):
        assert samples == own[: len(samples)]


def test_ranks_and_batch_sizes_share_one_order(mixed):
    expected = taken([loader(mixed, seed=3)], 36)
    for ranks, local in [(1, 4), (2, 1), (2, 3), (3, 1), (3, 2)]:
        steps = 36 // (ranks * local)
        loaders = [loader(mixed, local, rank, ranks, 3) for rank in range(ranks)]
        assert taken(loaders, steps) == expected
        states = [one.state_dict() for one in loaders]
        assert all(state == states[0] for state in states) and states[0]["samples"] == 36


def test_resumed_after_any_batch_on_1_2_and_3_ranks(mixed):
    expected = taken([loader(mixed)], 42)
    one = loader(mixed)
    batches = iter(one)
    for done in range(30):
        state = one.state_dict()
        for ranks, local in [(1, 1), (2, 1), (3, 2)]:
            resumed = [loader(mixed, local, rank, ranks) for rank in range(ranks)]
            for other in resumed:
                other.load_state_dict(state)
            assert taken(resumed, 2) == expected[done : done + 2 * ranks * local]
        next(batches)


def test_the_state_is_plain_integers_and_survives_torch_dcp(mixed, tmp_path):
    one = loader(mixed)
    before = taken([one], 25)
    state = one.state_dict()
    assert all(type(value) is int and abs(value) < 2**63 for value in state.values())
    assert [state[f"source_{number}_samples"] for number in range(3)] == [13, 7, 5] and state["samples"] == 25
    dcp.save({"dataloader": one}, checkpoint_id=tmp_path / "c", no_dist=True)
    other = loader(mixed)
    dcp.load({"dataloader": other}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert before + taken([other], 10) == taken([loader(mixed)], 35)


def test_another_mixture_takes_no_position(place, mixed):
    state = loader(mixed).state_dict()
    first, *others = mixed.sources
    heavier = mixed.model_copy(update={"sources": (first.model_copy(update={"weight": 0.6}), *others)})
    with pytest.raises(DataError, match="data changed"):
        loader(heavier).load_state_dict(state)
    # Names are for reports alone, and only the ratio of weights counts.
    ratio = [
        one.model_copy(update={"weight": one.weight * 10, "name": f"n{number}"})
        for number, one in enumerate(mixed.sources)
    ]
    loader(mixed.model_copy(update={"sources": tuple(ratio)})).load_state_dict(state)


# Positions that an earlier release gave, 40 samples into the text of the test below, and the text there.
EARLIER = {
    ("files", "web/*.jsonl", "auto"): (
        {"epoch": 0, "file": 0, "row": 18, "byte": 1557, "offset": 109, "fingerprint": 5922012006998475348},
        b" 19 line 19 line 19 line 19 line",
    ),
    ("python-sources", "code", "auto"): (
        {"epoch": 1, "sample": 6, "fingerprint": 8834671899392375923},
        b"= 18\nx = 18\nx = 18\nx = 7\nx = 7",
    ),
    ("python-sources", "code", "documents"): (
        {"epoch": 1, "document": 2, "offset": 41, "fingerprint": 467923451227604460},
        b"9\nx = 19\nx = 19\nx = 19\nx = 19\nx ",
    ),
}


@pytest.mark.parametrize(("kind", "path", "shuffle"), EARLIER)
def test_one_source_is_as_it_was(tmp_path, kind, path, shuffle):
    (tmp_path / "web").mkdir()
    lines = [json.dumps({"text": f"line {i} " * i}) + "\n" for i in range(1, 30)]
    (tmp_path / "web/a.jsonl").write_text("".join(lines))
    for i in range(1, 20):
        (tmp_path / f"code/{i}").mkdir(parents=True)
        (tmp_path / f"code/{i}/a.py").write_text(f"x = {i}\n" * i)
    data = DataSection(source=kind, paths=[f"{tmp_path}/{path}"], validation=0.2, shuffle=shuffle)
    position, text = EARLIER[kind, path, shuffle]
    state = {"samples": 40, **position, "seq_len": SEQ, "seed": 5}
    one = loader(data, seed=5)
    taken([one], 40)
    assert one.state_dict() == state
    resumed = loader(data, seed=5)
    resumed.load_state_dict(state)
    [sample] = taken([resumed], 1)
    assert bytes(token for token in sample[:-1] if token < 256) == text
    assert data.parts == (data,) and data.names == (path[:4].rstrip("/*"),)
    assert dump_recipe(recipe(data)).count("\nsources") == 0
    assert build_streams(data, BytesTokenizer(), 5, "train")[1] == build_stream(data, BytesTokenizer(), 5, "train")[1]


def test_validation_is_of_the_same_mixture_and_begins_anew(mixed):
    one = loader(mixed, split="validation", seed=1)
    first = taken([one], 20)
    assert first == taken([one], 20) == taken([loader(mixed, split="validation", seed=2)], 20)
    assert [list(map(of_source, first)).count(kind) for kind in "a0S"] == [10, 6, 4]
    assert not {tuple(sample) for sample in first} & {tuple(sample) for sample in taken([loader(mixed)], 100)}


def test_epochs_are_counted_and_told(mixed, caplog):
    caplog.set_level(logging.INFO)
    one = loader(mixed)
    taken([one], 400)
    drawn = one.drawn()
    assert {name: samples for name, (samples, _) in drawn.items()} == {"web": 200, "code": 120, "tokens": 80}
    state = one.state_dict()
    assert [epoch - 1 for _, epoch in drawn.values()] == [state[f"source_{number}_epoch"] for number in range(3)]
    assert min(epoch for _, epoch in drawn.values()) > 1
    told = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    for name, (_, epoch) in drawn.items():
        assert [line for line in told if f"source {name}:" in line] == [
            f"source {name}: epoch {number} begins" for number in range(2, min(epoch, 10) + 1)
        ]


def test_what_is_known_of_a_mixture(mixed):
    made = recipe(mixed)
    looked = survey(made, "train", seconds=60, samples=1)
    assert [(one.source, one.share) for one in looked] == [("web", 0.5), ("code", 0.3), ("tokens", 0.2)]
    assert all(len(one.samples) == 1 and one.size > 0 for one in looked)
    for one in looked:
        assert one.epochs == pytest.approx(one.share * 50 * 4 * SEQ / one.tokens)
    # Where nothing can be read in time, of what has to be read.
    web, *others = survey(made, "train", seconds=0, samples=0)
    assert (web.tokens, web.size, web.complete, web.epochs) == (0, looked[0].size, False, None)
    assert [one.tokens for one in others] == [one.tokens for one in looked[1:]]


def test_what_documents_of_a_mixture_cost():
    """Of lengths that are easily added up: 3 samples of the first source for each one of the second."""
    one, two = (
        Survey("train", np.array(lengths), True, 8, (), align=4, share=share)
        for lengths, share in (([4, 4] * 30, 0.75), ([5, 16] * 30, 0.25))
    )
    assert mixed_padding([one, two]) == pytest.approx(0.25 * 3 / 24)
    assert mixed_ignored([one, two]) == pytest.approx(0.75 / 4 + 0.25 * (3 + 2) / 24)
    pieces = mixed_pieces([one, two])
    first = pieces[: pieces.index(8)]
    assert set(first) == {4} and pieces[len(first) :][:3] == [8, 8, 8]
    assert sum(first) == pytest.approx(3 * (sum(pieces) - sum(first)), abs=16)
    assert quantiles(one.lengths[:0]) == (0, 0, 0, 0) and quantiles(two.lengths) == (16, 16, 16, 16)


def test_a_text_is_in_one_source_alone(place, prepared):
    with pytest.raises(DataError, match=r"sources web and again both read .*web/a.jsonl") as error:
        check(recipe(mixture(source(place, 1), source(place, 2, name="again"))))
    assert "weight" in error.value.hint
    for kind in ("python-sources", "tokens"):
        with pytest.raises(DataError, match="both read"):
            loader(mixture(source(place, 1, kind), source(place, 1, kind)))


def test_a_text_is_in_one_source_alone_whatever_their_kinds(place, prepared, tmp_path):
    def hub(path, **more):
        return SourceSection(source="hf", paths=[f"{path}"], weight=1, **more)

    def files(path, **more):
        return SourceSection(source="files", paths=[f"{path}"], weight=1, **more)

    web, books = place / "web", place / "books"
    (tmp_path / "linked").symlink_to(web)
    (tmp_path / "split").mkdir()
    (tmp_path / "split/train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "split/test.jsonl").write_text('{"text": "other"}\n')
    test = files(tmp_path / "split/test.jsonl", name="other")
    data = DataSection(source="files", paths=[f"{books}/*.txt"], validation=0.2)
    prepare(recipe(data), tmp_path / "again", 1, lambda progress: None)
    again = SourceSection(source="tokens", paths=[f"{tmp_path}/again"], weight=1)
    (tmp_path / "py").mkdir()
    (tmp_path / "py/a.py").symlink_to(place / "code/0/a.py")
    linked = SourceSection(paths=[f"{tmp_path}/py"], weight=1)
    tokens = source(place, 1, "tokens")
    for one, other, what in [
        (hub(web), files(web / "a.jsonl"), "web/a.jsonl"),
        (files(web / "*.jsonl"), hub(tmp_path / "linked"), "a.jsonl"),
        (test, hub(tmp_path / "split", hf_split="test"), "split/test.jsonl"),
        (source(place, 1, "python-sources"), linked, "a.py"),
        (tokens, files(books / "*.txt"), "the text of .*books"),
        (files(books / "*.txt"), tokens, "the text that .*tokens was prepared from"),
        (tokens, again, "the text that .*again was prepared from"),
    ]:
        with pytest.raises(DataError, match=f"both read .*{what}"):
            check_apart(mixture(one, other))
    # Another split of the same folder, and text that the prepared directory was not made of.
    check_apart(mixture(test, hub(tmp_path / "split"), tokens, source(place, 1)))


def test_ids_that_were_imported_twice_are_one_text(tmp_path):
    def take(path, out):
        import_tokens(
            str(path), tmp_path / out, "bytes", format=None, validation=0.0, workers=1, progress=lambda progress: None
        )
        return SourceSection(source="tokens", paths=[f"{tmp_path}/{out}"], weight=1)

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.array([1, 2, 3, 257] * 50, dtype="<u2").tofile(tmp_path / folder / "ids.bin")
    one, again, copied = take(tmp_path / "a", "one"), take(tmp_path / "a", "again"), take(tmp_path / "b", "copied")
    with pytest.raises(DataError, match=r"both read the text that .*again was prepared from"):
        check_apart(mixture(one, again))
    with pytest.raises(DataError, match=r"both read the tokens of .*copied"):
        check_apart(mixture(one, copied))
    seen = {
        name: build_streams(
            DataSection(source="tokens", paths=[f"{tmp_path}/{name}"], validation=0.0), BytesTokenizer(), 0, "train"
        )
        for name in ("one", "again", "copied")
    }
    assert seen["one"][1] == seen["again"][1] != seen["copied"][1]
    # Other ids of the same listing.
    np.array([1, 2, 4, 257] * 50, dtype="<u2").tofile(tmp_path / "a/ids.bin")
    check_apart(mixture(copied, take(tmp_path / "a", "other")))


def test_an_error_names_the_source(place, tmp_path):
    gone = SourceSection(source="files", paths=[f"{tmp_path}/*.txt"], weight=1, name="gone")
    for use in (loader, lambda data: check(recipe(data))):
        with pytest.raises(DataError, match=r"source gone: .*no files match"):
            use(mixture(source(place, 1), gone))
    (tmp_path / "a.txt").write_text("all that there is")
    with pytest.raises(DataError, match=r"source gone: .*no documents?"):
        check(recipe(mixture(source(place, 1), gone)))


def test_a_mixture_is_not_prepared(place, tmp_path):
    with pytest.raises(DataError, match="mixture") as error:
        prepare(recipe(mixture(source(place, 1))), tmp_path / "out", 1, lambda progress: None)
    assert '"tokens"' in error.value.hint and not (tmp_path / "out").exists()


def test_a_tokenizer_learns_from_every_source(place):
    text = "".join(texts_of(mixture(source(place, 3), source(place, 1, "python-sources")), "train", 800))
    assert 180 <= sum(char.isdigit() for char in text) <= 220 and 550 <= sum(char.isalpha() for char in text) <= 650


def test_held_out_text_of_eval_is_of_every_source(mixed):
    subject = SimpleNamespace(tokenizer_name="bytes", tokenizer=BytesTokenizer(), alignment=1)
    found = held_out(mixed, subject, 24, 10, 1)
    text = found.tokens.tolist()
    assert len(found.packed_sequences) == 10
    assert [list(map(of_source, text)).count(kind) for kind in "a0S"] == [5, 3, 2]
    assert len(set(map(tuple, text))) == 10


def trained(of):
    return f"{build_streams(of.data, BytesTokenizer(), of.training.seed, 'train', align=of.alignment)[1]:016x}"


def test_overlap_sees_every_source(place, prepared, mixed, tmp_path):
    def seen(data, other):
        own = recipe(data)
        return overlap(own, recipe(other), trained(own))

    # What the run holds out itself, of one of its sources and of all.
    itself = seen(mixed, mixed)
    assert (itself.shared, itself.trained_on, itself.unknown) == (0, False, None) and "held out" in str(itself)
    assert not seen(mixed, mixed.parts[1]).trained_on
    # More of them than the run held out, in the second source.
    more = mixture(source(place, 1, "python-sources"), validation=0.9)
    assert seen(mixed, more).trained_on and "source code" in str(seen(mixed, more))
    # A copy of the training text of the second source, beside text of nobody.
    for number, path in enumerate(sorted((place / "code").glob("*/a.py"))):
        (tmp_path / f"copy/{number}").mkdir(parents=True)
        (tmp_path / f"copy/{number}/b.py").write_text(path.read_text())
    (tmp_path / "new").mkdir()
    for number in range(10):
        (tmp_path / f"new/{number}.txt").write_text(f"new text {number}")
    copy = SourceSection(paths=[f"{tmp_path}/copy"], weight=0.01)
    new = SourceSection(source="files", paths=[f"{tmp_path}/new/*.txt"], weight=0.99)
    everything = 0.999999
    for data in (mixed, mixed.parts[1]):
        found = seen(data, mixture(new, copy, validation=everything))
        assert found.trained_on and found.source == "copy" and found.shared > 10
        alone = seen(data, mixture(new, validation=everything))
        assert (alone.texts, alone.shared, alone.trained_on, alone.unknown) == (10, 0, False, None)


@pytest.mark.parametrize("name", [None, "a.b"])
def test_names(name):
    def names(*paths, kind="files"):
        last = SourceSection(source=kind, paths=[paths[-1]], weight=1, **({"name": name} if name else {}))
        parts = (*(SourceSection(source=kind, paths=[path], weight=1) for path in paths[:-1]), last)
        return DataSection(sources=parts).names

    assert names("corpus/web/*.jsonl", "corpus/web-*.jsonl", "x") == ("web", "corpus", name or "x")
    assert names("corpus/web.jsonl", "/data/web/**/*.txt", "x") == ("web", "web-2", name or "x")
    assert names("allenai/c4", "../*.txt", "x", kind="hf") == ("c4", "hf", name or "x")


def test_a_name_that_is_given_renames_no_other_by_a_number():
    def names(*sources):
        return DataSection(sources=[SourceSection(source="files", weight=1, **one) for one in sources]).names

    b, given = {"paths": ["data/b/*.jsonl"]}, {"paths": ["a.jsonl"], "name": "b"}
    assert names(b, given) == ("data-b", "b") == names(given, b)[::-1]
    assert names(b, {"paths": ["x/b/*.jsonl"]}, given) == ("data-b", "x-b", "b")
    assert names({"paths": ["b.jsonl"]}, given) == ("files", "b")


def test_a_mixture_is_written_and_read(place):
    made = loads_recipe(RECIPE + MIXTURE)
    text = dump_recipe(made)
    assert text.count("[[data.sources]]") == 2 and loads_recipe(text) == made
    assert loads_recipe(RECIPE, ["data.sources=[{weight=2}]"]).data.names == ("stdlib",)


BAD = {
    "weight = 0.3": {
        "weight = 0": r":24: data.sources\[2\].weight must be above 0, not 0",
        "weight = -1": r":24: data.sources\[2\].weight must be above 0, not -1",
        "weight = nan": r":24: data.sources\[2\].weight must be a finite number",
        "weight = inf": r":24: data.sources\[2\].weight must be a finite number",
        "weight = true": r":24: data.sources\[2\].weight must be a number",
        'weight = "1"': r":24: data.sources\[2\].weight must be a number",
        "": r":21: data.sources\[2\].weight is missing",
        "wieght = 1": r":24: unknown key data.sources.wieght; did you mean data.sources.weight",
        'weight = 1\ntokenizer = "bytes"': r":25: data.tokenizer is for all sources together",
        'weight = 1\nname = "a b"': r":25: data.sources\[2\].name: a name has",
        'weight = 1\nname = "x"\n[[data.sources]]\nweight = 1\nname = "x"': r'two of the name "x"',
        'weight = 1\nhf_config = "x"': r":25: data.sources.hf_config is for data.sources.source \"hf\"",
    },
    'paths = ["code"]': {
        'paths = ["a"]\nsource = "x"': "not valid TOML",
        "paths = []": r":23: data.sources\[2\].paths must not be empty",
        "paths = [1]": r":23: data.sources\[2\].paths\[1\] must be a string",
    },
    'source = "files"\npaths = ["web/*.jsonl"]': {
        'source = "files"': r":18: data.sources.paths is missing",
        'source = "tokens"\npaths = ["a", "b"]': r":19: data.sources.paths must have one entry",
        'source = "blend"': r":18: data.sources\[1\].source must be",
    },
    "validation = 0.2": {
        'paths = ["web"]': r":16: data.paths is for one source, and data.sources for several",
        'source = "files"': r":16: data.source is for one source, and data.sources for several",
        'shuffle = "samples"': r':16: data.shuffle "samples" needs token counts',
        "validation = 0.2\nweight = 1": r":17: unknown key data.weight",
    },
}


@pytest.mark.parametrize(("good", "bad"), [(good, bad) for good, bads in BAD.items() for bad in bads])
def test_bad_mixtures_are_one_line(good, bad):
    assert (RECIPE + MIXTURE).count(good) == 1
    with pytest.raises(RecipeError, match=BAD[good][bad]) as error:
        loads_recipe((RECIPE + MIXTURE).replace(good, bad))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["data.sources=[]", "data.sources=1", 'data.sources=["a"]', 'data.paths=["a"]',
                                     "data.sources=[{weight=0}]", "data.sources=[{}]"])  # fmt: skip
def test_bad_settings_are_to_blame(setting):
    with pytest.raises(RecipeError, match=f"^--set {setting.partition('=')[0]}: ") as error:
        loads_recipe(RECIPE + MIXTURE, [setting])
    assert "\n" not in str(error.value)
