"""A whole Llama, checkpointed, compiled and sharded, against the same one as it is."""

import contextlib
import weakref
import zlib

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse_core import LighthouseConfig, select_indices
from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.config import load_recipe
from lighthouse_core.models.decoder import Decoder, DecoderArgs, attention_layers, use_lighthouse
from lighthouse_core.titan import build_job
from lighthouse_core.titan.parallelize import kept_results, parallelize, use_plain_sums

from torchtitan.distributed import ParallelDims  # isort: skip
from torchtitan.models.llama3.infra.parallelize import apply_fsdp  # isort: skip

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# On a GPU all of it is the GPU's.
pytestmark = [pytest.mark.gpu] if CUDA else []
TOKENS = 64
CONTEXT = AttentionContext(selection_keys(seed=1, step=2, sample=4, layers=2).to(DEVICE))
# The interpreter takes seconds a call; a few are enough there.
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.gpu)]
SIZE = ["model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.ffn_dim=48"]


def config(**settings):
    return LighthouseConfig(pooling=2, levels=3, topk=4, tile_parents=4, dense_backend="math", **settings)


def recipe(*settings):
    return load_recipe("recipes/quickstart.toml", [*SIZE, "model.vocab_size=259", "model.dense_layers=[0]", *settings])


def model(cfg):
    args = DecoderArgs.of(recipe().model, TOKENS, seed=3)
    with torch.device(DEVICE):
        built = Decoder(args)
    use_lighthouse(built, cfg, [0])
    with torch.no_grad():
        built.init_weights()
    return built


def as_type(built, dtype):
    """The model cast as a whole, but for its angles."""
    angles = built.freqs_cis
    built.to(getattr(torch, dtype)).freqs_cis = angles
    return built


def tokens():
    return torch.randint(257, (2, TOKENS), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def results(built, batch=None):
    batch = tokens() if batch is None else batch
    loss = torch.nn.functional.cross_entropy(
        built(batch, context=CONTEXT).float().flatten(0, 1), batch.flatten().roll(-1)
    )
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in built.parameters()]


def prepared(cfg, tmp_path, mode, compiled):
    job = build_job(recipe(f'training.activation_checkpointing="{mode}"'), tmp_path, steps=1)
    job.compile.enable = compiled
    job.compile.backend = "inductor" if CUDA else "aot_eager"
    return parallelize(model(cfg), ParallelDims(1, 1, 1, 1, 1, 1, 1, 1), job, [cfg])


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def modes(*quick, modes=("none", "selective", "attention", "full")):
    """(mode, compiled): each mode eager, those of `quick` compiled, and in the slow tests all."""
    return [
        pytest.param(
            mode,
            compiled,
            id=f"{mode}-{'compiled' if compiled else 'eager'}",
            marks=[pytest.mark.slow] * (compiled and mode not in quick),
        )
        for compiled in (False, True)
        for mode in modes
    ]


