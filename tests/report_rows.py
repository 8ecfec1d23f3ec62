"""Rows and reports with just the figures that a choice needs, for tests."""

from __future__ import annotations

from collections.abc import Mapping
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


BITS = {"int3": 3.5, "int4": 4.5, "int8": 8.5, "float": 16.0}
"""What the choices of :func:`allocation` take, bits a weight."""


def allocation(
    chosen: Mapping[str, str], *, predicted: float = 0.02, budget: str = "4 bits per weight", weights: int = 4096
) -> dict[str, Any]:
    """An allocation as JSON: a choice for each unit, whose layers are joined by ``+``, each of as many weights."""
    units: list[dict[str, Any]] = []
    for names, choice in chosen.items():
        layers = names.split("+")
        count = weights * len(layers)
        sizes = {name: int(bits * count / 8) for name, bits in BITS.items()}
        costs = dict.fromkeys(BITS, predicted / len(chosen))
        units.append({"layers": layers, "choice": choice, "weights": count, "nats": costs, "bytes": sizes})
    total = sum(unit["bytes"][unit["choice"]] for unit in units)
    bits = 8 * total / sum(unit["weights"] for unit in units)
    return {
        "version": 1,
        "budget": budget,
        "predicted": {"kl_divergence": predicted, "bytes": total, "bits_per_weight": bits},
        "choices": {name: {"scheme": "float"} if name == "float" else {"bits": int(name[3:])} for name in BITS},
        "units": units,
    }


def mixed_row(
    name: str, size: float, kl: float, predicted: float = 0.02, chosen: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A scored variant whose layers got several schemes."""
    plain = {f"model.layers.{block}.mlp.down_proj": "int4" if block % 2 else "int3" for block in range(4)}
    return {**row(name, size, kl), "allocation": allocation(chosen or plain, predicted=predicted)}
