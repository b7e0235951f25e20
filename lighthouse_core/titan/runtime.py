"""Lets torchtitan import and run on a machine without an accelerator.

torchtitan asks torch for the accelerator's name while it is imported and takes "cuda" where there is none. This module
answers "cpu" for the duration of that import; it must be imported before any torchtitan module.
"""

import torch
import torch._utils

HAS_ACCELERATOR = torch.accelerator.is_available()
DEVICE_TYPE = "cuda" if HAS_ACCELERATOR else "cpu"

if not HAS_ACCELERATOR:
    _ask = torch._utils._get_available_device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    try:
        import torchtitan.tools.utils
    finally:
        torch._utils._get_available_device_type = _ask
    assert torchtitan.tools.utils.device_type == "cpu", "torchtitan was imported before lighthouse_core.titan.runtime"
