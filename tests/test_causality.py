"""Models whose tokens see what is to their right are given no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.causality import can_be_padded
from quantkit.engine.skeleton import Skeleton
from quantkit.quantization import job
from quantkit.runtimes._model import TransformersModel
from tests.architectures import make
from tests.tiny import tiny_rows

BOTH_WAYS = {"use_bidirectional_attention": True}


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [("gemma3_text", {}, True), ("gemma3_text", BOTH_WAYS, False), ("zamba2", {}, True), ("cpmant", {}, False)],
)
def test_padding_is_for_models_that_look_back_only(
    tmp_path: Path, architecture: str, changes: dict[str, Any], expected: bool
) -> None:
    make(tmp_path, architecture, **changes)
    skeleton = Skeleton(tmp_path)
    found = can_be_padded(skeleton, CheckpointReader(tmp_path), torch.device("cpu"), torch.float32)
    assert found is expected
    assert all(layer.weight.is_meta for layer in skeleton.segments[0].layers)


@pytest.mark.parametrize(("changes", "is_padded"), [({}, True), (BOTH_WAYS, False)])
def test_calibration_rows_of_one_that_looks_both_ways_share_batches_of_their_length_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_padded: bool
) -> None:
    make(tmp_path / "model", "gemma3_text", **changes)
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two and three"}\n{"text": "four"}\n')
    seen: list[Batch] = []

    def counted(*args: Any, **keys: Any) -> list[Batch]:
        seen.extend(make_batches(*args, **keys))
        return seen

    monkeypatch.setattr(job, "make_batches", counted)
    calibration = {"dataset": str(tmp_path / "text.jsonl"), "max_length": 48, "samples": 3}
    quantkit.quantize(tmp_path / "model", out=tmp_path / "out", calibration=calibration, group_size=32, device="cpu")
    assert any(batch.valid is not None for batch in seen) is is_padded


@pytest.mark.parametrize("changes", [{}, BOTH_WAYS])
def test_rows_that_are_scored_together_have_the_logits_that_they_have_alone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = TransformersModel(make(tmp_path, "gemma3_text", **changes))
    rows = [torch.tensor(row) for row in tiny_rows(3, 5, 20)]
    for row, found in zip(rows, model.logits_of(rows), strict=True):
        torch.testing.assert_close(found, model.logits(row), rtol=1e-4, atol=1e-4)
