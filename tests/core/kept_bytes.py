"""What autograd keeps of one block, for test_estimate.py."""

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.config import Recipe, loads_recipe
from lighthouse_core.models.decoder import Decoder, DecoderArgs
from lighthouse_core.titan.parallelize import kept_results

# After lighthouse_core.titan, which prepares its import.
from torchtitan.config.job_config import ActivationCheckpoint  # isort: skip
from torchtitan.distributed.activation_checkpoint import apply_ac  # isort: skip


def kept(recipe: Recipe, stage: str) -> int:
    """Bytes."""
    torch._dynamo.reset()
    training, context = recipe.training, recipe.parallel.context
    model = Decoder(DecoderArgs.of(recipe.model, training.seq_len))
    block = model.layers["0"]
    cfg = recipe.phases[-1].attention if stage == "lighthouse" else None
    block.attention.inner_attention = DenseAttention(recipe.lighthouse.dense_backend)
    if cfg is not None:
        block.attention.inner_attention = LighthouseAttention(cfg)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    mode = training.activation_checkpointing
    if mode != "none":
        how = ActivationCheckpoint(mode="selective", selective_ac_option="op")
        ops = kept_results(mode, [] if cfg is None else [cfg], "cpu")
        apply_ac(model, how, model_compile_enabled=training.compile, op_sac_save_list=ops)
        block = model.layers["0"]
    if training.compile:
        block = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    group = torch.distributed.group.WORLD if context > 1 else None
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hidden = torch.randn(1, training.seq_len // context, recipe.model.dim, requires_grad=True)
    turns = model.rotary_table().view(torch.int32)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=training.dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        # What it returns holds what is kept.
        out = block(hidden, turns, AttentionContext(group=group))
    own.add(turns.untyped_storage().data_ptr())
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)


def kept_bytes(rank: int, text: str, cases: list[tuple[list[str], str]]) -> list[int]:
    """Of each case: settings of the recipe of this text, and a stage. In a process of its own."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    torch.manual_seed(0)
    return [kept(loads_recipe(text, settings), stage) for settings, stage in cases]
