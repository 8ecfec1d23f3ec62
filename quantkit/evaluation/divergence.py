"""Summaries of per-token figures whose neighbours are correlated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of a figure over all scored positions of a text.

    Attributes:
        mean: over positions.
        stderr: standard error of the mean; None with a single position.
        median, p99: quantiles over positions.
        stderr_over: ``windows`` or ``tokens``, what was taken as independent for ``stderr``.
    """

    mean: float
    stderr: float | None
    median: float
    p99: float
    stderr_over: str


def summarize(values: torch.Tensor) -> Summary:
    """Summarize a float64 ``[windows, positions]`` tensor of a figure per scored position.

    Tokens of one window share their context, so windows are taken as the independent units; with a single
    window the tokens are, and the standard error is then too small where neighbours resemble each other.
    """
    clusters = values if values.shape[0] > 1 else values.reshape(-1, 1)
    middle, high = np.quantile(values.numpy(), (0.5, 0.99)).tolist()
    return Summary(
        mean=values.mean().item(),
        stderr=clustered_stderr(clusters),
        median=middle,
        p99=high,
        stderr_over="windows" if values.shape[0] > 1 else "tokens",
    )


def clustered_stderr(clusters: torch.Tensor) -> float | None:
    """Standard error of the mean of ``[K, n]`` values, with the K rows as independent clusters.

    ``sqrt(K / (K - 1) * sum_k (S_k - n * mean)**2) / (K * n)`` with ``S_k`` the sum of row ``k``: the
    cluster-robust variance of a mean (Cameron and Miller 2015, "A practitioner's guide to cluster-robust
    inference", with only a constant as regressor). With ``n = 1`` it is the textbook ``s / sqrt(K)``.

    Returns:
        None for a single cluster, of which no spread can be known.
    """
    count, size = clusters.shape
    if count < 2:
        return None
    residuals = clusters.sum(dim=1) - size * clusters.mean()
    variance = residuals.square().sum().item() * count / (count - 1)
    return math.sqrt(variance) / (count * size)
