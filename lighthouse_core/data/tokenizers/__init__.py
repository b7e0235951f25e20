"""Tokenizers that live in files, and how one is trained."""
