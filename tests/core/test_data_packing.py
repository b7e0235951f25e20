"""`[data] packing = "documents"`: the loader against a packer of plain lists, on every stream."""

import csv
import gzip
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse_core.config import dump_recipe, loads_recipe
from lighthouse_core.data import files, shards
from lighthouse_core.data import prepare as preparing
from lighthouse_core.data.build import build_stream
from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.loader import TokenLoader, build_loader
from lighthouse_core.data.mixture import next_source
from lighthouse_core.data.packing import boundaries
from lighthouse_core.data.prepare import prepare
from lighthouse_core.data.shards import PreparedTokens, ShardWriter, write_index
from lighthouse_core.data.shuffle import ShuffledStream, permuted
from lighthouse_core.data.sources import list_documents
from lighthouse_core.data.stream import TokenStream
from lighthouse_core.data.survey import survey
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, RecipeError
from lighthouse_core.models.labels import IGNORED

BOS, EOS = 256, 257
SEQ = 48
RECIPE = f"""
[model]
dim = 64
layers = 2
heads = 2
head_dim = 32
ffn_dim = 64
vocab_size = 320
[lighthouse]
enabled = false
[training]
seq_len = {SEQ}
global_batch_size = 1
steps = 1
[optimizer]
lr = 1e-3
[data]
packing = "documents"
validation = 0.0
"""
# Bytes of documents: few, around the multiples of 16 and of a sequence, and several sequences.
SIZES = [1, 13, 14, 15, 1, 46, 2, 200, 30, 61, 62, 63, 1, 7, 94, 5, 333, 3, 45, 47]
FILES = {0: range(7), 1: range(7, 14), 2: range(14, 20)}


