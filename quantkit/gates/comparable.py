"""Whether two figures may be compared at all, and why not."""

from __future__ import annotations

from quantkit.gates.metrics import METRICS
from quantkit.run_history.record import TextRecord, VariantRecord


def why_not(metric: str, text: str | None, now: VariantRecord, then: VariantRecord) -> str | None:
    """Why a figure of two files cannot be compared; None where it can.

    Losses on a text need the same tokens, context length, dtype and class of device; speeds the same machine and
    runtime, memory the same class of device and runtime; sizes nothing.
    """
    for record, whose in ((now, "this run's"), (then, "the other's")):
        if record.status != "ok":
            return f"{whose} variant failed: {record.error}" if record.error else f"{whose} variant failed"
    spread = METRICS[metric].spread
    if text is not None and METRICS[metric].implied:
        return _counts_differ(metric, text, now, then) or _apart(now, then, "device", "dtype")
    if text is not None:
        return _texts_differ(text, now.texts.get(text), then.texts.get(text)) or _apart(now, then, "device", "dtype")
    if spread == "timings":
        return _apart(now, then, "device", "cpu", "threads", "dtype", "loaded_by")
    if metric == "memory":
        return _apart(now, then, "device", "loaded_by")
    return None


_WORDS = {
    "device": "scored on {0}, and the other on {1}",
    "cpu": "scored on the processor {0}, and the other on {1}",
    "threads": "scored with {0} threads, and the other with {1}",
    "dtype": "computed in {0}, and the other in {1}",
    "loaded_by": "loaded by {0}, and the other by {1}",
}


def _texts_differ(name: str, now: TextRecord | None, then: TextRecord | None) -> str | None:
    if now is None or then is None:
        return f"text {name} was not scored in {'this run' if now is None else 'the other'}"
    if now.context_length != then.context_length:
        return (
            f"text {name} was scored at context length {now.context_length}, and in the other at {then.context_length}"
        )
    if now.token_ids_sha256 != then.token_ids_sha256:
        return f"text {name} has other tokens than in the other"
    return None


def _counts_differ(metric: str, name: str, now: VariantRecord, then: VariantRecord) -> str | None:
    def figures(field: str) -> list[float | None]:
        return [record.figures.get((metric, name, field)) for record in (now, then)]

    (here, there), (prompts, others) = figures("samples"), figures("prompts_checksum")
    if here != there:
        return f"{name} was taken over {here or 0:g} samples, and in the other over {there or 0:g}"
    return None if prompts == others else f"{name} was taken on other prompts than in the other"


def _apart(now: VariantRecord, then: VariantRecord, *conditions: str) -> str | None:
    for condition in conditions:
        here, there = getattr(now, condition), getattr(then, condition)
        if here != there:
            return _WORDS[condition].format(here or "unknown", there or "unknown")
    return None
