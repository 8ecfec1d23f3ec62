"""A figure of one file beside the same figure of another: whether they may be compared, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.gates import noise
from quantkit.gates.metrics import METRICS
from quantkit.gates.noise import Difference, Spread
from quantkit.gates.record import TextRecord, VariantRecord

TIMINGS = {"prefill_tokens_per_second": "prefill", "decode_tokens_per_second": "decode"}
_WORDS = {
    "device": "scored on {0}, and the other on {1}",
    "cpu": "scored on the processor {0}, and the other on {1}",
    "threads": "scored with {0} threads, and the other with {1}",
    "dtype": "computed in {0}, and the other in {1}",
    "loaded_by": "loaded by {0}, and the other by {1}",
}


def compare(
    metric: str,
    figure: str | None,
    text: str | None,
    now: VariantRecord,
    then: VariantRecord,
    spreads: Mapping[str, Spread] | None = None,
) -> Difference | str:
    """The difference of a figure of two files, or why it cannot be told.

    Args:
        metric, figure, text: which; see :class:`quantkit.gates.syntax.Gate`.
        now, then: the two files.
        spreads: of speeds from run to run, by figure; None for two files of one run. The noise of a speed that has none
            here is not known.
    """
    reason = why_not(metric, text, now, then)
    if reason is not None:
        return reason
    key = (metric, text or "", figure or "")
    here, there = now.figures.get(key), then.figures.get(key)
    if here is None or there is None:
        return f"{'this run' if here is None else 'the other'} has no finite figure for it"
    if here == there:
        found = _measured(metric, key, now, then, spreads) if there > 0 else None
        return found or Difference(0.0, 0.0, 0.0, 0.0)
    if there <= 0:
        return f"the other's figure is {there:g}, of which there are no shares"
    return _measured(metric, key, now, then, spreads)


def _measured(
    metric: str,
    key: tuple[str, str, str],
    now: VariantRecord,
    then: VariantRecord,
    spreads: Mapping[str, Spread] | None,
) -> Difference:
    about = METRICS[metric]
    here, there, (_, text, figure) = now.figures[key], then.figures[key], key
    if about.spread is None or (about.comparable and figure not in about.comparable):
        return noise.unknown(here, there, lower_is_better=about.lower_is_better)
    if about.spread in ("likelihood", "divergence", "agreement"):
        found = _of_windows(about.spread, now.texts[text], then.texts[text])
        return found or noise.unknown(here, there, lower_is_better=about.lower_is_better)
    if about.spread == "timings":
        if spreads is not None and figure not in spreads:
            return noise.unknown(here, there, lower_is_better=False)
        name = TIMINGS[figure]
        samples = now.timings.get(name, ()), then.timings.get(name, ())
        return noise.of_timings(here, there, *samples, None if spreads is None else spreads[figure])
    if about.spread == "stderr":
        errors = now.figures.get((metric, text, "stderr")), then.figures.get((metric, text, "stderr"))
        if errors[0] is not None and errors[1] is not None:
            return noise.of_stderrs(here, there, errors[0], errors[1], lower_is_better=about.lower_is_better)
        return noise.unknown(here, there, lower_is_better=about.lower_is_better)
    return noise.exact(here, there, lower_is_better=about.lower_is_better)


def _of_windows(spread: str, now: TextRecord, then: TextRecord) -> Difference | None:
    if spread == "likelihood":
        return noise.of_likelihoods(now.nll, then.nll, now.tokens_per_window)
    if spread == "divergence" and now.kl is not None and then.kl is not None:
        return noise.of_ratios(now.kl, then.kl, lower_is_better=True)
    if spread == "agreement" and now.agreements is not None and then.agreements is not None:
        return noise.of_ratios(now.agreements, then.agreements, lower_is_better=False)
    return None


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
