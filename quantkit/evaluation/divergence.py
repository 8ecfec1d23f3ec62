"""Divergence from the float model: its mean and spread over a text, and the tokens at which it is largest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PER_WINDOW = 3
PER_TEXT = 192
CONTEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of a figure over all scored positions of a text.

    Attributes:
        mean: over positions.
        stderr: standard error of the mean; None with a single position.
        median, p99, p999: quantiles over positions; ``p999`` is that of 99.9 %.
        max: the largest.
        stderr_over: ``windows`` or ``tokens``, what was taken as independent for ``stderr``.
    """

    mean: float
    stderr: float | None
    median: float
    p99: float
    p999: float
    max: float
    stderr_over: str


def summarize(values: torch.Tensor) -> Summary:
    """Summarize a float64 ``[windows, positions]`` tensor of a figure per scored position.

    Tokens of one window share their context, so windows are taken as the independent units; with a single
    window the tokens are, and the standard error is then too small where neighbours resemble each other.
    """
    clusters = values if values.shape[0] > 1 else values.reshape(-1, 1)
    middle, high, highest = np.quantile(values.numpy(), (0.5, 0.99, 0.999)).tolist()
    return Summary(
        mean=values.mean().item(),
        stderr=clustered_stderr(clusters),
        median=middle,
        p99=high,
        p999=highest,
        max=values.max().item(),
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


@dataclass(frozen=True, slots=True)
class Departure:
    """A scored position, and what the two models say there.

    Attributes:
        window: index of the window.
        row: index among the window's scored positions; the token that is predicted stands at ``row + 1``.
        kl: ``KL(reference || model)``, nats.
        nll: negative log-likelihood of the text's token, nats.
        expected: id of the reference's likeliest token.
        predicted: id of the model's likeliest token.
    """

    window: int
    row: int
    kl: float
    nll: float
    expected: int
    predicted: int


def departures(
    kl: torch.Tensor, nll: torch.Tensor, expected: torch.Tensor, predicted: torch.Tensor
) -> tuple[Departure, ...]:
    """The :data:`PER_WINDOW` furthest positions of each window, at most :data:`PER_TEXT` in all, the furthest first.

    Args:
        kl, nll: float64 ``[windows, positions]``.
        expected, predicted: int64 ``[windows, positions]``.
    """
    rows = kl.topk(min(PER_WINDOW, kl.shape[1]), dim=1).indices
    found = [
        Departure(
            window,
            row,
            kl[window, row].item(),
            nll[window, row].item(),
            int(expected[window, row]),
            int(predicted[window, row]),
        )
        for window, of_window in enumerate(rows.tolist())
        for row in of_window
    ]
    found.sort(key=lambda departure: (-departure.kl, departure.window, departure.row))
    return tuple(found[:PER_TEXT])


def in_words(
    found: tuple[Departure, ...], ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Departures as JSON data, with what stands before them in the text and the tokens as text.

    Args:
        found: the departures.
        ids: int64 ``[windows, length]``, the text.
        tokenizer: the model's.
    """

    def text(tokens: list[int]) -> str:
        written: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return written

    described = []
    for each in found:
        window = ids[each.window].tolist()
        described.append(
            {
                "window": each.window,
                "position": each.row + 1,
                "kl_divergence": each.kl,
                "nll": each.nll,
                "context": text(window[max(0, each.row + 1 - CONTEXT_TOKENS) : each.row + 1]),
                "token": text([window[each.row + 1]]),
                "expected": text([each.expected]),
                "predicted": text([each.predicted]),
            }
        )
    return described
