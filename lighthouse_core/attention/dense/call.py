"""Dense causal attention by a stock kernel, and which one."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lighthouse_core.attention.backends import log_once
from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.sdpa import attend
from lighthouse_core.attention.documents import check_documents
from lighthouse_core.attention.settings import BackendError, SettingError, known

KERNELS: dict[str, DenseKernel] = {
    name: import_module(f"lighthouse_core.attention.dense.{name}").KERNEL for name in BACKENDS if name != "auto"
}
# What `auto` takes where it can, before those of torch.
_PREFERRED = ("fa4",)
# What it takes for what torch's scaled_dot_product_attention cannot do: parts of a softmax, windows, documents, blocks.
_PREFERRED_BEYOND = ("fa4", "varlen", "flex")
_WITH_DOCUMENTS = tuple(name for name, facts in BACKENDS.items() if facts.documents)
_WITH_BLOCKS = tuple(name for name, facts in BACKENDS.items() if facts.blocks)
# torch tries these in order and takes the first that supports the inputs.
_TORCH = {
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}
_OTHER = 'the dense_backend "auto" takes a kernel that runs here'


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    documents: Documents | None = None,
) -> Tensor:
    """Causal softmax attention.

    It computes in the dtype of the inputs, also within torch.autocast. Under torch.compile batch, tokens and heads may
    be dynamic.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D]; H is a multiple of Hkv.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: a name of lighthouse_core.attention.dense. `auto` is FlashAttention-4 where it is installed and takes
            the inputs, else the first of torch's that does.
        documents: that the tokens are packed from, which then see no other one's; torch's own variable-length attention
            takes the place of the others of torch.

    Returns:
        [B, N, H, D] in the dtype of `q`.

    Raises:
        ValueError: for shapes or documents that do not fit together, or a backend that is not there.
    """
    check_inputs(q, k, v)
    if documents is not None:
        check_documents(documents, q.shape[0], q.shape[1])
    return dense_unchecked(q, k, v, scale=scale, backend=backend, documents=documents)


def dense_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    documents: Documents | None = None,
) -> Tensor:
    """`dense_attention` of tensors and documents that its caller has checked."""
    given = q.device.type, q.dtype, q.shape[3]
    with torch.autocast(q.device.type, enabled=False):
        if documents is None:
            return choose(backend, *given)(q, k, v, scale)
        return packed(documents_kernel(backend, *given), q, k, v, scale, 0, documents)[0]


def packed(
    kernel: DenseKernel, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
) -> tuple[Tensor, Any]:
    """Of sequences [B, N, H, D] that are packed from documents, the output and its log-sum-exp [B, N, H], if any."""
    assert kernel.packed is not None
    out, lse = kernel.packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, window, documents)
    return out.unflatten(0, q.shape[:2]), None if lse is None else lse.unflatten(0, q.shape[:2])


def documents_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel of attention within documents; see `kernel_beyond`."""
    if name == "auto" and device_type == "cpu":
        log_once(f"documents on cpu: {KERNELS['flash'].label}")
        return KERNELS["flash"]
    return kernel_beyond("documents", _WITH_DOCUMENTS, name, device_type, dtype, dim)


