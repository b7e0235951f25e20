"""What `lighthouse profile` finds on a GPU agrees with itself."""

import pytest
import torch

from lighthouse_core.attention import LighthouseConfig
from lighthouse_core.profile.attention import _stages, profile_attention
from lighthouse_core.profile.machine import roof
from lighthouse_core.profile.work import Shape

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def limits():
    return roof(GPU, torch.bfloat16)


def test_the_stages_add_up_to_the_call(limits):
    found = profile_attention(Shape(98304, 8, 8, 128, "bfloat16"), LighthouseConfig(), limits, GPU, repeats=10)
    assert {"cudnn", "flash", "efficient"} <= {call.name for call in found.dense}
    passes = [one for stage in found.stages for one in (stage.forward, stage.backward) if one]
    assert sum(one.ms.median for one in passes) == pytest.approx(found.lighthouse.both_ms.median, rel=0.1)
    # Inputs, output, three gradients and the output's: 8 rows a token, of 2 KiB, and what is gathered.
    assert found.lighthouse.peak_gib > 8 * 98304 * 2048 / 2**30
    assert all(speedup["forward_backward"] > 10 for speedup in found.speedup.values())


@pytest.mark.parametrize(
    ("tokens", "levels", "topk"), [(98304, 2, 1536), (98304, 3, 1536), (524288, 4, 2048), (524288, 5, 1024)]
)
def test_no_stage_moves_more_than_the_machine_can(limits, tokens, levels, topk):
    cfg = LighthouseConfig(levels=levels, topk=topk, backend="triton")
    for stage in _stages(Shape(tokens, 8, 8, 128, "bfloat16"), cfg, limits, GPU, 5):
        for one in (stage.forward, stage.backward):
            assert one is None or one.of_roof is None or one.of_roof < 1.05, f"{stage.name}: {one}"
