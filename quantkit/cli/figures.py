"""The figures of one checkpoint as a table: what `quantkit evaluate` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.system.units import in_units

if TYPE_CHECKING:
    from quantkit.system.fitted_table import FittedTable

MAIN = ("mean", "value")
"""The names under which a figure that has others beside it is told."""
LEFT_OUT = ("stderr", "prompts_checksum")


def figure_table(found: Mapping[str, Any], title: str) -> FittedTable:
    """The result of :func:`quantkit.evaluate`, a figure a row.

    Args:
        found: the result.
        title: above the table.
    """
    from rich.text import Text

    from quantkit.system.fitted_table import FittedTable, Shown

    rows = [*_of_texts(found.get("metrics") or {}), *_of_the_reference(found), *_of_the_whole(found)]
    heads = (("figure", 0, False), ("text", 1, False), ("value", 0, True))
    shown = [
        Shown(head, [Text(cell) for cell in column], rank, number)
        for (head, rank, number), column in zip(heads, zip(*rows, strict=True), strict=True)
    ]
    return FittedTable(shown, title=title, remedy="--json has all")


def _of_texts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for metric, by_text in metrics.items():
        for text, figure in by_text.items():
            if not isinstance(figure, Mapping):
                yield metric, text, _number(figure)
                continue
            error = figure.get("stderr")
            spread = "" if error is None else f" ± {error:.2g}"
            for name, value in figure.items():
                if name not in LEFT_OUT and _is_number(value):
                    yield (metric, text, f"{_number(value)}{spread}") if name in MAIN else (
                        f"{metric}, {name}", text, _number(value)
                    )  # fmt: skip


def _of_the_reference(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The float model's perplexity, where there is one to compare with."""
    for text, facts in (found.get("texts") or {}).items():
        if (divergence := facts.get("divergence")) is not None:
            yield "perplexity of the float model", text, _number(divergence["perplexity_reference"]["value"])


def _of_the_whole(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "size", "", in_units(found["size_bytes"])
    memory, speed = found.get("memory") or {}, found.get("speed") or {}
    if memory.get("peak_bytes") is not None:
        yield f"memory, peak ({memory.get('peak_kind')})", "", in_units(memory["peak_bytes"])
    for phase in ("prefill", "decode"):
        if speed.get(phase):
            yield f"speed, {phase}", "", _rate(speed[phase]["tokens_per_second"])
    for batch in speed.get("batches") or []:
        for phase in ("prefill", "decode"):
            told = batch.get("missing") or _rate(batch[f"{phase}_tokens_per_second"])
            yield f"speed, {phase} of {batch['size']} rows", "", told
    yield "loaded by", "", str(found.get("loaded_by"))
    if found.get("rounded_inputs"):
        yield "inputs rounded to", "", ", ".join(found["rounded_inputs"])


def _rate(value: float) -> str:
    return f"{value:.4g} tokens/s"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
