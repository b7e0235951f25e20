"""Whether the call that is timed gives what plain PyTorch gives."""

from dataclasses import replace

import torch
from torch import Tensor

from lighthouse_core.attention import LighthouseConfig, lighthouse_attention, select_indices
from lighthouse_core.errors import LighthouseError
from lighthouse_core.profile.dense import bound, random_inputs, relative_error, with_gradients
from lighthouse_core.profile.work import Shape

# On the shorter sequence a wider window counts as one of so many tokens, and larger tiles as ones of so many parents.
_WINDOW, _TILE = 1024, 128
# By norms, whose last bit depends on the order of addition, at least so much of a selection is the same.
_SHARED = 0.999
_NAMES = ("output", "dq", "dk", "dv")


def check_call(shape: Shape, cfg: LighthouseConfig, device: torch.device) -> dict[str, float]:
    """Compare a call, and its gradients, with plain PyTorch in float32.

    All heads on a shorter sequence; and one head at the full length, where the reference does without scores of all
    pairs. What draws or finds its own selection does so here, too.

    Returns:
        The relative errors, at most 4 times those of plain PyTorch in the dtype of the call.

    Raises:
        LighthouseError: the selection is another one, or an error is more than that.
    """
    small = _smaller(cfg)
    short = replace(shape, tokens=min(shape.tokens, small.rule.enough_tokens(small)))
    errors = {f"{what}, {short.tokens} tokens": error for what, error in _compare(short, small, "math", device).items()}
    if cfg.rule.lean(cfg):
        one = replace(shape, heads=1, kv_heads=1)
        errors |= {f"{what}, {one.tokens} tokens": error for what, error in _compare(one, cfg, "auto", device).items()}
    return errors


def _smaller(cfg: LighthouseConfig) -> LighthouseConfig:
    window = _WINDOW if cfg.window > _WINDOW and _WINDOW % cfg.compression == 0 else cfg.window
    tile = min(cfg.tile_parents, _TILE)
    return replace(cfg, window=window, tile_parents=tile, topk=tile)


def _compare(shape: Shape, cfg: LighthouseConfig, dense: str, device: torch.device) -> dict[str, float]:
    """Relative errors of output and gradients; the truth is the reference in float32, by the dense backend `dense`."""
    inputs = random_inputs(shape, device)
    given = {"key": torch.zeros(3, dtype=torch.int64, device=device)}
    plain = replace(cfg, backend="reference", dense_backend=dense)
    fixed = dict(given)
    if cfg.pools:
        fixed["indices"] = _same_selection(inputs[0], inputs[1], cfg, plain, given["key"])

    def by(settings: LighthouseConfig, dtype: torch.dtype, given: dict[str, Tensor]) -> list[Tensor]:
        return with_gradients(lambda *x: lighthouse_attention(*x, settings, **given), [x.to(dtype) for x in inputs])

    dtype = getattr(torch, shape.dtype)
    exact = by(plain, torch.float32, fixed)
    allowed = bound(by(plain, dtype, fixed), exact)
    errors = dict(zip(_NAMES, map(relative_error, by(cfg, dtype, given), exact), strict=True))
    for what, error in errors.items():
        if not error <= allowed:
            raise LighthouseError(
                f"relative error of {what} is {error:.2e} at {shape.tokens} tokens, above {allowed:.0e}: "
                "nothing was timed"
            )
    return errors


def _same_selection(q: Tensor, k: Tensor, cfg: LighthouseConfig, plain: LighthouseConfig, key: Tensor) -> Tensor:
    """The selection of the call, [1, Hkv, S].

    Raises:
        LighthouseError: it is not that of plain PyTorch.
    """
    scores = tuple(x.float().norm(dim=-1) for x in (q, k))
    same = torch.equal(select_indices(q, k, cfg, scores=scores), select_indices(q, k, plain, scores=scores))
    ours, theirs = (select_indices(q, k, settings, key=key) for settings in (cfg, plain))
    shared = min(
        torch.isin(a, b).float().mean().item() for a, b in zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True)
    )
    if not same or shared < (1.0 if cfg.draws else _SHARED):
        raise LighthouseError("the selection is not that of plain PyTorch: nothing was timed")
    return ours
