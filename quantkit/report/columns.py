"""The columns of the comparison, each with the decimals and unit of the whole column and its best marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantkit.recipe.evaluation import STREAMED
from quantkit.report.numbers import (
    ABSENT,
    byte_unit,
    decimals_for,
    duration,
    figure,
    fixed,
    margin,
    percent,
    pick,
    signed,
)
from quantkit.schemes.mix import mix_of

Record = dict[str, Any]
Better = Literal["low", "high"]
DECODED_MARK = "\N{DAGGER}"
"""Stands at the bytes of weights that the reference decoder made float."""
STREAMED_MARK = "\N{DOUBLE DAGGER}"
"""Stands at those of a model of which one block was in memory."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure as it is shown.

    Attributes:
        text: the figure, written.
        best: no variant has a better one.
    """

    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of all rows.

    Attributes:
        title: what it is, with its unit.
        cells: the float model's first, then one per variant.
    """

    title: str
    cells: tuple[Cell, ...]


def texts_of(report: Record) -> list[str]:
    """The names of all texts that anything was scored on, in the order of the report."""
    names: dict[str, None] = dict.fromkeys(pick(report, "baseline", "texts") or {})
    for row in rows_of(report):
        for metric in ("perplexity", "kl_divergence", "top1_agreement"):
            names.update(dict.fromkeys(pick(row, "metrics", metric) or {}))
    return list(names)


def rows_of(report: Record) -> list[Record]:
    """The figures of the comparison's rows: the float model's, then each variant's; a failed one has none."""
    return [report.get("baseline") or {}, *(row if row.get("status") == "ok" else {} for row in report["variants"])]


def reference_name(report: Record) -> str:
    """What the variants are compared with, in words."""
    return str(pick(report, "source", "relative_to") or "the float model")


def reference_word(report: Record) -> str:
    """The same as one word: ``float`` or ``source``."""
    return "source" if "source" in reference_name(report) else "float"


def scheme_name(variant: Record) -> str:
    """A scheme in short, such as ``int4 g64 sym`` or ``mixed int3, int4``: by the mix, by the row, or as older rows."""
    mix = mix_of(variant.get("allocation"))
    if mix is not None:
        return mix.name
    if variant.get("scheme"):
        return str(variant["scheme"])
    bits, group, symmetric = variant.get("bits"), variant.get("group_size"), variant.get("symmetric")
    parts = [] if bits is None else [f"int{bits}"]
    parts += [] if group is None else ["channel" if group == -1 else f"g{group}"]
    parts += [] if symmetric is None else ["sym" if symmetric else "asym"]
    return " ".join(parts) or ABSENT


def build_columns(report: Record) -> dict[str, Column]:
    """All columns that have a figure in some row, by key; those of a text end in ``:TEXT``."""
    rows = rows_of(report)
    columns = _cost_columns(rows, f"Of {reference_word(report)}")
    for text in texts_of(report):
        columns |= {f"{key}:{text}": column for key, column in _text_columns(rows, text).items()}
    return {key: column for key, column in columns.items() if any(cell.text != ABSENT for cell in column.cells)}


def _cost_columns(rows: Sequence[Record], ratio: str) -> dict[str, Column]:
    whole = figure(rows[0], "size_bytes")
    ratios = [None if size is None or not whole else size / whole for size in _values(rows, "size_bytes")]
    shares = _values(rows, "share")
    if all(share is None or share == 1 for share in shares):
        shares = [None] * len(rows)
    return {
        "size": _bytes("Size", _values(rows, "size_bytes")),
        "ratio": _column(ratio, ratios, percent, "low"),
        "bits": _column("Bits per weight", _values(rows, "bits_per_weight"), lambda value: fixed(value, 2), "low"),
        "file_bits": _column(
            "Bits, whole file", _values(rows, "bits_per_weight_file"), lambda value: fixed(value, 2), "low"
        ),
        "blocks": _column("Of the blocks", shares, percent, "high"),
        "weights": _marked(_bytes("Weights", _values(rows, "memory", "weights_bytes")), rows),
        "peak": _bytes("Peak", _values(rows, "memory", "peak_bytes")),
        "server": _bytes("On a server", _values(rows, "server", "bytes")),
        **_estimate_columns(rows),
        "prefill": _rate("Prefill tokens/s", _values(rows, "speed", "prefill_tokens_per_second")),
        "decode": _rate("Decode tokens/s", _values(rows, "speed", "decode_tokens_per_second")),
        "quantize": _column("Quantize", _values(rows, "seconds", "quantize"), duration, "low"),
        "evaluate": _column("Evaluate", _values(rows, "seconds", "evaluate"), duration, None),
    }


