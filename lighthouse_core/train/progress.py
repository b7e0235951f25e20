"""The line a user sees for a logged step."""

from typing import Any


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress_line(step: int, end: int, stage: str, row: dict[str, Any], seconds_left: float, leaky: bool) -> str:
    """One plain line: step, stage, loss, gradient norm, learning rate, tokens per second, time left.

    Args:
        step, end: the step just finished and the last of the stage.
        stage: "lighthouse" or "dense".
        row: `loss` in nats per token, `grad_norm`, `lr`, `tokens_per_second`.
        seconds_left: estimate for the rest of the stage.
        leaky: marks a loss that later tokens took part in.
    """
    loss = f"loss {row['loss']:.4f}" + (" (leaky)" if leaky else "")
    return (
        f"step {step}/{end}  {stage}  {loss}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s  {clock(seconds_left)} left"
    )
