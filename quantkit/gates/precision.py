"""How precisely the figures of a file on a text are known: standard errors as shares of what is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import variance
from typing import Any


def relative_error(row: Mapping[str, Any], baseline: Mapping[str, Any], text: str) -> float | None:
    """The larger one of two relative standard errors, over windows; None where neither can be known.

    That of the mean KL divergence, and that of the perplexity over the float model's, which is the standard error of
    the mean difference of negative log-likelihoods on the same windows, in nats.

    Args:
        row, baseline: ``metrics`` and ``texts`` of the file and of the float model, as a report has them.
        text: name of the text.
    """
    found = [_of_divergence(row, text), _of_perplexity(row, baseline, text)]
    return max((error for error in found if error is not None), default=None)


def _of_divergence(row: Mapping[str, Any], text: str) -> float | None:
    summary = row["metrics"].get("kl_divergence", {}).get(text)
    if summary is None or summary["stderr"] is None:
        return None
    if summary["stderr"] == 0:
        return 0.0
    return math.inf if summary["mean"] <= 0 else float(summary["stderr"] / summary["mean"])


def _of_perplexity(row: Mapping[str, Any], baseline: Mapping[str, Any], text: str) -> float | None:
    if text not in row["metrics"].get("perplexity", {}):
        return None
    own, other = (each["texts"][text] for each in (row, baseline))
    apart = [a - b for a, b in zip(own["nll_by_window"], other["nll_by_window"], strict=True)]
    if len(apart) < 2:
        return None
    return math.sqrt(variance(apart) * len(apart)) / float(own["nll_count"])
