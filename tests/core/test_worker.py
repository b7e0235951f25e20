"""What a training process does with the words of others."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from lighthouse_core.worker import _log_torch


@pytest.fixture
def loggers():
    names = ("torch.one_of_its_own", "torch.__trace", "torchtitan", "another")
    found = {name: logging.getLogger(name) for name in names}
    before = {
        name: (logger.handlers[:], logger.propagate)
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    for logger in found.values():
        logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    yield found
    for name, (handlers, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, propagate


def test_torch_speaks_to_the_log_of_the_run(loggers, monkeypatch):
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    _log_torch()
    assert {name for name, logger in loggers.items() if logger.propagate and not logger.handlers} == {
        "torch.one_of_its_own"
    }


def test_unless_it_is_asked_to_speak_elsewhere(loggers, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    _log_torch()
    assert all(logger.handlers for logger in loggers.values())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")
def test_the_arithmetic_of_a_deterministic_run_is_fixed_before_torch_is_there():
    # MKL says what it reads; that it is early enough is what this shows.
    code = (
        "import sys; from lighthouse_core.worker import _fix_arithmetic; _fix_arithmetic();"
        "assert 'torch' not in sys.modules; import torch; torch.ones(64, 64) @ torch.ones(64, 64)"
    )
    environment = {**os.environ, "MKL_VERBOSE": "1"}
    environment.pop("MKL_CBWR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "CNR:AVX2" in done.stdout or "CNR:AUTO" in done.stdout