def _estimate_columns(rows: Sequence[Record]) -> dict[str, Column]:
    """What a prefill took at most, beside its estimate; of the whole process where no more is known."""
    told = [pick(row, "memory", "estimates") for row in rows]
    found = [pick(each, "prefill") or pick(each, "process_prefill") for each in told]
    measured, estimated, ratios = (
        [figure(each, key) for each in found] for key in ("measured_bytes", "estimated_bytes", "ratio")
    )
    return {
        "at_prefill": _bytes("At prefill", measured),
        "estimated": _bytes("Estimated", estimated, None),
        "estimate_ratio": _column("Estimated / measured", ratios, lambda value: fixed(value, 2), None),
    }


def is_decoded(row: Record) -> bool:
    """Whether the reference decoder loaded the model, so that its memory and speed are those of float weights."""
    return row.get("loaded_by") == "reference"


def is_streamed(row: Record) -> bool:
    """Whether one block of the model was in memory, so that its memory is that of a block and it has no speed."""
    return row.get("loaded_by") == STREAMED


def _marked(column: Column, rows: Sequence[Record]) -> Column:
    """The same with a mark at the models that were scored with their weights decoded to float, or block by block."""
    marks = [DECODED_MARK if is_decoded(row) else STREAMED_MARK if is_streamed(row) else "" for row in rows]
    cells = [
        replace(cell, text=f"{cell.text} {mark}") if mark and cell.text != ABSENT else cell
        for cell, mark in zip(column.cells, marks, strict=True)
    ]
    return replace(column, cells=tuple(cells))


def _text_columns(rows: Sequence[Record], text: str) -> dict[str, Column]:
    perplexity = _values(rows, "metrics", "perplexity", text)
    base = perplexity[0]
    rises = [None] + [None if value is None or base is None else value - base for value in perplexity[1:]]
    shares = [None if rise is None or not base else 100 * rise / base for rise in rises]
    places = decimals_for(perplexity, digits=4, most=3)
    finer = decimals_for([share for share in shares if share is not None and abs(share) >= 0.01], 1, least=1, most=2)
    return {
        "perplexity": _column("Perplexity", perplexity, lambda value: fixed(value, places), "low"),
        "rise": _column("Δ", rises, lambda value: signed(value, places), None),
        "share": _column("Δ %", shares, lambda value: signed(value, finer, "%"), None),
        **_divergence_columns(rows, text),
        "top1": _column("Top-1", _values(rows, "metrics", "top1_agreement", text), percent, "high"),
    }


def _divergence_columns(rows: Sequence[Record], text: str) -> dict[str, Column]:
    means, errors, medians, p99s = (
        _values(rows, "metrics", "kl_divergence", text, field) for field in ("mean", "stderr", "median", "p99")
    )
    places = decimals_for(means, most=5)
    column = _column("KL mean", means, lambda value: fixed(value, places), "low")
    spread = [
        cell if error is None else replace(cell, text=f"{cell.text} {margin(error, places)}")
        for cell, error in zip(column.cells, errors, strict=True)
    ]
    known = any(error is not None for error in errors)
    return {
        "mean": column,
        "kl": Column("KL mean ± stderr", tuple(spread)) if known else column,
        "median": _column("KL median", medians, _fixed_writer(medians, places), "low"),
        "p99": _column("KL p99", p99s, _fixed_writer(p99s, places), "low"),
    }


def _fixed_writer(values: list[float | None], most: int) -> Callable[[float | None], str]:
    places = decimals_for(values, most=most)
    return lambda value: fixed(value, places)


def _values(rows: Sequence[Record], *path: str) -> list[float | None]:
    return [figure(row, *path) for row in rows]


def _bytes(title: str, values: list[float | None], better: Better | None = "low") -> Column:
    name, size = byte_unit(values)
    places = 0 if size == 1 else 2 if name == "GiB" else 1
    return _column(f"{title}, {name}", values, lambda v: fixed(None if v is None else v / size, places), better)


def _rate(title: str, values: list[float | None]) -> Column:
    places = 0 if min((value for value in values if value), default=0.0) >= 100 else 1
    return _column(title, values, lambda value: fixed(value, places), "high")


def _column(
    title: str, values: list[float | None], write: Callable[[float | None], str], better: Better | None
) -> Column:
    """Write a column; the first row is the float model's and takes no part in the contest."""
    contest = [value for value in values[1:] if value is not None]
    best = None
    if better is not None and len(set(contest)) > 1:
        best = min(contest) if better == "low" else max(contest)
    marks = [False] + [value is not None and value == best for value in values[1:]]
    return Column(title, tuple(Cell(write(value), mark) for value, mark in zip(values, marks, strict=True)))
