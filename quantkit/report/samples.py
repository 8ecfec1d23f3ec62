"""Samples side by side: of each prompt what the float model writes, and what each variant does, to where they part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.report.columns import Record, reference_name, rows_of
from quantkit.report.numbers import count, figure, pick

BRIEF = 160
"""Characters of a prompt in Markdown."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model writes.

    Attributes:
        name: of the variant, or of what it is compared with.
        pieces: the text before the token at which it parts from the float model's, that token, and what follows.
        note: where it parts, or for the float model whether it ended by itself.
        parts: whether it parts at all.
        reference: whether it is the float model's.
    """

    name: str
    pieces: tuple[str, str, str]
    note: str
    parts: bool = False
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with its continuations, the float model's first."""

    prompt: str
    continuations: list[Continuation]


@dataclass(frozen=True, slots=True)
class Samples:
    """All of a report.

    Attributes:
        lead: whence the prompts are, and how much was written.
        kept: of each variant the name, and how many tokens it has in common with the float model, in words.
        items: by prompt.
    """

    lead: str
    kept: list[tuple[str, str]]
    items: list[Sample]


def build_samples(report: Record) -> Samples | None:
    """What the report has to read; None where no model was given prompts."""
    base = _items(report.get("baseline") or {})
    models = [
        (str(row["name"]), _items(found)) for row, found in zip(report["variants"], rows_of(report)[1:], strict=True)
    ]
    models = [(name, items) for name, items in models if items]
    prompts = [str(item.get("prompt", "")) for item in base or (models[0][1] if models else [])]
    if not prompts:
        return None
    name = reference_name(report)
    found = []
    for place, prompt in enumerate(prompts):
        own = [_continuation(name, base[place], reference=True)] if base else []
        others = [_continuation(each, items[place]) for each, items in models if place < len(items)]
        found.append(Sample(prompt, own + others))
    return Samples(_lead(report), [(each, _kept(items)) for each, items in models] if base else [], found)


def brief(text: str) -> str:
    """A prompt on one line, its end where it is long: there stands what is asked."""
    line = " ".join(text.split())
    return line if len(line) <= BRIEF else f"…{line[-BRIEF:]}"


def _items(row: Record) -> list[Record]:
    found = pick(row, "samples", "items")
    return [dict(item) for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _continuation(name: str, item: Record, *, reference: bool = False) -> Continuation:
    given = item.get("pieces")
    pieces: Any = [str(piece) for piece in given] if isinstance(given, list) else []
    before, token, after = pieces if len(pieces) == 3 else ("".join(pieces), "", "")
    parts, ended = figure(item, "parts_at"), item.get("end") is not None
    if reference:
        return Continuation(name, (before, token, after), "ends here" if ended else "", reference=True)
    note = "the same" if parts is None else f"parts after {_tokens(parts)}" if parts else "parts at once"
    return Continuation(name, (before, token, after), note, parts is not None)


def _kept(items: list[Record]) -> str:
    """How far a variant goes with the float model, over all prompts."""
    whole = sum(item.get("parts_at") is None for item in items)
    places = [parts for item in items if (parts := figure(item, "parts_at")) is not None]
    words = f"{whole} of {len(items)} the same"
    return f"{words}; the others part after {_tokens(sum(places) / len(places))} on average" if places else words


def _tokens(number: float) -> str:
    return f"{count(number)} token" + ("" if round(number) == 1 else "s")


def _lead(report: Record) -> str:
    rows = [report.get("baseline") or {}, *report["variants"]]
    about: Any = next((found for row in rows if (found := pick(row, "samples"))), {})
    origin, limit = str(about.get("origin") or ""), count(figure(about, "max_new_tokens"))
    whence = f"Prompts of {origin}" if origin.startswith("evaluation.") else f"Prompts from {origin}"
    return f"{whence}, continued by the likeliest tokens, {limit} at most. The first token that is another is marked."
