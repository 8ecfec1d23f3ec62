"""A figure of one file beside the same figure of another, with the noise of their difference."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.gates import noise
from quantkit.gates.comparable import why_not
from quantkit.gates.metrics import METRICS
from quantkit.gates.noise import Difference, Spread
from quantkit.run_history.record import TextRecord, VariantRecord

TIMINGS = {"prefill_tokens_per_second": "prefill", "decode_tokens_per_second": "decode"}


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
