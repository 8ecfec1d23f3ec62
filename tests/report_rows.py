"""Rows and reports with just the figures that a choice needs, for tests."""

from __future__ import annotations

from typing import Any

WHOLE = 1_000_000_000
"""Bytes of the float model of a report."""


def row(
    name: str, size: float, kl: float | None = None, perplexity: float | None = None, stderr: float = 0.0001
) -> dict[str, Any]:
    """A scored variant: its size as a share of the float model's, its divergence, and its perplexity beside 10."""
    metrics: dict[str, Any] = {"perplexity": {"prose": 10.0 if perplexity is None else perplexity}}
    if kl is not None:
        metrics["kl_divergence"] = {"prose": {"mean": kl, "stderr": stderr, "median": kl / 2, "p99": kl * 9}}
    return {
        "name": name,
        "status": "ok",
        "error": None,
        "method": "gptq",
        "format": "gptq",
        "scheme": "int4 g64 sym",
        "metrics": metrics,
        "size_bytes": size * WHOLE,
    }


def report_of(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A report of them."""
    baseline = {"metrics": {"perplexity": {"prose": 10.0}}, "size_bytes": WHOLE, "texts": {"prose": {}}}
    return {
        "schema": 1,
        "name": "few",
        "status": "ok",
        "baseline": baseline,
        "variants": list(rows),
        "gates": [],
        **more,
    }
