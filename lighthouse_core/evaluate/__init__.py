"""Measures of a trained model."""

from lighthouse_core.evaluate.leak import LeakRow, leak

__all__ = ["LeakRow", "leak"]
