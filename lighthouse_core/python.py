"""Python processes of ours. They import nothing from the folder that they are started in: it may hold any file."""

import sys

# For a process and for all Python processes that come from it.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def run_module(name: str) -> list[str]:
    """What the command begins with that runs a module of ours."""
    return [sys.executable, "-P", "-m", name]
