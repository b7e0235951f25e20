"""Weights that exist: those of a checkpoint of a run, and those of a directory of Hugging Face's format."""
