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

from quantkit.estimation import Estimate, Use, anatomy_of, of_variant
from quantkit.evaluation.memory import MemoryWatch
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.validation import parse_section
from tests.tiny import SPECIAL, VOCABULARY, make_model

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
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"method": "none", "scheme": "bfloat16", "format": "float"},
    "int4": {"method": "rtn", "group_size": 128},
    "nf4": {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes"},
}
HEAD = "| what | estimated | measured | estimated / measured |\n|---|---:|---:|---:|\n"


class Table:
    """The rows of the table that is written."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def add(self, what: str, estimated: int, measured: int) -> float:
        """Note a row and give the ratio."""
        sizes = " | ".join(f"{nbytes / 2**20:,.1f} MiB" for nbytes in (estimated, measured))
        self.rows.append(f"| {what} | {sizes} | {estimated / measured:.3f} |")
        return estimated / measured


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found = Table()
    yield found
    place = Path(os.environ.get("QUANTKIT_VRAM_TABLE", "vram-measured.md"))
    title = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}\n\n"
    place.write_text(title + HEAD + "\n".join(found.rows) + "\n", encoding="utf-8")


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


def estimated(model: Path, keys: dict[str, Any], **use: Any) -> tuple[VariantSpec, Estimate]:
    variant = parse_section(VariantSpec, {"name": "v", **keys}, "test")
    return variant, of_variant(anatomy_of(str(model)), variant, Use(context=CONTEXT, **use))


@pytest.mark.parametrize("name", VARIANTS)
def test_running(name: str, big: Path, tmp_path: Path, table: Table) -> None:
    variant, found = estimated(big, VARIANTS[name])
    quantize(Job(big, {"reference": "big"}, "bfloat16", device="cpu"), variant, tmp_path / "out")
    device = torch.device("cuda")
    watch = MemoryWatch(device)
    base = torch.cuda.memory_allocated(device)
    model = RUNTIMES.get("transformers").load(tmp_path / "out", LoadOptions("cuda", "bfloat16", CONTEXT))
    watch.loaded(model)
    part = found.part("inference")
    weights = torch.cuda.memory_allocated(device) - base
    assert table.add(f"{name}: weights", part.line("weights").nbytes, weights) == pytest.approx(1, rel=0.05)
    torch.cuda.reset_peak_memory_stats(device)
    model.prefill(ids(CONTEXT))
    prefill = torch.cuda.max_memory_allocated(device) - base
    tensors = part.nbytes - part.line("device").nbytes
    ratio = table.add(f"{name}: prefill of {CONTEXT:,} tokens, allocator", tensors, prefill)
    assert ratio == pytest.approx(1, rel=0.15)
    torch.cuda.reset_peak_memory_stats(device)
    model.decode(ids(CONTEXT - 16), 16)
    decode = torch.cuda.max_memory_allocated(device) - base
    table.add(f"{name}: prefill and decode, allocator", tensors, decode)
    of_process = watch.figures(model)["process_bytes"]
    if of_process is not None:
        table.add(f"{name}: process, NVML", part.nbytes, of_process)


@pytest.mark.parametrize("rows", [CALIBRATION_ROWS // 2, CALIBRATION_ROWS])
def test_quantizing(rows: int, big: Path, tmp_path: Path, table: Table) -> None:
    keys = {"method": "gptq", "group_size": 128}
    variant, found = estimated(big, keys, calibration_tokens=rows * 2048)
    calibration = ids(rows * 2048).view(rows, 2048).tolist()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize(Job(big, {"reference": "big"}, "bfloat16", calibration, "x", device="cuda"), variant, tmp_path / "out")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    ratio = table.add(f"gptq with {rows * 2048:,} tokens, allocator", found.part("quantizing").nbytes, peak)
    assert ratio == pytest.approx(1, rel=0.15)