def fuses_documents(name: str, device_type: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether there is a kernel for them that takes all documents in one call."""
    if device_type == "cpu" and name in ("auto", "flash"):
        return torch.compiler.is_compiling()
    tried = _tried(name, _WITH_DOCUMENTS)
    return any(_obstacle(KERNELS[one], "documents", device_type, dtype, dim) is None for one in tried)


def blocks_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int, tile: int, size: int) -> DenseKernel:
    """The kernel of attention to a window and to chosen blocks of `size` keys, by tiles; see `kernel_beyond`."""
    return kernel_beyond("chosen blocks", _WITH_BLOCKS, name, device_type, dtype, dim, (tile, size))


def kernel_beyond(
    what: str,
    names: tuple[str, ...],
    name: str,
    device_type: str,
    dtype: torch.dtype,
    dim: int,
    sizes: tuple[int, int] | None = None,
) -> DenseKernel:
    """The kernel for what not every kernel can do; what `auto` stands for is logged.

    Args:
        what: that is, for messages; a plural.
        names: of the backends that can.
        name: of the backend. `auto` is the first fused one that is there, and plain matrix products on a CPU.
        device_type, dtype, dim: of the inputs; dim is D.
        sizes: of tiles and of blocks, where blocks are chosen.

    Raises:
        ValueError: an unknown backend, one that is not there, or one that cannot.
    """
    if known("dense_backend", name, tuple(BACKENDS)) not in names:
        raise SettingError("dense_backend", f"must be one of {', '.join(names)} for {what}, not {name!r}")
    if name == "math":
        log_once(f"{what} on {device_type}: {KERNELS['math'].label}")
        return KERNELS["math"]
    why: list[str] = []
    for kernel in (KERNELS[one] for one in _tried(name, names)):
        why_not = _obstacle(kernel, what, device_type, dtype, dim, sizes)
        if why_not is None:
            log_once(f"{what} on {device_type}: {'; '.join([kernel.label, *why])}")
            return kernel
        why.append(f"{kernel.label} {why_not}")
    if name == "auto" and device_type != "cuda":
        log_once(f"{what} on {device_type}: {'; '.join([KERNELS['math'].label, *why])}")
        return KERNELS["math"]
    hint = 'the dense_backend "math" runs everywhere, for short sequences'
    raise BackendError(f"{what} need a kernel for them: {'; '.join(why)}", hint)


def _obstacle(
    kernel: DenseKernel,
    what: str,
    device_type: str,
    dtype: torch.dtype,
    dim: int,
    sizes: tuple[int, int] | None = None,
) -> str | None:
    if sizes is not None and kernel.blocks is not None:
        return kernel.blocks(device_type, dtype, dim, *sizes)
    asked = kernel.packs if what == "documents" and kernel.packs is not None else kernel.obstacle
    return asked(device_type, dtype, dim)


def _tried(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Which of `names` a backend stands for, the fused ones for "auto"."""
    return tuple(one for one in (_PREFERRED_BEYOND if name == "auto" else (name,)) if one in names)


def choose(
    name: str, device_type: str, dtype: torch.dtype, dim: int
) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    """The function of a dense backend; what `auto` stands for is logged.

    Args:
        name: of the backend.
        device_type, dtype, dim: of the inputs; dim is D.

    Raises:
        ValueError: for a backend that is not there.
    """
    if known("dense_backend", name, tuple(BACKENDS)) != "auto":
        kernel = KERNELS[name]
        if why_not := kernel.obstacle(device_type, dtype, dim):
            raise BackendError(f"dense backend {name!r} {why_not}", _OTHER)
        return kernel.forward
    why = []
    for preferred in _PREFERRED:
        kernel = KERNELS[preferred]
        why_not = kernel.obstacle(device_type, dtype, dim)
        if why_not is None:
            log_once(f"dense attention on {device_type}: {kernel.label}")
            return kernel.forward
        why.append(f"; {kernel.label} {why_not}")
    order = _TORCH.get(device_type, [SDPBackend.MATH])
    names = ", ".join(b.name.removesuffix("_ATTENTION").lower() for b in order)
    faster = "".join(why) if device_type == "cuda" else ""
    log_once(f"dense attention on {device_type}: the first of torch's {names} that supports the inputs{faster}")
    return partial(attend, order=order)


def check_backend(name: str, device_type: str) -> None:
    """Raise ValueError unless a dense backend is there on a device of this type. Touches no GPU."""
    if known("dense_backend", name, tuple(BACKENDS)) != "auto" and (why_not := KERNELS[name].absence(device_type)):
        raise BackendError(f"dense backend {name!r} {why_not}", _OTHER)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q is [B, N, H, D] and k, v are [B, N, Hkv, D] of the same dtype and device."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, N, H, D] and k, v [B, N, Hkv, D]; got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, tokens or head dimension")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if 0 in q.shape:
        raise ValueError(f"q {tuple(q.shape)} is empty")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
