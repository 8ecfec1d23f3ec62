"""Records of runs that never were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantkit.gates.record import (
    LayerRecord,
    TextRecord,
    TokenRecord,
    VariantRecord,
)
from quantkit.run_history import RunRecord

TOKEN = TokenRecord(1, 7, 2.5, 4.0, "the tide went", " out", " out", " in")
TEXT = TextRecord("aa11", 64, 63, (126.0, 130.0, 120.0), (6.3, 6.5, 6.1), (50, 51, 49), (TOKEN,))


def variant(name: str = "int4", text: TextRecord = TEXT, **changes: Any) -> VariantRecord:
    return replace(
        VariantRecord(
            name=name,
            status="ok",
            method="gptq",
            format="compressed-tensors",
            scheme="int4 g64 sym",
            loaded_by="transformers",
            device="cpu",
            cpu="Processor",
            dtype="float32",
            threads=2,
            figures={
                ("perplexity", "prose", ""): 7.4,
                ("kl_divergence", "prose", "mean"): 0.1,
                ("kl_divergence", "prose", "p99"): 0.9,
                ("top1_agreement", "prose", ""): 0.79,
                ("size_bytes", "", ""): 1000.0,
                ("memory", "", "weights_bytes"): 1100.0,
                ("speed", "", "decode_tokens_per_second"): 100.0,
                ("speed", "", "prefill_tokens_per_second"): 1000.0,
            },
            texts={"prose": text},
            timings={"decode": (0.010, 0.0101, 0.0099), "prefill": (0.001, 0.001, 0.0011)},
            layers=(
                LayerRecord("layers.0.q", "int4 g64 sym", 0.02, 0.01),
                LayerRecord("layers.0.k", "int4", None, None),
            ),
            content="c0ffee",
        ),
        **changes,
    )


def run(**changes: Any) -> RunRecord:
    return replace(
        RunRecord(
            name="demo",
            kind="check",
            started="2026-11-01T06:00:00.000000+00:00",
            finished="2026-11-01T06:10:00.000000+00:00",
            status="ok",
            verdict="passed",
            quantkit="0.1.0",
            recipe={"name": "demo", "variants": [{"name": "int4", "bits": 4}]},
            source="org/model",
            source_fingerprint="feed",
            calibration_fingerprint="beef",
            device="cpu",
            cpu="Processor",
            cores=2,
            platform="Linux",
            packages={"torch": "2.13", "python": "3.11"},
            folder="reports/demo",
            baseline=variant("baseline", layers=(), content=None),
            variants=(variant(), variant("int8", status="failed", error="too wide", figures={}, texts={}, timings={})),
        ),
        **changes,
    )
