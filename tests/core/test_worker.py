"""What a training process does with the words of others."""

import logging

import pytest

from lighthouse_core.train.worker import _log_torch


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
