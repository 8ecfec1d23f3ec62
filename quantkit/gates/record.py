"""What gates judge: a scored file with its figures, windows and timings, from a report or from the history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.gates.metrics import METRICS, Metric
from quantkit.schemes.mix import mix_of
from quantkit.system.units import finite

Key = tuple[str, str, str]
"""Metric, text and figure, such as ``("kl_divergence", "prose", "mean")``; what does not apply is empty."""
BASELINE = "baseline"
TIMED = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token at which a file departs far from the float model; see :mod:`quantkit.evaluation.divergence`."""

    window: int
    position: int
    kl_divergence: float
    nll: float
    context: str
    token: str
    expected: str
    predicted: str


@dataclass(frozen=True, slots=True)
class TextRecord:
    """How a file did on each window of a text.

    Attributes:
        token_ids_sha256: of the windows' tokens; two texts with the same hash are compared window by window.
        context_length: tokens of a window as asked for.
        tokens_per_window: scored tokens in each.
        nll: sum of negative log-likelihoods of each window, nats.
        kl: sum of divergences from the float model of each window, nats; None where none was taken.
        agreements: how many tokens of each window the float model would have chosen too; None likewise.
        departures: the furthest tokens.
    """

    token_ids_sha256: str
    context_length: int
    tokens_per_window: int
    nll: tuple[float, ...]
    kl: tuple[float, ...] | None = None
    agreements: tuple[int, ...] | None = None
    departures: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A quantized layer: its scheme, and the error of its output, see docs/report.md."""

    name: str
    scheme: str
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A scored file: a variant, or the float model.

    Attributes:
        name: of the variant.
        status: ``ok`` or ``failed``, with the reason in ``error``.
        method, format, scheme: as the report has them.
        loaded_by: the runtime that scored it.
        device: what it was scored on: ``cpu`` or the name of the GPU, its class.
        cpu: the processor's name.
        dtype, threads: in what it was computed, and by how many threads.
        figures: every finite figure.
        texts: by name.
        timings: seconds per token of each repetition, of ``prefill`` and ``decode``.
        layers: of a variant.
        content: fingerprint of the file; None for the float model.
    """

    name: str
    status: str
    error: str | None = None
    method: str = ""
    format: str = ""
    scheme: str = ""
    loaded_by: str | None = None
    device: str = ""
    cpu: str = ""
    dtype: str = ""
    threads: int = 0
    figures: Mapping[Key, float] = field(default_factory=dict)
    texts: Mapping[str, TextRecord] = field(default_factory=dict)
    timings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    content: str | None = None


def variant_record(row: Mapping[str, Any], *, content: str | None = None, cpu: str = "") -> VariantRecord:
    """The record of a variant's row, or of the report's ``baseline``.

    Args:
        row: as ``report.json`` has it; one that failed has no figures.
        content: fingerprint of the file.
        cpu: the processor's name.
    """
    scored, mix = row.get("scored_on") or {}, mix_of(row.get("allocation"))
    return VariantRecord(
        name=str(row.get("name", BASELINE)),
        status=str(row.get("status", "ok")),
        error=row.get("error"),
        method=str(row.get("method") or ""),
        format=str(row.get("format") or ""),
        scheme=str(row.get("scheme") or "") if mix is None else mix.name,
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
