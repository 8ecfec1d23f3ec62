"""Score a model on the windows of a text: likelihood, and divergence from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.divergence import Departure, Summary, departures, summarize
from quantkit.evaluation.divergence_table import divergence_table
from quantkit.evaluation.reference import TextReader, TextWriter
from quantkit.evaluation.texts import Windows
from quantkit.runtimes.base import LoadedModel

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits handled at once. On a CPU 8 MB of float32, which its caches still hold from one pass to the next; on CUDA 256
MB, enough to fill the device, of which about five copies are there at a time."""
FIGURES = ("lowest", "nll", "kl", "agrees", "expected", "predicted")
"""What is taken of each scored position: the least log-probability, the negative log-likelihood and the divergence in
nats, whether the likeliest tokens are the same, and their ids. All are exact in float64."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """How a model does on one text.

    Attributes:
        nll_sum: sum of the negative log-likelihoods of the scored tokens, in nats.
        nll_count: number of scored tokens.
        kl: ``KL(reference || model)`` per scored token in nats over the whole vocabulary; None without reference.
        top1_agreement: share of scored tokens whose likeliest prediction is the reference's; None without.
        nll_by_window, kl_by_window: sums over each window's scored tokens, in nats; without reference no divergence.
        agreements_by_window: how many of each window's scored tokens agree.
        table: llama.cpp's figures, see :func:`quantkit.evaluation.divergence_table.divergence_table`.
        departures: the tokens at which the model is furthest from the reference.
        positions: all figures, float64 ``[figures, windows, positions]`` in the order of :data:`FIGURES`.
    """

    nll_sum: float
    nll_count: int
    kl: Summary | None = None
    top1_agreement: float | None = None
    nll_by_window: tuple[float, ...] = ()
    kl_by_window: tuple[float, ...] | None = None
    agreements_by_window: tuple[int, ...] | None = None
    table: Mapping[str, Any] | None = None
    departures: tuple[Departure, ...] = ()
    positions: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood; infinity where that overflows."""
        try:
            return math.exp(self.nll_sum / self.nll_count)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def score(
    model: LoadedModel,
    windows: Windows,
    *,
    reference: TextReader | None = None,
    writer: TextWriter | None = None,
    on_window: Callable[[int, int], None] | None = None,
    known: torch.Tensor | None = None,
) -> TextScore:
    """Score a model on a text, one window at a time.

    One window's logits are in memory at a time, and few rows of them more than once. Figures stay on the model's device
    until a window is done.

    Args:
        model: as a runtime has loaded it.
        windows: the text.
        reference: the float model's distributions on the same windows, to compare with.
        writer: receives this model's distributions, to be compared with.
        on_window: called with the number of windows done and their total.
        known: ``positions`` of the score of the first windows, which are not read again.

    Raises:
        EvaluationError: a logit is NaN or infinite; the text and the window are named. Or the model's
            distributions are not of the size of the reference's.
    """
    count, rows = windows.ids.shape[0], windows.scored_per_window
    figures = torch.zeros(len(FIGURES), count, rows, dtype=torch.float64)
    begun = 0 if known is None else known.shape[1]
    if known is not None:
        figures[:, :begun] = known
    for window, ids in enumerate(windows.ids[begun:], start=begun):
        start = 0
        for part in model.logits_in_parts(ids):
            logits, targets = part[: rows - start], ids[1 + start : 1 + start + len(part)]
            _check_width(logits.shape[-1], reference, writer)
            expected = None if reference is None else partial(_rows_after, reference, window * rows + start)
            stop = start + len(logits)
            figures[:, window, start:stop] = window_figures(logits, targets, expected, writer).cpu()
            start = stop
            del logits, part
        if not figures[FIGURES.index("lowest"), window].isfinite().all():
            raise EvaluationError(
                f"the model gives NaN or infinite logits in window {window} of text '{windows.name}'",
                "its weights are broken, or its activations overflow: try evaluation.dtype float32",
            )
        if on_window is not None:
            on_window(window + 1, count)
    return _text_score(figures, reference)


def window_figures(
    logits: torch.Tensor,
    targets: torch.Tensor,
    expected: Callable[[int, int], torch.Tensor] | None,
    writer: TextWriter | None,
) -> torch.Tensor:
    """Float64 ``[figures, rows]`` of one window on the device of its logits, in the order of :data:`FIGURES`.

    Args:
        logits: ``[rows, vocabulary]``.
        targets: int64 ``[rows]``, the tokens that follow.
        expected: gives rows of the reference's distributions, in which the likeliest tokens stand at zero; without it
            nothing is compared.
        writer: receives the log-probabilities.
    """
    device, (rows, vocabulary) = logits.device, logits.shape
    targets = targets.to(device)
    figures = torch.zeros(len(FIGURES), rows, dtype=torch.float64, device=device)
    lowest, nll, kl, agrees, likely, predicted = figures
    step = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        log_probs = torch.log_softmax(logits[chunk].float(), dim=-1)
        lowest[chunk] = log_probs.amin(dim=-1)
        nll[chunk] = -log_probs.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
        if writer is not None:
            writer.append(log_probs, nll[chunk])
        if expected is not None:
            shifted = expected(chunk.start, chunk.stop).to(device).float()
            likeliest = log_probs.max(dim=-1, keepdim=True).indices
            agrees[chunk] = shifted.gather(1, likeliest).squeeze(1) == 0
            likely[chunk], predicted[chunk] = shifted.argmax(dim=-1), likeliest.squeeze(1)
            distribution = torch.log_softmax(shifted, dim=-1)
            kl[chunk] = distribution.exp().mul_(distribution.sub_(log_probs)).sum(dim=-1)
    return figures


def _rows_after(reference: TextReader, first: int, start: int, stop: int) -> torch.Tensor:
    return reference.rows(first + start, first + stop)


def _check_width(logits: int, reference: TextReader | None, writer: TextWriter | None) -> None:
    stored = reference or writer
    if stored is not None and logits != stored.vocabulary:
        raise EvaluationError(
            f"the model gives {logits} logits a token, and the reference is for {stored.vocabulary}",
            "mend vocab_size in config.json, or compare checkpoints of the same model",
        )


def _text_score(positions: torch.Tensor, reference: TextReader | None) -> TextScore:
    """The score of a text from the figures of its positions, float64 ``[figures, windows, positions]``."""
    figures = dict(zip(FIGURES, positions, strict=True))
    nll, kl, agrees = figures["nll"], figures["kl"], figures["agrees"]
    alone = TextScore(nll.sum().item(), nll.numel(), nll_by_window=_sums(nll), positions=positions)
    if reference is None:
        return alone
    return replace(
        alone,
        kl=summarize(kl),
        top1_agreement=agrees.mean().item(),
        kl_by_window=_sums(kl),
        agreements_by_window=tuple(agrees.sum(dim=1).long().tolist()),
        table=divergence_table(nll, reference.nll[: nll.numel()].view_as(nll), kl, agrees),
        departures=departures(kl, nll, figures["expected"].long(), figures["predicted"].long()),
    )


def _sums(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.sum(dim=1).tolist())