@pytest.mark.parametrize("backend", BACKENDS)
# Selective checkpointing is compiled with shards below.
@pytest.mark.parametrize(("mode", "compiled"), modes("none", "full", modes=("none", "selective", "full")))
def test_checkpointing_and_compiling_change_nothing(tmp_path, mode, compiled, backend):
    """Blocks are compiled with fullgraph=True, so that a graph break fails."""
    cfg = config(backend=backend, scorer="norm" if mode != "none" else "block")
    loss, grads = results(model(cfg))
    got, got_grads = results(prepared(cfg, tmp_path, mode, compiled))
    torch.testing.assert_close(got, loss)
    for ours, theirs in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Count(TorchDispatchMode):
    """Calls of our operations."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lighthouse":
            name = function.__name__.removesuffix(".default")
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "gathered"), [("none", 1), ("selective", 1), ("attention", 1), ("full", 2)])
def test_a_selection_is_made_once(tmp_path, mode, gathered):
    cfg = config(backend="triton")
    built = prepared(cfg, tmp_path, mode, compiled=False)
    with Count() as count:
        results(built, tokens()[:1, :32])
    assert count.calls["select"] == 1
    assert count.calls["gather"] == gathered


@pytest.mark.parametrize(
    ("score", "mode", "compiled"),
    [
        pytest.param(score, *case.values, id=f"{score}-{case.id}", marks=case.marks)
        for score, quick in (("mean", ("attention", "full")), ("random", ("selective",)))
        for case in modes(*quick)
    ],
)
def test_blocks_are_chosen_once(tmp_path, mode, score, compiled):
    cfg = LighthouseConfig(method="blocks", window=9, tile=8, block_size=4, blocks=2, block_score=score)
    loss, grads = results(model(cfg))
    built = prepared(cfg, tmp_path, mode, compiled)
    with Count() if not compiled else contextlib.nullcontext() as count:
        got, got_grads = results(built)
    torch.testing.assert_close(got, loss)
    for ours, theirs in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    if not compiled:
        assert count.calls["best_blocks"] == 1


QWEN = ['model.family="qwen3"', "model.tied_embeddings=true"]


def qwen(cfg, tmp_path=None, mode="none", compiled=False):
    """A Qwen3 with tied embeddings and weights that exist; prepared for training as the trainer does, in that order."""

    def initial(name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = shapes[name]
        return torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)

    section = recipe(*QWEN).model
    shapes = {entry.source: entry.shape for entry in section.kind.entries(section)}
    with torch.device(DEVICE):
        built = Decoder(DecoderArgs.of(section, TOKENS), initial)
    use_lighthouse(built, cfg, [0])
    if tmp_path is not None:
        job = build_job(recipe(*QWEN, f'training.activation_checkpointing="{mode}"'), tmp_path, steps=1)
        job.compile.enable = compiled
        job.compile.backend = "inductor" if CUDA else "aot_eager"
        built = parallelize(built, ParallelDims(1, 1, 1, 1, 1, 1, 1, 1), job, [cfg])
    with torch.no_grad():
        built.init_weights()
    return built


# Of a Llama every mode is compiled above.
@pytest.mark.parametrize(("mode", "compiled"), modes("selective"))
def test_nor_of_a_model_that_norms_its_heads(tmp_path, mode, compiled):
    """Also the names by which weights that exist are asked for."""
    cfg = config(backend="reference")
    loss, grads = results(qwen(cfg))
    got, got_grads = results(qwen(cfg, tmp_path, mode, compiled))
    torch.testing.assert_close(got, loss)
    for ours, theirs in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# Of a Llama every mode is counted above.
@pytest.mark.parametrize("mode", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("none", "selective")), "full"])
def test_its_selection_is_made_once(tmp_path, mode):
    with Count() as count:
        results(qwen(config(backend="triton"), tmp_path, mode), tokens()[:1, :32])
    assert count.calls["select"] == 1


def test_weights_that_exist_are_in_memory_one_at_a_time(tmp_path, process_group):
    built = qwen(config(backend="reference"))
    mesh = torch.distributed.init_device_mesh(DEVICE, (1,), mesh_dim_names=("fsdp",))
    fully_shard(built, mesh=mesh)
    read, alive, most = built.initial, [0], []

    def initial(name):
        most.append(alive[0])
        tensor = read(name)
        alive[0] += 1
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    built.initial = initial
    with torch.no_grad():
        built.init_weights()
    assert len(most) > 20 and set(most) == {0}


def test_its_selection_is_by_the_norms_before_they_are_levelled():
    cfg = config(backend="reference")
    built = qwen(cfg)
    projected, called = {}, []
    attention = attention_layers(built)[1]
    for name in ("wq", "wk"):
        getattr(attention, name).register_forward_hook(
            lambda module, inputs, out, name=name: projected.update({name: out})
        )
    attention.inner_attention.register_forward_pre_hook(
        lambda module, inputs, given: called.append((inputs, given)), with_kwargs=True
    )
    with torch.no_grad():
        built(tokens(), context=CONTEXT)
    ((q, k, v, _), given) = called[0]
    raw = [projected[name].unflatten(-1, (-1, 8)).float() for name in ("wq", "wk")]
    for found, expected in zip(given["scores"], raw, strict=True):
        torch.testing.assert_close(found, expected.pow(2).sum(-1).sqrt())
    used = select_indices(q, k, cfg, v=v, scores=given["scores"])
    assert torch.equal(used, select_indices(raw[0], raw[1], cfg))
    assert not torch.equal(used, select_indices(q, k, cfg, v=v))


def test_what_is_kept():
    ops = torch.ops.lighthouse
    full = kept_results("full", [config(backend="triton")], DEVICE)
    assert full == {ops.select.default, ops.select_drawn.default}
    selective = kept_results("selective", [config(backend="triton")], DEVICE)
    aten = torch.ops.aten
    assert selective > full | {ops.gather.default, ops.flash4.default, aten.mm.default}
    assert aten._scaled_dot_product_cudnn_attention.default in selective
    assert aten._scaled_dot_product_flash_attention.default in selective
    attention = kept_results("attention", [config(backend="triton")], DEVICE)
    assert full | {ops.gather.default, ops.flash4.default} < attention < selective
    assert aten.mm.default not in attention
    assert kept_results("full", [], DEVICE) == set()


@pytest.fixture
def process_group(tmp_path):
    group = torch.distributed
    group.init_process_group("nccl" if CUDA else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    group.destroy_process_group()


@pytest.mark.parametrize(("dtype", "sharded"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_one_process_computes_in_the_type_of_the_recipe(tmp_path, process_group, dtype, sharded):
    """By FSDP, as several do; the loss is then that of the whole model cast."""
    cfg = config(scorer="block", backend="reference")
    job = build_job(recipe(f'training.dtype="{dtype}"'), tmp_path, steps=1)
    built = parallelize(model(cfg), ParallelDims(1, 1, 1, 1, 1, 1, 1, 1), job, [cfg])
    assert isinstance(built, FSDPModule) is sharded
    labels = tokens().roll(-1, 1)
    rotated_by = []
    for layer in attention_layers(built):
        layer.register_forward_pre_hook(lambda layer, inputs: rotated_by.append(inputs[1]))
    loss = built(tokens(), labels=labels, context=CONTEXT)
    loss.backward()
    # Cosines and sines keep their precision.
    assert all(torch.equal(turns.view(torch.float32), built.freqs_cis) for turns in rotated_by)
    assert len(rotated_by) == 2
    plain = as_type(model(cfg), dtype)
    logits = plain(tokens(), context=CONTEXT).float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-2 if sharded else 1e-5, atol=0)
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in built.parameters())
    with torch.no_grad():
        assert built(tokens(), context=CONTEXT).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_parameters_in_mixed_precision(tmp_path, process_group, backend, compiled):
    """bfloat16 parameters and activations, float32 gradients, against the same model cast as a whole."""
    cfg = config(backend=backend, scorer="block")
    loss, grads = results(as_type(model(cfg), "bfloat16"))
    built = prepared(cfg, tmp_path, "selective", compiled)
    mesh = torch.distributed.init_device_mesh(DEVICE, (1,), mesh_dim_names=("fsdp",))
    apply_fsdp(built, mesh, torch.bfloat16, torch.float32, pp_enabled=False)
    use_plain_sums(built)
    got, got_grads = results(built)
    torch.testing.assert_close(got, loss, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(got_grads, grads, strict=True):
        assert ours.dtype == torch.float32
        difference = (ours.full_tensor() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 0.05


@pytest.mark.parametrize(("version", "mended"), [("2.11.0+cu130", True), ("2.12.0", False)])
def test_a_tiling_that_does_not_fit_is_passed_over(version, mended, tmp_path, monkeypatch):
    """torch 2.11 raises it without arguments, and to catch it there it has to be one."""
    from torch._inductor.codegen.simd import CantSplit

    monkeypatch.setattr(CantSplit.__init__, "__defaults__", None)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    prepared(config(), tmp_path, "none", compiled=True)
    with pytest.raises(CantSplit if mended else TypeError):
        raise CantSplit
