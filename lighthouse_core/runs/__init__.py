"""Runs: their state, making and finding them, and what they cost. Importing this package imports nothing else."""
