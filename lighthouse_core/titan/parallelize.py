"""What torchtitan does to a Llama before it trains; our operations are among those that checkpointing knows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import (
    apply_compile,
    apply_ddp,
    apply_fsdp,
    disable_fsdp_gradient_division,
)

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.models.decoder import Decoder
from lighthouse_core.titan.runtime import DEVICE_TYPE, HAS_ACCELERATOR

aten = torch.ops.aten
# Dense attention of torch's own choice; the kernels name theirs.
_ATTENTION: set[OpOverload | HigherOrderOperator] = {aten._scaled_dot_product_efficient_attention.default}
# What selective checkpointing keeps besides, of torchtitan's list what this model can run. Of the matrix products it
# keeps every second.
_DENSE = {aten.mm.default, torch.ops._c10d_functional.reduce_scatter_tensor.default}


def kept_results(
    mode: str, cfgs: Sequence[LighthouseConfig], device_type: str
) -> set[OpOverload | HigherOrderOperator]:
    """Operations whose results activation checkpointing keeps.

    Whatever the mode, a selection is made once: recomputed activations may differ in the last bit, and another
    selection would give another gradient. "attention" also keeps what dense kernels make, and the rows that they are
    given of a pyramid, so that a compiled block computes neither the pyramid anew nor, for the attention call, the
    tokens' q, k and v. "selective" keeps every second matrix product besides.

    Args:
        mode: "selective", "attention" or "full".
        cfgs: settings of the Lighthouse layers in each phase; () where there are none.
        device_type: of the model.
    """
    kept = set() if mode == "full" else _ATTENTION.union(*(kernel.kept for kernel in KERNELS.values()))
    if mode == "selective":
        kept |= _DENSE
    return kept.union(*(cfg.rule.kept(cfg, mode, device_type) for cfg in cfgs))


def mend_cant_split() -> None:
    """Have Inductor of torch 2.11 pass over a tiling that does not fit, where it would end with a TypeError: it raises
    CantSplit without the arguments that it asks for (pytorch/pytorch#178676)."""
    from torch._inductor.codegen.simd import CantSplit

    CantSplit.__init__.__defaults__ = (None, None)


def parallelize(
    model: Decoder, parallel_dims: ParallelDims, job_config: JobConfig, cfgs: Sequence[LighthouseConfig] = ()
) -> Decoder:
    """Checkpoint, compile and shard the model, in torchtitan's order and with its functions.

    Args:
        model: a Llama whose blocks are `model.layers`.
        parallel_dims, job_config: torchtitan's.
        cfgs: settings of the Lighthouse layers in each phase; () where there are none.
    """
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    checkpointing = job_config.activation_checkpoint
    if checkpointing.mode != "none":
        kept = kept_results(checkpointing.mode, cfgs, DEVICE_TYPE)
        if checkpointing.mode != "selective" and kept:
            # torchtitan's "full" keeps nothing, so this is "selective" with other operations.
            checkpointing = dataclasses.replace(checkpointing, mode="selective", selective_ac_option="op")
        apply_ac(model, checkpointing, model_compile_enabled=compiled, op_sac_save_list=kept)
    if compiled:
        if torch.__version__ < "2.12":
            mend_cant_split()
        apply_compile(model, job_config.compile)
    model.output.compiled = job_config.compile.enable and "loss" in job_config.compile.components
    param_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    if mesh := _sharding_mesh(parallel_dims, param_dtype):
        shard = shard_tied if model.args.tied else apply_fsdp
        shard(
            model,
            mesh,
            param_dtype=param_dtype,
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        )
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    use_plain_sums(model)
    return model


def shard_tied(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    pp_enabled: bool,
    cpu_offload: bool,
    reshard_after_forward_policy: str,
) -> None:
    """What torchtitan's apply_fsdp does, for a model whose head is its embedding table: the table is gathered once, for
    both, with what is not of a layer; apply_fsdp would split them."""
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
    }
    if cpu_offload:
        how["offload_policy"] = CPUOffloadPolicy()
    for block in model.layers.values():
        fully_shard(block, **how, reshard_after_forward=reshard_after_forward_policy != "never")
    # None keeps the table, with which the backward pass begins.
    fully_shard(model, **how, reshard_after_forward=True if reshard_after_forward_policy == "always" else None)
    disable_fsdp_gradient_division(model)


def _sharding_mesh(parallel_dims: ParallelDims, param_dtype: torch.dtype) -> DeviceMesh | None:
    """The processes that share the weights; one alone where FSDP has to cast them, as it does for several."""
    if parallel_dims.fsdp_enabled:
        return parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"])
    if parallel_dims.world_size == 1 and param_dtype != torch.float32:
        return init_device_mesh(DEVICE_TYPE, (1,), mesh_dim_names=("fsdp",))
    return None


def use_plain_sums(model: Decoder) -> None:
    """Without an accelerator, have sharded parameters add gradients by plain sums: gloo has no scaled ones."""
    if not HAS_ACCELERATOR:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
