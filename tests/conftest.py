"""Fixtures that several files use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import write_records
from tests.slow_files import SlowFiles
from tests.tiny import make_model


def pytest_configure(config: pytest.Config) -> None:
    """Have the slow files listed at the end of a run."""
    config.pluginmanager.register(SlowFiles())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, in bfloat16 as models are published."""
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, of which ``dtype: own`` keeps every bit, and which NumPy and the standard library read."""
    return make_model(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of instructions."""
    return write_records(tmp_path_factory.mktemp("data") / "instructions.jsonl")
