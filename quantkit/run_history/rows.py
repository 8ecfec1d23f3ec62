"""From a row of ``report.json`` to a record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.gates.metrics import METRICS, Metric
from quantkit.run_history.record import Key, LayerRecord, TextRecord, TokenRecord, VariantRecord

BASELINE = "baseline"
TIMED = ("prefill", "decode")


def variant_record(row: Mapping[str, Any], *, content: str | None = None, cpu: str = "") -> VariantRecord:
    """The record of a variant's row, or of the report's ``baseline``.

    Args:
        row: as ``report.json`` has it; one that failed has no figures.
        content: fingerprint of the file.
        cpu: the processor's name.
    """
    scored = row.get("scored_on") or {}
    return VariantRecord(
        name=str(row.get("name", BASELINE)),
        status=str(row.get("status", "ok")),
        error=row.get("error"),
        method=str(row.get("method") or ""),
        format=str(row.get("format") or ""),
        scheme=str(row.get("scheme") or ""),
        loaded_by=row.get("loaded_by"),
        device=str(scored.get("device") or ""),
        cpu=cpu,
        dtype=str(scored.get("dtype") or ""),
        threads=int(scored.get("threads") or 0),
        figures=dict(_figures(row)),
        texts={name: _text(about) for name, about in (row.get("texts") or {}).items() if about.get("nll_by_window")},
        timings=_timings(row.get("speed") or {}),
        layers=tuple(_layer(layer) for layer in row.get("layers") or ()),
        content=content,
    )


def finite(value: Any) -> float | None:
    """A figure as float; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[Key, float]]:
    groups = {
        **(row.get("metrics") or {}),
        **{key: row.get(key) for key in ("size_bytes", "bits_per_weight")},
        **{key: {"": _known(row.get(key) or {}, METRICS[key])} for key in ("memory", "speed", "seconds")},
    }
    for metric, about in groups.items():
        by_text = about if isinstance(about, Mapping) else {"": about}
        for text, found in by_text.items():
            by_figure = found if isinstance(found, Mapping) else {"": found}
            for figure, given in by_figure.items():
                value = finite(given)
                if value is not None:
                    yield (metric, text, figure), value


def _known(found: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    return {name: found.get(name) for name in metric.fields}


def _text(about: Mapping[str, Any]) -> TextRecord:
    nll = tuple(float(value) for value in about["nll_by_window"])
    kl, agreements = about.get("kl_by_window"), about.get("agreements_by_window")
    return TextRecord(
        token_ids_sha256=str(about["token_ids_sha256"]),
        context_length=int(about["context_length"]),
        tokens_per_window=int(about["nll_count"]) // len(nll),
        nll=nll,
        kl=None if kl is None else tuple(float(value) for value in kl),
        agreements=None if agreements is None else tuple(int(value) for value in agreements),
        departures=tuple(TokenRecord(**departure) for departure in about.get("departures") or ()),
    )


def _timings(speed: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    found = {name: (speed.get(name) or {}).get("seconds_per_token") for name in TIMED}
    return {name: tuple(float(value) for value in samples) for name, samples in found.items() if samples}


def _layer(layer: Mapping[str, Any]) -> LayerRecord:
    return LayerRecord(
        name=str(layer["name"]),
        scheme=str(layer.get("scheme") or ""),
        error_before=finite(layer.get("error_before")),
        error_after=finite(layer.get("error_after")),
    )
