"""The table that ``llama-perplexity --kl-divergence`` prints, of any model's scored tokens.

Figures are defined as in llama.cpp's ``tools/perplexity/perplexity.cpp``: ``Δp`` is the probability that the model
gives to the text's own token less what the reference gives it, quantiles lie on a line between neighbours, and the
ratio of perplexities has its error from the differences of paired tokens. Two things differ. Standard errors take
windows as independent and not tokens, as all of quantkit's do; with windows of one token they are llama.cpp's. And
every scored token counts over the whole vocabulary, where llama.cpp takes the second half of each window and leaves out
tokens of which the reference's log-probability is below -16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from quantkit.evaluation.divergence import clustered_stderr
from quantkit.system.units import finite

QUANTILES = {
    "max": 1.0,
    "p999": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "p75": 0.75,
    "median": 0.5,
    "p25": 0.25,
    "p10": 0.1,
    "p5": 0.05,
    "p1": 0.01,
    "p01": 0.001,
    "min": 0.0,
}
"""Names of quantiles, the largest first; ``p01`` is that of 0.1 %."""


def divergence_table(
    nll: torch.Tensor, reference_nll: torch.Tensor, kl: torch.Tensor, agrees: torch.Tensor
) -> dict[str, Any]:
    """All figures of a text; a standard error is None where a single token is scored.

    Args:
        nll, reference_nll: float64 ``[windows, positions]``, negative log-likelihood of the text's tokens in nats, of
            the model and of the reference.
        kl: float64, ``KL(reference || model)`` in nats.
        agrees: float64, 1 where the likeliest tokens are the same.

    Returns:
        ``tokens``; ``perplexity``, ``perplexity_reference``, ``perplexity_ratio``, ``ln_perplexity_ratio``,
        ``perplexity_difference`` and ``same_top``, each ``value`` and ``stderr``; ``correlation`` of the two
        log-perplexities; ``kl_divergence`` and ``delta_p``, each ``mean``, ``stderr`` and :data:`QUANTILES`;
        and ``rms_delta_p``.
    """
    apart = nll - reference_nll
    own, other, ratio = (math.exp(min(each.mean().item(), 700.0)) for each in (nll, reference_nll, apart))
    delta = (-nll).exp() - (-reference_nll).exp()
    rms = math.sqrt(delta.square().mean().item())
    return {
        "tokens": nll.numel(),
        "perplexity": _scaled(nll, own),
        "perplexity_reference": _scaled(reference_nll, other),
        "correlation": _correlation(nll, reference_nll),
        "ln_perplexity_ratio": {"value": apart.mean().item(), "stderr": _stderr(apart)},
        "perplexity_ratio": _scaled(apart, ratio),
        "perplexity_difference": {"value": own - other, "stderr": _stderr(own * nll - other * reference_nll)},
        "kl_divergence": _spread(kl),
        "delta_p": _spread(delta),
        "rms_delta_p": {"value": rms, "stderr": _stderr(delta.square() * (0.5 / rms)) if rms else None},
        "same_top": {"value": agrees.mean().item(), "stderr": _stderr(agrees)},
    }


def quantiles(values: torch.Tensor) -> dict[str, float]:
    """:data:`QUANTILES` of float64 values, between neighbours on a line."""
    found = np.quantile(values.numpy(), list(QUANTILES.values())).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def _spread(values: torch.Tensor) -> dict[str, float | None]:
    return {"mean": values.mean().item(), "stderr": _stderr(values), **quantiles(values)}


def _scaled(logs: torch.Tensor, value: float) -> Mapping[str, float | None]:
    """``exp`` of a mean, with the error that its slope makes of the mean's."""
    error = _stderr(logs)
    return {"value": value, "stderr": None if error is None else finite(value * error)}


def _stderr(values: torch.Tensor) -> float | None:
    return clustered_stderr(_clusters(values))


def _correlation(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """Of the means' errors, so of the sums of windows."""
    sums = [_clusters(each).sum(dim=1) for each in (left, right)]
    first, second = (each - each.mean() for each in sums)
    size = (first.square().sum() * second.square().sum()).sqrt().item()
    return (first * second).sum().item() / size if size else None


def _clusters(values: torch.Tensor) -> torch.Tensor:
    return values if values.shape[0] > 1 else values.reshape(-1, 1)
