"""A GPU with too little memory: less is tried step by step, and in the end the line has the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from tests.runs import hidden_names
from tests.tiny import make_model, tiny_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS = tiny_rows(count=256, shortest=256, longest=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    return make_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **shape)


@pytest.fixture(autouse=True)
def _limit_lifted() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def job(model: Path) -> Job:
    return Job(model, {"reference": "tiny"}, "bfloat16", ROWS, "0" * 64, "quantized", "cuda")


def variant() -> VariantSpec:
    return VariantSpec.model_validate({"name": "v", "method": "gptq", "group_size": 64})


def limit(megabytes: int) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(megabytes * 2**20 / total)


def test_less_is_tried_until_it_fits(model: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    quantize(job(model), variant(), tmp_path / "whole")
    peak = torch.cuda.max_memory_reserved() // 2**20
    found = []
    for part in (0.8, 0.6, 0.45, 0.35):
        limit(int(peak * part))
        notes: list[str] = []
        try:
            done = quantize(job(model), variant(), tmp_path / f"at {part}", on_note=notes.append)
        except QuantizationError as error:
            assert "were asked for" in str(error)  # noqa: PT017 - a smaller share may be too small
            break
        found += notes
        assert all(note in done.facts["notes"] for note in notes)
    assert any(note.startswith("the memory of cuda:0 ran out: ") for note in found)


def test_where_nothing_helps_the_line_has_the_numbers(model: Path, tmp_path: Path) -> None:
    limit(24)
    with pytest.raises(QuantizationError, match=r"cuda:0 is too small .*: [\d.]+ \w+ were asked for") as caught:
        quantize(job(model), variant(), tmp_path / "out")
    assert "evaluation.device: cpu" in str(caught.value)
    assert not (tmp_path / "out").exists()
    torch.cuda.set_per_process_memory_fraction(1.0)
    quantize(job(model), variant(), tmp_path / "out")
    assert hidden_names(tmp_path) == []
