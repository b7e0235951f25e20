"""Measures of a trained model."""

from lighthouse_core.evaluate.leak import AcrossRow, LeakRow, leak, leak_across
from lighthouse_core.evaluate.loss import bits_per_byte, by_position, mean_over, short_context
from lighthouse_core.evaluate.needle import interval, retrieve
from lighthouse_core.evaluate.report import evaluate, plot
from lighthouse_core.evaluate.subject import Subject
from lighthouse_core.evaluate.text import PackedSequence, Text

__all__ = [
    "AcrossRow",
    "LeakRow",
    "PackedSequence",
    "Subject",
    "Text",
    "bits_per_byte",
    "by_position",
    "evaluate",
    "interval",
    "leak",
    "leak_across",
    "mean_over",
    "plot",
    "retrieve",
    "short_context",
]
