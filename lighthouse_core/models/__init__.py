"""Families of models: one file a family, and the modules that they share. Importing this package imports no torch."""
