"""A trained checkpoint as a plain Hugging Face Llama."""

from lighthouse_core.export.publish import StripReport, strip

__all__ = ["StripReport", "strip"]
