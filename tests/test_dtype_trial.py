"""Passes in 16 bits are given up for models whose code does not compute in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError
from quantkit.quantization import Job, quantize, walk_variants
from quantkit.recipe import VariantSpec
from tests.tiny import make_model, tiny_rows

CPU = torch.device("cpu")


def failing_from(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model's code compute in float32 alone, given so many tokens or more."""
    forward = LlamaMLP.forward

    def own(self: LlamaMLP, given: torch.Tensor) -> Any:
        if given.dtype != torch.float32 and given.shape[1] >= tokens:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return forward(self, given)

    monkeypatch.setattr(LlamaMLP, "forward", own)


def tried(folder: Path, device: torch.device = CPU) -> torch.dtype:
    return dtype_that_runs(Skeleton(folder), CheckpointReader(folder), device, torch.bfloat16, tiny_rows(2, 8, 16))


def test_bfloat16_is_kept_where_it_runs_and_on_cuda_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path)
    assert tried(folder) == torch.bfloat16
    failing_from(12, monkeypatch)  # as models do that compute in chunks
    assert tried(folder) == torch.float32
    assert tried(folder, torch.device("cuda")) == torch.bfloat16
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        tried(folder)


def test_such_a_model_is_calibrated_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(walk_variants, "pass_dtype", lambda *_: torch.bfloat16)
    failing_from(1, monkeypatch)
    job = Job(folder, {"model": "tiny"}, "bfloat16", tiny_rows(), calibration_sha256="0", device="cpu")
    done = quantize(
        job, VariantSpec.model_validate({"name": "v", "method": "gptq", "group_size": 32}), tmp_path / "out"
    )
    assert "calibration computes in float32: the model's code does not run in bfloat16 here" in done.facts["notes"]
