import hashlib
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse_core.config import load_recipe
from lighthouse_core.config.data import DataSection
from lighthouse_core.data.build import build_stream, shuffles
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import prepare
from lighthouse_core.data.shuffle import permuted
from lighthouse_core.data.sources import Document, list_documents
from lighthouse_core.data.stream import BytesUnit, Position
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import DataError

BOS, EOS = 256, 257
# Names and sizes: most much shorter than a sample, one longer than many; not all UTF-8.
FILES = {f"{i}/a.py": bytes((7 * i + j) % 256 for j in range(1 + i % 5)) for i in range(20)} | {
    "long/a.py": bytes(range(256)) * 2,
    "utf8/a.py": "ключ = 'é'\n".encode(),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "src"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(content)
    return DataSection(paths=[str(root)], shuffle="documents", validation=0.2)


def loader(data, seq_len=16, local_batch_size=1, rank=0, world_size=1, seed=0, split="train"):
    return build_loader(data, seq_len, local_batch_size, rank, world_size, seed, split)


def slow_hash(*parts):
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") // 2


def slow_stream(seed=0, validation=0.2, split="train"):
    """The endless token stream from FILES, one document after another, with no positions at all."""
    documents = {f"src/{name.removesuffix('/a.py')}": content for name, content in FILES.items()}
    held_out = {name for name in documents if slow_hash("heldout", name) < validation * 2**63}
    kept = held_out if split == "validation" else documents.keys() - held_out
    for epoch in itertools.count():
        for name in sorted(kept, key=lambda name: slow_hash("order", str(seed), str(epoch), name)):
            yield from (BOS, *documents[name], EOS)


def slow_samples(count, seq_len, **stream):
    tokens = list(itertools.islice(slow_stream(**stream), count * seq_len + 1))
    return [tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]


def rows(batch):
    inputs, labels = batch[0]["input"], batch[1]
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    return torch.cat([inputs, labels[:, -1:]], dim=1).tolist()


def first_sample(one):
    """Global index of the first row of the batch last taken from a loader."""
    return one.state_dict()["samples"] - (one.world_size - one.rank) * one.local_batch_size


def global_rows(loaders, steps):
    """Samples by global index from `steps` micro-batches of all ranks."""
    samples = {}
    for one in loaders:
        for batch in itertools.islice(one, steps):
            samples |= dict(enumerate(rows(batch), first_sample(one)))
    return samples


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seq_len", [1, 7, 16, 100, 5000])
def test_stream_equals_a_slow_construction(data, seq_len, split):
    count = max(3, 3000 // seq_len)
    samples = global_rows([loader(data, seq_len, seed=3, split=split)], count)
    # Validation has an order of its own, whatever the seed.
    expected = slow_samples(count, seq_len, seed=3 if split == "train" else 0, split=split)
    assert samples == dict(enumerate(expected))


def test_batches_are_int64_and_writing_inputs_leaves_labels(data):
    inputs, labels = next(iter(loader(data, 16, local_batch_size=3)))
    assert inputs["input"].shape == labels.shape == (3, 16)
    assert inputs["input"].dtype == labels.dtype == torch.int64
    before = labels.clone()
    inputs["input"].zero_()
    assert torch.equal(labels, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_ranks_and_batch_sizes_share_one_order_of_samples(data, seq_len, world_size, local_batch_size, seed):
    steps = 4
    loaders = [loader(data, seq_len, local_batch_size, rank, world_size, seed) for rank in range(world_size)]
    count = steps * world_size * local_batch_size
    assert global_rows(loaders, steps) == dict(enumerate(slow_samples(count, seq_len, seed=seed)))
    states = [one.state_dict() for one in loaders]
    assert all(state == states[0] for state in states) and states[0]["samples"] == count


def test_resume_at_any_step_and_world_size_equals_uninterrupted(data):
    expected = dict(enumerate(slow_samples(36, 40)))
    one = loader(data, 40)
    batches = iter(one)
    for done in range(24):
        state = one.state_dict()
        for world_size, local_batch_size in [(1, 1), (2, 1), (3, 2), (1, 4)]:
            resumed = [loader(data, 40, local_batch_size, rank, world_size) for rank in range(world_size)]
            for other in resumed:
                other.load_state_dict(state)
            later = global_rows(resumed, 2)
            assert later == {i: expected[i] for i in range(done, done + 2 * world_size * local_batch_size)}
        assert rows(next(batches)) == [expected[done]]


def test_position_of_many_ranks_continues_on_one(data):
    many = [loader(data, 40, 2, rank, 3) for rank in range(3)]
    before = global_rows(many, 3)
    one = loader(data, 40)
    one.load_state_dict(many[2].state_dict())
    assert before | global_rows([one], 5) == dict(enumerate(slow_samples(23, 40)))


def test_position_is_that_of_the_batch_last_yielded_by_any_iterator(data):
    one = loader(data)
    next(iter(one))
    next(iter(one))
    assert one.state_dict()["samples"] == 2


def test_state_is_plain_integers_and_survives_torch_dcp(data, tmp_path):
    one = loader(data, 50, 2)
    list(itertools.islice(one, 9))
    state = one.state_dict()
    assert state.keys() == {"samples", "epoch", "document", "offset", "seq_len", "seed", "fingerprint"}
    assert all(type(value) is int and 0 <= value < 2**63 for value in state.values())
    dcp.save({"dataloader": one}, checkpoint_id=tmp_path / "c", no_dist=True)
    other = loader(data, 50, 2)
    dcp.load({"dataloader": other}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert other.state_dict() == state
    assert rows(next(iter(other))) == rows(next(iter(one)))


def test_epochs_roll_over_in_another_order(data):
    tokens = np.array(list(itertools.chain.from_iterable(row[:-1] for row in slow_samples(2600, 1))))
    streamed = np.concatenate([batch[0]["input"][0].numpy() for batch in itertools.islice(loader(data, 1), 2600)])
    assert np.array_equal(tokens, streamed)
    documents = [
        part[: np.argmax(part == EOS)].tobytes() for part in np.split(streamed, np.where(streamed == BOS)[0])[1:]
    ]
    count = len(loader(data).stream.units)
    first, second = documents[:count], documents[count : 2 * count]
    assert sorted(first) == sorted(second) and first != second
    one = loader(data, 1)
    epochs = [one.state_dict()["epoch"] for _ in itertools.islice(one, 2600)]
    assert epochs[0] == 0 and epochs[-1] >= 2 and sorted(epochs) == epochs


def test_seeds_give_other_orders_of_training_but_one_of_validation(data):
    assert rows(next(iter(loader(data, 64, seed=1)))) != rows(next(iter(loader(data, 64, seed=2))))
    validation = [rows(next(iter(loader(data, 64, seed=seed, split="validation")))) for seed in (1, 2)]
    assert validation[0] == validation[1]


def test_validation_begins_anew_with_each_iterator(data):
    one = loader(data, split="validation")
    assert global_rows([one], 3) == global_rows([one], 3)


def test_seeking_reads_nothing_and_a_rank_reads_only_its_samples(data, monkeypatch):
    read = []
    original = Document.read

    def recorded(self, *part):
        # The threads of earlier tests' loaders may still be reading ahead.
        if threading.current_thread() is threading.main_thread():
            read.append(self.identity)
        return original(self, *part)

    monkeypatch.setattr(Document, "read", recorded)
    one = build_loader(data, 1, 1, 5, 2000, 0, prefetch=0)
    one.load_state_dict(one.state_dict() | {"samples": 10**9, "epoch": 10**6, "document": 3, "offset": 1})
    assert read == []
    next(iter(one))
    assert 1 <= len(read) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seq_len": 32}, "seq_len = 16, not 32"), ({"seed": 1}, "seed = 0, not 1")],
)
def test_a_position_of_another_stream_is_refused(data, change, message):
    state = loader(data).state_dict()
    with pytest.raises(DataError, match=message) as error:
        loader(data, **change).load_state_dict(state)
    assert error.value.hint


def test_changed_data_is_refused_on_resume(data):
    state = loader(data).state_dict()
    other = data.model_copy(update={"validation": 0.0})
    with pytest.raises(DataError, match="data changed"):
        loader(other).load_state_dict(state)


def test_a_file_that_grows_during_the_run_is_an_error_not_a_shift(data, tmp_path):
    (tmp_path / "src").mkdir()
    path = tmp_path / "src/a.py"
    path.write_bytes(b"abc")
    data = data.model_copy(update={"paths": [str(path.parent)], "validation": 0.0})
    one = loader(data, 4)
    path.write_bytes(b"abcd")
    with pytest.raises(DataError, match="changed from 3 to 4 bytes"):
        next(iter(one))


@pytest.mark.parametrize(("validation", "split"), [(0.0, "validation"), (0.999999, "train")])
def test_an_empty_split_is_the_users_error(data, validation, split):
    with pytest.raises(DataError, match=f"for {split}") as error:
        loader(data.model_copy(update={"validation": validation}), split=split)
    assert "data.validation" in error.value.hint


@pytest.fixture
def shuffled(data):
    return data.model_copy(update={"shuffle": "samples"})


def cuts(stream, epoch, seq_len):
    """Every way to cut an epoch into as many whole samples as there can be."""
    count, left = divmod(stream.length, seq_len)
    tokens, places = stream.read(Position(epoch), stream.length + 1)
    for first in range(left + 1):
        starts = range(first, first + count * seq_len, seq_len)
        yield [(tokens[i : i + seq_len + 1].tolist(), places[i : i + seq_len].tolist()) for i in starts]


def epoch_samples(one):
    """(tokens, positions) of the samples of the epoch that a loader is at."""
    found = []
    for inputs, labels in itertools.islice(one, one.stream.samples):
        found.append((rows((inputs, labels))[0], inputs["positions"][0].tolist()))
    return found


@pytest.mark.parametrize("seq_len", [1, 16, 23, 300])
def test_shuffled_samples_are_the_same_ones_in_another_order(shuffled, seq_len):
    one = loader(shuffled, seq_len, seed=3)
    stream = one.stream.stream
    assert one.stream.samples == stream.length // seq_len
    for epoch in range(3):
        samples = epoch_samples(one)
        consecutive = [cut for cut in cuts(stream, epoch, seq_len) if sorted(cut) == sorted(samples)]
        assert len(consecutive) == 1
        assert len(samples) < 5 or samples != consecutive[0]
        assert one.state_dict()["epoch"] == epoch + 1 and one.state_dict()["sample"] == 0


@pytest.fixture
def one_document(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.py").write_bytes(bytes(i // 256 if i % 2 else i % 256 for i in range(1017)))
    return DataSection(paths=[str(tmp_path / "a")], validation=0.0)


def test_the_samples_of_one_document_differ_from_epoch_to_epoch(one_document):
    """With one document nothing but the shuffle depends on seed and epoch."""

    def epochs(seed, count=6):
        one = loader(one_document, 100, seed=seed)
        return [epoch_samples(one) for _ in range(count)]

    first = epochs(1)
    assert first == epochs(1) and first != epochs(2)
    orders = [[places[0] for _, places in epoch] for epoch in first]
    assert len({tuple(order) for order in orders}) == 6
    # 1019 tokens, 10 samples: the 19 that are left are not always the last.
    assert len({min(order) for order in orders}) > 2
    orders = [tuple(np.argsort(order)) for order in orders]
    assert len(set(orders)) == 6


def test_samples_of_prepared_tokens_are_shuffled(one_document, tmp_path):
    recipe = load_recipe("recipes/quickstart.toml")
    recipe = recipe.model_copy(update={"data": one_document})
    prepare(recipe, tmp_path / "tokens", 1, lambda progress: None)
    data = DataSection(source="tokens", paths=[str(tmp_path / "tokens")], validation=0.0)
    direct, prepared = loader(one_document, 100), loader(data, 100)
    for _ in range(3):
        assert epoch_samples(direct) == epoch_samples(prepared)


def test_reading_a_part_of_a_document_opens_no_other_file(tmp_path):
    for name, content in (("a", b"012"), ("b", b"3456"), ("c", b"789")):
        (tmp_path / f"{name}.py").write_bytes(content)
    (document,) = list_documents([str(tmp_path)])
    for first, count in itertools.product(range(11), range(12)):
        assert document.read(first, count) == b"0123456789"[first : first + count]
    assert document.read() == b"0123456789" and document.read(4) == b"456789"
    unit = BytesUnit(document, BytesTokenizer())
    for first, count in itertools.product(range(12), range(1, 14)):
        tokens, places = unit.open()(first, count)
        assert tokens.tolist() == [BOS, *b"0123456789", EOS][first : first + count]
        assert places.tolist() == list(range(12))[first : first + count]
    (tmp_path / "b.py").unlink()
    assert document.read(0, 3) == b"012" and document.read(7) == b"789"
    with pytest.raises(DataError, match="cannot read"):
        document.read(2, 2)


def test_shuffled_samples_on_any_ranks_and_after_any_resumption(shuffled):
    expected = global_rows([loader(shuffled, 20)], 150)
    many = [loader(shuffled, 20, 2, rank, 3) for rank in range(3)]
    assert global_rows(many, 9) == {i: expected[i] for i in range(54)}
    for done in range(54, 140, 17):
        one = loader(shuffled, 20)
        one.load_state_dict(many[2].state_dict())
        list(itertools.islice(one, done - 54))
        two = [loader(shuffled, 20, 1, rank, 2) for rank in range(2)]
        for other in two:
            other.load_state_dict(one.state_dict())
        assert global_rows(two, 5) == {i: expected[i] for i in range(done, done + 10)}


def test_text_shorter_than_a_sample_is_repeated_from_anywhere(one_document):
    one = loader(one_document, 5000)
    assert one.stream.samples == 1
    found = [epoch_samples(one)[0] for _ in range(4)]
    assert len({places[0] for _, places in found}) > 2
    for _, places in found:
        assert places == [(places[0] + i) % 1019 for i in range(5000)]


def test_one_order_does_not_go_on_in_the_other(data, shuffled):
    for before, after in ((data, shuffled), (shuffled, data)):
        with pytest.raises(DataError, match="data changed"):
            loader(after).load_state_dict(loader(before).state_dict())


@pytest.mark.parametrize("count", [*range(1, 40), 64, 100, 1000])
def test_a_permutation(count):
    orders = [[permuted(i, count, key) for i in range(count)] for key in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 8:
        assert len({tuple(order) for order in orders}) == 3


def test_a_permutation_of_many_mixes():
    count = 10**12 + 7
    places = np.array([permuted(i, count, "key") for i in range(2000)])
    assert len(set(places.tolist())) == 2000 and places.max() < count
    # Neighbours fall anywhere: each tenth of the range has about as many, and distances are those of chance, a third.
    assert np.histogram(places, 10, (0, count))[0].min() > 140
    assert abs(np.abs(np.diff(places / count)).mean() - 1 / 3) < 0.03


def test_samples_are_shuffled_only_where_token_counts_are_known():
    for source in ("files", "hf"):
        with pytest.raises(ValueError, match="token counts"):
            DataSection(source=source, shuffle="samples")
    pieces = SimpleNamespace(fingerprint=1)
    with pytest.raises(DataError, match="token counts") as error:
        build_stream(DataSection(shuffle="samples"), pieces, 0, "train")
    assert "data prepare" in error.value.hint
    stream, _ = build_stream(DataSection(), pieces, 0, "train")
    assert not shuffles(DataSection(), stream)
