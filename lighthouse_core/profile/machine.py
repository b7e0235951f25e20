"""The machine: what it is, how fast it copies and multiplies, how much memory it has."""

import contextlib
import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lighthouse_core.profile.timing import measure
from lighthouse_core.runs.create import git_commit

_PACKAGES = ("lighthouse-pretrain", "torch", "triton", "torchtitan", "flash-attn", "flash-attn-3", "flash-attn-4")
# Bytes of each of the two tensors of a copy, and the side of the matrices: enough for either to be limited by the
# machine alone.
_COPIED = {"cuda": 2**31, "cpu": 2**28}
_SIDE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Roof:
    """What this machine reached, in this process, with a plain copy and a plain matrix product.

    Attributes:
        bytes_per_second: read and written by a copy between two tensors.
        flops_per_second: of a product of two square matrices.
        dtype: of these matrices.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str


def roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measure the roof; a second or two."""
    source = torch.ones(_COPIED[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), device, seconds=1.0)
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, seconds=1.0)
    name = str(dtype).removeprefix("torch.")
    return Roof(2 * source.nbytes / copied.median * 1e3, 2 * side**3 / product.median * 1e3, name)


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor, versions, and the commit of a checkout."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "memory_gib": round(memory(device) / 2**30, 1),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "git_commit": git_commit(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def memory(device: torch.device) -> int:
    """Bytes that the device has, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes of the device that nobody uses, or torch alone keeps for later; of a CPU, those that the kernel says are
    available, or where it says nothing all that there are."""
    if device.type != "cuda":
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return memory(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def busy(seconds: float = 0.5) -> float:
    """Share of the time that processors did something while this process slept so long; 0 where that is not known."""
    try:
        before = _times()
        time.sleep(seconds)
        idle, total = (after - first for after, first in zip(_times(), before, strict=True))
    except (OSError, ValueError):
        return 0.0
    return 1 - idle / total if total else 0.0


def _times() -> tuple[int, int]:
    """Of all processors, idle and altogether, in the kernel's ticks (proc(5))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
