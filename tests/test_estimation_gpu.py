"""Estimates beside what CUDA's allocator and NVML measure; run on a machine with a GPU:

    pytest -m gpu tests/test_estimation_gpu.py

The table goes to the file that the environment variable ``QUANTKIT_VRAM_TABLE`` names, by default ``vram-measured.md``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.estimation import OVERHEAD, Use, anatomy_of, of_variant
from quantkit.evaluation.memory import CudaProbe
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.runtimes.base import LoadOptions
from quantkit.system.validation import parse_section
from tests.tiny import SPECIAL, VOCABULARY, make_model
from tests.vram import Table, context_bytes, watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
CONTEXT = 4096
CALIBRATION_ROWS = 32
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("transformers", {"method": "none", "scheme": "bfloat16", "format": "float"}),
    "int4": ("transformers", {"method": "rtn", "group_size": 128}),
    "int4, decoded": ("reference", {"method": "rtn", "group_size": 128}),
    "nf4": ("transformers", {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes"}),
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "group_size": 128},
    "gptq": {"method": "gptq", "group_size": 128},
    "awq": {"method": "awq", "group_size": 128, "symmetric": False},
}


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found = Table()
    yield found
    place = Path(os.environ.get("QUANTKIT_VRAM_TABLE", "vram-measured.md"))
    place.write_text(found.text(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"), encoding="utf-8")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("big"), dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(autouse=True)
def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def ids(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=draw)


def spec(keys: dict[str, Any]) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", **keys}, "test")


@pytest.mark.parametrize("name", RUNS)
def test_running(name: str, big: Path, tmp_path: Path, table: Table) -> None:
    runtime, keys = RUNS[name]
    quantize(Job(big, {"reference": "big"}, "bfloat16", device="cpu"), spec(keys), tmp_path / "out")
    options = LoadOptions("cuda", "bfloat16", CONTEXT)
    torch.ones(1, 1, device="cuda") @ torch.ones(1, 1, device="cuda")  # what cuBLAS takes once is not the model's
    memory, found = watched(tmp_path / "out", spec(keys), runtime, options, ids(CONTEXT))
    ratios = table.add_all(name, found)
    assert ratios["weights"] == pytest.approx(1, rel=0.05)
    assert ratios["prefill"] == pytest.approx(1, rel=0.15)
    assert {"weights", "prefill", "decode"} <= set(ratios)
    for own in context_bytes(memory)[-1:]:
        table.add(f"{name}: the device's own (process less allocator)", OVERHEAD, own)


@pytest.mark.parametrize("rows", [CALIBRATION_ROWS // 2, CALIBRATION_ROWS])
@pytest.mark.parametrize("name", METHODS)
def test_quantizing(name: str, rows: int, big: Path, tmp_path: Path, table: Table) -> None:
    variant = spec(METHODS[name])
    found = of_variant(anatomy_of(str(big)), variant, Use(calibration_tokens=rows * 2048))
    calibration = ids(rows * 2048).view(rows, 2048).tolist()
    probe = CudaProbe(torch.device("cuda", 0))
    probe.begin()
    base = probe.read()["used_bytes"]
    quantize(Job(big, {"reference": "big"}, "bfloat16", calibration, "x", device="cuda"), variant, tmp_path / "out")
    peak = probe.read()["peak_bytes"] - base
    ratio = table.add(f"{name} with {rows * 2048:,} tokens, allocator", found.part("quantizing").nbytes, peak)
    assert ratio == pytest.approx(1, rel=0.15)