def content(number):
    return bytes(random.Random(number).choices(range(97, 123), k=SIZES[number]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("packing")
    for number in range(len(SIZES)):
        (root / f"py/{number}").mkdir(parents=True)
        (root / f"py/{number}/a.py").write_bytes(content(number))
    (root / "lines").mkdir()
    for part, numbers in FILES.items():
        text = "".join(f'{{"text": "{content(number).decode()}"}}\n' for number in numbers)
        (root / f"lines/{part}.jsonl").write_text(text)
    (root / "texts").mkdir()
    for number in range(len(SIZES)):
        (root / f"texts/{number}.txt").write_bytes(content(number))
    with pytest.MonkeyPatch.context() as patch:
        # Units then lie in several shards.
        patch.setattr(preparing, "_SMALLEST", 200)
        prepare(recipe(f'source = "files"\npaths = ["{root}/lines/*.jsonl"]'), root / "out", 1, lambda progress: None)
    assert len(list((root / "out").glob("train-*.tokens"))) > 3
    return root


def recipe(data, **change):
    text = RECIPE + data
    for before, after in change.items():
        text = text.replace(before, after)
    return loads_recipe(text)


SOURCES = {
    "bytes": ("python-sources", "py", "documents"),
    "bytes, shuffled": ("python-sources", "py", "samples"),
    "lines": ("files", "lines/*.jsonl", "documents"),
    "parts": ("files", "texts/*.txt", "documents"),
    "tokens": ("tokens", "out", "documents"),
    "tokens, shuffled": ("tokens", "out", "samples"),
}


@pytest.fixture
def source(corpus, monkeypatch):
    """Settings of a kind, where documents come in parts and few of a shard's documents are found without a search."""
    monkeypatch.setattr(files, "_PART", 64)
    monkeypatch.setattr(shards, "_EVERY", 3)
    monkeypatch.setattr(shards, "_DOCUMENTS", 6)

    def settings(kind):
        name, path, shuffle = SOURCES[kind]
        return recipe(f'source = "{name}"\npaths = ["{corpus / path}"]\nshuffle = "{shuffle}"').data

    return settings


def padded_epoch(documents, align, pad):
    """(token, its position) of documents one after another, each followed by padding."""
    packed = []
    for document in documents:
        packed += [(token, place) for place, token in enumerate(document)]
        while len(packed) % align:
            packed.append((pad, -1))
    return packed


def epochs(units, seed, align, pad):
    """The padded tokens of each epoch, for units of documents by their names."""
    for epoch in itertools.count():
        order = sorted(units, key=lambda name: stable_hash("order", seed, epoch, name))
        yield padded_epoch([document for name in order for document in units[name]], align, pad)


def samples_in_order(units, seed, align, pad, seq_len):
    """Samples with the token after them: lists of (token, position)."""
    held = []
    for epoch in epochs(units, seed, align, pad):
        held += epoch
        while len(held) > seq_len:
            yield held[: seq_len + 1]
            held = held[seq_len:]


def samples_shuffled(units, seed, align, pad, seq_len):
    two = itertools.pairwise(epochs(units, seed, align, pad))
    for number, (epoch, after) in enumerate(two):
        count, key = max(1, len(epoch) // seq_len), f"{seed} {number}"
        left = (len(epoch) - count * seq_len) // align
        first = align * (stable_hash("cut", key) % (left + 1 if left >= 0 else len(epoch) // align))
        stream = [*epoch, *after]
        assert len(epoch) >= seq_len
        for index in range(count):
            begin = first + permuted(index, count, key) * seq_len
            yield stream[begin : begin + seq_len + 1]


def packed_batch(rows):
    """What the loader must yield of samples, one token after the other."""
    seq_len, flat = len(rows[0]) - 1, []
    inputs, labels, positions, begins = [], [], [], []
    for row in rows:
        inputs.append([token for token, _ in row[:-1]])
        labels.append([-100 if place in (0, -1) else token for token, place in row[1:]])
        pieces = []
        for token in row[:-1]:
            if not pieces or token[1] == 0:
                pieces.append([])
                begins.append(len(flat))
            pieces[-1].append(token)
            flat.append(token)
        counted = []
        for piece in pieces:
            first = piece[0][1]
            if first + len(piece) > seq_len:
                first = seq_len - len(piece)
            counted += range(first, first + len(piece))
        positions.append(counted)
    ends = [*begins, len(flat)]
    longest, entries = 1, 17
    while longest < max(after - before for before, after in itertools.pairwise(ends)):
        longest *= 2
    while entries < len(ends):
        entries = 2 * (entries - 1) + 1
    ends += [len(flat)] * (entries - len(ends))
    return {"input": inputs, "positions": positions, "documents": (ends, longest)}, labels


def plain(batch):
    inputs, labels = batch
    assert inputs.keys() == {"input", "positions", "documents"}
    starts, longest = inputs["documents"]
    assert inputs["input"].dtype == labels.dtype == torch.int64 and type(longest) is int
    assert inputs["positions"].dtype == starts.dtype == torch.int32
    assert all(one.is_contiguous() for one in (labels, inputs["input"], inputs["positions"], starts))
    found = {"input": inputs["input"].tolist(), "positions": inputs["positions"].tolist()}
    return found | {"documents": (starts.tolist(), longest)}, labels.tolist()


def check_ranks(make, world_size, local_batch_size, expected, steps, done=0):
    """Every rank yields the batches that follow from the expected samples; returns the state after them."""
    for rank in range(world_size):
        one = make(rank, world_size, local_batch_size)
        for step, batch in enumerate(itertools.islice(one, steps)):
            begin = done + (step * world_size + rank) * local_batch_size
            assert plain(batch) == packed_batch(expected[begin : begin + local_batch_size])
    return one.state_dict()


def text_units(kind):
    documents = [[BOS, *content(number), EOS] for number in range(len(SIZES))]
    if kind.startswith("bytes"):
        return {f"py/{number}": [document] for number, document in enumerate(documents)}
    if kind == "parts":
        return {f"texts/{number}.txt": [document] for number, document in enumerate(documents)}
    return {f"lines/{part}.jsonl": [documents[number] for number in numbers] for part, numbers in FILES.items()}


@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_stream_equals_a_packer_of_lists_and_resumes_at_every_batch(source, kind, align):
    data = source(kind)
    cut = samples_shuffled if "shuffled" in kind else samples_in_order
    expected = list(itertools.islice(cut(text_units(kind), 5, align, EOS, SEQ), 70))

    def make(state, rank, world_size, local_batch_size):
        one = build_loader(data, SEQ, local_batch_size, rank, world_size, 5, align=align, prefetch=0)
        if state is not None:
            one.load_state_dict(state)
        return one

    for world_size, local_batch_size in ((1, 1), (1, 2), (2, 1), (3, 2)):
        check_ranks(lambda *of: make(None, *of), world_size, local_batch_size, expected, 60 // world_size // 2)
    one = make(None, 0, 1, 1)
    batches = iter(one)
    for done in range(60):
        state = one.state_dict()
        world_size, local_batch_size = ((1, 1), (2, 1), (3, 2), (1, 2))[done % 4]
        check_ranks(lambda *of, state=state: make(state, *of), world_size, local_batch_size, expected, 1, done)
        next(batches)
    assert one.state_dict()["epoch"] >= 2


@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("kind", [kind for kind in SOURCES if "shuffled" not in kind])
def test_a_cursor_stops_anywhere_and_goes_on_from_there(source, kind, align):
    data, draw = source(kind), random.Random(align)
    packed = list(itertools.chain.from_iterable(itertools.islice(epochs(text_units(kind), 5, align, EOS), 3)))
    stream, _ = build_stream(data, build_tokenizer("bytes"), 5, "train", align=align)
    cursor, place = stream.cursor(stream.start), 0
    while place + 150 < len(packed):
        count = draw.choice([1, 2, 3, 7, 40, 150])
        if draw.random() < 0.3:
            cursor.skip(count)
        else:
            ids, places = cursor.take(count)
            assert (ids.dtype, places.dtype) == (np.int64, np.int32)
            assert list(zip(ids.tolist(), places.tolist(), strict=True)) == packed[place : place + count + 1]
        place += count
        if draw.random() < 0.3:
            cursor = stream.cursor(cursor.position)


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A mixture of rows that are compressed and rows of tables, and the units of each; some rows have no text."""
    monkeypatch.setattr(files, "_PART", 64)
    units = {"lines": {}, "tables": {}}
    for part, numbers in FILES.items():
        for kind, suffix in (("lines", ".jsonl.gz"), ("tables", ".csv")):
            (tmp_path / kind).mkdir(exist_ok=True)
            # The two have no text in common, and different numbers of documents.
            texts = [content(number).decode() for number in numbers][part:]
            texts = texts if kind == "lines" else [text.upper() for text in texts]
            path = tmp_path / f"{kind}/{part}{suffix}"
            if kind == "lines":
                rows = [json.dumps({"text": text}).encode() + b"\n" for text in [*texts[:2], None, *texts[2:], ""]]
                path.write_bytes(b"".join(map(gzip.compress, rows)))
            else:
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows([("n", "text"), *enumerate(texts), (0, "")])
            units[kind][f"{kind}/{part}{suffix}"] = [[BOS, *text.encode(), EOS] for text in texts]
    table = '[[data.sources]]\nsource = "files"\npaths = ["{}/{}/*"]\nweight = {}\nname = "{}"\n'
    sources = "".join(
        table.format(tmp_path, kind, weight, kind) for kind, weight in zip(units, (0.6, 0.4), strict=True)
    )
    return recipe(sources), units


def test_a_mixture_of_compressed_rows_and_tables_equals_the_packer_and_resumes(mixed):
    data, units = mixed[0].data, mixed[1]
    samples = [samples_in_order(part, 5, 4, EOS, SEQ) for part in units.values()]
    expected, counts = [], [0, 0]
    for _ in range(70):
        number = next_source(counts, data.weights, 5)
        counts[number] += 1
        expected.append(next(samples[number]))
    assert counts == [42, 28]

    def make(state, rank, world_size, local_batch_size):
        one = build_loader(data, SEQ, local_batch_size, rank, world_size, 5, align=4, prefetch=0)
        if state is not None:
            one.load_state_dict(state)
        return one

    for world_size, local_batch_size in ((1, 1), (1, 2), (2, 1), (2, 2)):
        check_ranks(lambda *of: make(None, *of), world_size, local_batch_size, expected, 60 // world_size // 2)
    one = make(None, 0, 1, 1)
    batches = iter(one)
    for done in range(60):
        state = one.state_dict()
        world_size, local_batch_size = ((1, 1), (2, 1), (2, 2))[done % 3]
        check_ranks(lambda *of, state=state: make(state, *of), world_size, local_batch_size, expected, 2, done)
        next(batches)
    assert one.state_dict()["source_0_epoch"] >= 1 and one.state_dict()["source_1_epoch"] >= 1
    with pytest.raises(DataError, match=r"data\.packing"):
        build_loader(data, SEQ, 1, 0, 1, 5, align=16).load_state_dict(state)


def test_reports_of_a_mixture_are_of_each_source(mixed, caplog):
    made, units = mixed
    found = survey(made, "train", seconds=60, samples=0)
    lengths = {kind: [len(one) for part in units[kind].values() for one in part] for kind in units}
    assert [(one.source, one.nulls, one.align) for one in found] == [("lines", 6, 1), ("tables", 3, 1)]
    assert [sorted(one.lengths) for one in found] == [sorted(lengths[kind]) for kind in units]
    pooled = made.model_copy(
        update={"lighthouse": recipe("", **PYRAMID, **{f"seq_len = {SEQ}": "seq_len = 96"}).lighthouse}
    )
    tokens = pooled.training.steps * SEQ
    for one, share in zip(survey(pooled, "train", seconds=60, samples=0), (0.6, 0.4), strict=True):
        whole = sum(-(-length // 16) * 16 for length in lengths[one.source])
        assert one.padding == pytest.approx(1 - sum(lengths[one.source]) / whole)
        assert one.epochs == pytest.approx(share * tokens / whole)
    loader = build_loader(made.data, SEQ, 1, 0, 1, 5, align=1)
    for _ in itertools.islice(loader, 60):
        pass
    said = [one.getMessage() for one in caplog.records if "null or empty" in one.getMessage()]
    assert sorted(one.split(":")[0] for one in said) == ["source lines", "source tables"]


def test_the_size_of_a_source_has_no_padding(corpus):
    source = f'[[data.sources]]\nsource = "{{}}"\npaths = ["{corpus}/{{}}"]\nweight = 1\n'
    made = recipe(source.format("tokens", "out") + source.format("python-sources", "py"))
    padded = made.model_copy(
        update={"lighthouse": recipe("", **PYRAMID, **{f"seq_len = {SEQ}": "seq_len = 96"}).lighthouse}
    )
    assert (made.alignment, padded.alignment) == (1, 16)
    tokens, whole = sum(SIZES) + 2 * len(SIZES), sum(-(-(size + 2) // 16) * 16 for size in SIZES)
    for one, after in zip(*(survey(each, "train", seconds=60, samples=0) for each in (made, padded)), strict=True):
        assert (one.tokens, one.size) == (after.tokens, after.size) and one.tokens == tokens
        assert (one.epochs, after.epochs) == pytest.approx((SEQ / 2 / tokens, SEQ / 2 / whole))


class Numbers:
    """A tokenizer of which each token of a test's documents is another one; documents have no BOS."""

    vocab_size, bos_id, eos_id, fingerprint = 70_000, None, 69_999, 5


def write_shards(folder, lengths, units, shard):
    """Documents of these lengths, so many to a unit and to a shard; {unit: documents}, whose tokens count on."""
    ids, listed, contents, written = itertools.count(), [], {}, []
    writer = None
    for number, length in enumerate(lengths):
        if number % shard == 0:
            if writer is not None:
                written.append(list(writer.publish()))
            writer = ShardWriter(folder / f"train-{len(written)}.tokens", Numbers())
        name = f"unit {number // units}"
        document = [next(ids) for _ in range(length)]
        writer.add(np.array(document, dtype=np.int32))
        contents.setdefault(name, []).append(document)
        if not listed or listed[-1][0] != name:
            listed.append([name, []])
        parts = listed[-1][1]
        if not parts or parts[-1][0] != len(written):
            parts.append([len(written), 0, 0])
        parts[-1][1] += 1
        parts[-1][2] += length
    written.append(list(writer.publish()))
    empty = {"shards": [], "units": []}
    splits = {"train": {"shards": written, "units": listed}, "validation": empty}
    write_index(folder, {"fingerprint": 1, "tokenizer": 5, "vocab_size": 70_000, "validation": 0.0, "splits": splits})
    return contents


def numbers_loader(folder, align, seq_len, shuffled, rank=0, world_size=1, local_batch_size=1):
    stream = TokenStream(PreparedTokens(folder, Numbers()).units("train", align), 3, align)
    return TokenLoader(
        ShuffledStream(stream, seq_len) if shuffled else stream,
        names=["numbers"],
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        rank=rank,
        world_size=world_size,
        fingerprint=1,
        restart=False,
        documents=True,
        prefetch=0,
    )


LENGTHS = st.lists(st.integers(1, 9) | st.integers(1, 200), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([1, 4, 16]),
    st.integers(1, 6),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_lengths_in_any_shards(tmp_path_factory, lengths, align, sequence, ranks, shuffled, units, shard):
    folder, seq_len = tmp_path_factory.mktemp("shards"), sequence * align
    contents = write_shards(folder, lengths, units, shard)
    length = len(padded_epoch(itertools.chain.from_iterable(contents.values()), align, 0))
    cut = samples_shuffled if shuffled and length >= seq_len else samples_in_order
    world_size, local_batch_size = ranks
    steps = 1 + min(40, 2 * length // seq_len) // world_size // local_batch_size
    count = steps * world_size * local_batch_size
    expected = list(itertools.islice(cut(contents, 3, align, Numbers.eos_id, seq_len), count))
    check_ranks(
        lambda *of: numbers_loader(folder, align, seq_len, cut is samples_shuffled, *of), *ranks, expected, steps
    )


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.sampled_from([1, 4, 16]), st.integers(1, 6), st.integers(1, 3))
def test_an_epoch_has_every_token_once_and_every_label_once(tmp_path_factory, lengths, align, sequence, world_size):
    folder, seq_len = tmp_path_factory.mktemp("shards"), sequence * align
    contents = write_shards(folder, lengths, 4, 7)
    documents = list(itertools.chain.from_iterable(contents.values()))
    length = numbers_loader(folder, align, seq_len, False).stream.length
    assert length == sum(-(-len(document) // align) * align for document in documents)
    steps = -(-length // seq_len // world_size)
    samples = {}
    for rank in range(world_size):
        one = numbers_loader(folder, align, seq_len, False, rank, world_size)
        for step, (inputs, labels) in enumerate(itertools.islice(one, steps)):
            samples[step * world_size + rank] = torch.stack([inputs["input"][0], labels[0]])
    # The last sample may go on in the next epoch.
    inputs, labels = torch.cat([samples[i] for i in sorted(samples)], dim=1)[:, :length].tolist()
    real = Counter(token for token in inputs if token != Numbers.eos_id)
    assert real == Counter(itertools.chain.from_iterable(documents))
    asked = Counter(label for label in labels if label != IGNORED)
    assert asked == Counter(itertools.chain.from_iterable(document[1:] for document in documents))
    assert all(label in (IGNORED, token + 1) for token, label in zip(inputs, labels, strict=True))


def test_text_shorter_than_a_sample_is_repeated_and_stays_aligned(tmp_path):
    write_shards(tmp_path, [3, 9, 2], 1, 9)
    one = numbers_loader(tmp_path, 4, 64, shuffled=True)
    assert one.stream.stream.length == 20
    begun = set()
    for inputs, _ in itertools.islice(one, 12):
        begins = inputs["documents"].starts.unique().tolist()
        assert all(begin % 4 == 0 for begin in begins) and len(begins) > 9
        begun.add(int(inputs["input"][0, 0]))
    assert len(begun) > 2


def test_boundaries():
    positions = np.array([[3, 4, 0, 1], [2, 3, 4, 5], [0, 0, -1, 0]])
    found = boundaries(positions)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 2, 4, 8, 9, 11] + 11 * [12]
    assert boundaries(np.array([[7]])).tolist() == [0] + 16 * [1]
    for documents, entries in ((15, 17), (16, 17), (17, 33), (32, 33), (33, 65)):
        found = boundaries(np.zeros((1, documents), dtype=np.int32))
        assert found.tolist() == [*range(documents), *[documents] * (entries - documents)]


def test_the_ignored_label_is_that_of_the_loss():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


def test_validation_begins_anew_with_the_same_packing(source):
    data = source("bytes").model_copy(update={"validation": 0.5})
    one = build_loader(data, SEQ, 1, 0, 1, 0, "validation", align=4)
    first, again = ([plain(batch) for batch in itertools.islice(one, 5)] for _ in range(2))
    assert first == again and any(IGNORED in row for _, labels in first for row in labels)


def test_packing_and_alignment_are_part_of_what_a_checkpoint_holds_for(source):
    data, tokenizer = source("bytes"), build_tokenizer("bytes")
    listing = stable_hash(
        *((one.identity, *((file.name, file.size) for file in one.files)) for one in list_documents(data.paths))
    )
    # What checkpoints of before there was a choice have.
    before = stable_hash("stream", False, listing, tokenizer.fingerprint, "train", 0.0, False)
    found = [build_stream(data, tokenizer, 0, "train", align=align)[1] for align in (None, 1, 4)]
    assert found[0] == before and len(set(found)) == 3
    state = build_loader(data, SEQ, 1, 0, 1, 0).state_dict()
    for align in (1, 4):
        with pytest.raises(DataError, match="data changed"):
            build_loader(data, SEQ, 1, 0, 1, 0, align=align).load_state_dict(state)


PYRAMID = {"enabled = false": "pooling = 4\nlevels = 3\ntopk = 2\ntile_parents = 2\nwindow = 8"}


def test_the_method_decides_the_alignment():
    concat = {'"documents"': '"concat"'}
    assert recipe("").alignment == 1 and recipe("", **concat).alignment is None
    assert recipe("", **PYRAMID, **{f"seq_len = {SEQ}": "seq_len = 96"}).alignment == 16
    sliding = {"enabled = false": 'method = "sliding"\nwindow = 8'}
    assert recipe("", **sliding).alignment == 1
    longer = {f"seq_len = {SEQ}": "seq_len = 100"}
    assert recipe("", **PYRAMID, **concat, **longer).alignment is None
    with pytest.raises(RecipeError, match=r"seq_len \(100\) .* the 16 tokens .* nearest is 96 or 112"):
        recipe("", **PYRAMID, **longer)
    # Runs that are to see the same sequences have the same one.
    aligned = {'packing = "documents"': 'packing = "documents"\nalign = 32'}
    wide = {f"seq_len = {SEQ}": "seq_len = 96"}
    assert recipe("", **aligned, **wide).alignment == recipe("", **PYRAMID, **aligned, **wide).alignment == 32
    with pytest.raises(RecipeError, match=r"align \(8\) must be a multiple of .* 16 tokens"):
        recipe("", **PYRAMID, **{key: value.replace("32", "8") for key, value in aligned.items()}, **wide)
    with pytest.raises(RecipeError, match="align is for"):
        recipe("", **{'packing = "documents"': 'packing = "concat"\nalign = 32'})
    narrow = PYRAMID["enabled = false"].replace("levels = 3", "levels = 6").replace("pooling = 4", "pooling = 2")
    with pytest.raises(RecipeError, match=r"nearest is 32$"):
        recipe("", **{"enabled = false": narrow, f"seq_len = {SEQ}": "seq_len = 30"})


def test_a_run_keeps_its_packing_in_its_recipe():
    """Whatever new recipes have by default."""
    for packing in ("concat", "documents"):
        dumped = dump_recipe(recipe("", **{'"documents"': f'"{packing}"'}))
        assert f'packing = "{packing}"' in dumped and loads_recipe(dumped).data.packing == packing


@pytest.mark.parametrize("kind", ["bytes", "lines", "tokens"])
def test_a_survey_counts_padding_and_ignored_labels(corpus, kind):
    name, path, _ = SOURCES[kind]
    data = f'source = "{name}"\npaths = ["{corpus / path}"]'
    pooled = {**PYRAMID, f"seq_len = {SEQ}": "seq_len = 96"}
    for change, align, seq_len in (({}, 1, SEQ), (pooled, 16, 96)):
        [found] = survey(recipe(data, **change), "train", seconds=60, samples=3)
        documents = [[BOS, *content(number), EOS] for number in range(len(SIZES))]
        places = [place for _, place in padded_epoch(documents, align, EOS)]
        assert found.complete and sorted(found.lengths) == sorted(size + 2 for size in SIZES)
        assert found.align == align and found.longer == sum(size + 2 > seq_len for size in SIZES)
        assert found.padding == pytest.approx(places.count(-1) / len(places))
        assert found.ignored == pytest.approx((places.count(-1) + places.count(0)) / len(places))
        assert all(any(content(number).startswith(one.encode()) for number in range(20)) for one in found.samples)


def test_a_shard_whose_documents_are_not_those_of_its_index_is_refused(tmp_path):
    write_shards(tmp_path, [5, 6, 7, 8], 2, 4)
    path = tmp_path / "train-0.tokens"
    whole = path.read_bytes()
    # The second unit begins with the third document, at token 11.
    path.write_bytes(whole[:-16] + (12).to_bytes(8, "little") + whole[-8:])
    with pytest.raises(DataError, match="not those of the index"):
        numbers_loader(tmp_path, 4, 8, False)
