"""Measures of a trained model."""

from lighthouse_core.evaluate.leak import LeakRow, leak
from lighthouse_core.evaluate.loss import bits_per_byte, by_position, mean_over, short_context
from lighthouse_core.evaluate.needle import interval, retrieve
from lighthouse_core.evaluate.report import evaluate, plot
from lighthouse_core.evaluate.subject import Subject

__all__ = [
    "LeakRow",
    "Subject",
    "bits_per_byte",
    "by_position",
    "evaluate",
    "interval",
    "leak",
    "mean_over",
    "plot",
    "retrieve",
    "short_context",
]
