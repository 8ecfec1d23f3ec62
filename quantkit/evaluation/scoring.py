"""Score a model on the windows of a text: likelihood, and divergence from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.divergence import Departure, Summary, departures, summarize
from quantkit.evaluation.reference import TextReader, TextWriter
from quantkit.evaluation.texts import Windows
from quantkit.runtimes.base import LoadedModel

CHUNK_ELEMENTS = 1 << 21
"""Logits handled at once: 8 MB of float32, which a CPU's caches still hold from one pass to the next."""


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
        departures: the tokens at which the model is furthest from the reference.
    """

    nll_sum: float
    nll_count: int
    kl: Summary | None = None
    top1_agreement: float | None = None
    nll_by_window: tuple[float, ...] = ()
    kl_by_window: tuple[float, ...] | None = None
    agreements_by_window: tuple[int, ...] | None = None
    departures: tuple[Departure, ...] = ()

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
) -> TextScore:
    """Score a model on a text, one window at a time.

    One window's logits are in memory at a time, and few rows of them more than once.

    Args:
        model: as a runtime has loaded it.
        windows: the text.
        reference: the float model's distributions on the same windows, to compare with.
        writer: receives this model's distributions, to be compared with.
        on_window: called with the number of windows done and their total.

    Raises:
        EvaluationError: a logit is NaN or infinite; the text and the window are named. Or the model's
            distributions are not of the size of the reference's.
    """
    count, rows = windows.ids.shape[0], windows.scored_per_window
    tally = _Tally(windows)
    for window, ids in enumerate(windows.ids):
        logits = model.logits(ids)[:-1]
        ids = ids.to(logits.device)
        _check_width(logits.shape[-1], reference, writer)
        step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            log_probs = torch.log_softmax(logits[start:stop].float(), dim=-1)
            tally.add_likelihood(window, start, log_probs, ids[start + 1 : stop + 1])
            if writer is not None:
                writer.append(log_probs)
            if reference is not None:
                expected = reference.rows(window * rows + start, window * rows + stop)
                tally.add_comparison(window, start, log_probs, expected)
        del logits
        if on_window is not None:
            on_window(window + 1, count)
    return tally.result(compared=reference is not None)


def _check_width(logits: int, reference: TextReader | None, writer: TextWriter | None) -> None:
    stored = reference or writer
    if stored is not None and logits != stored.vocabulary:
        raise EvaluationError(
            f"the model gives {logits} logits a token, and the reference is for {stored.vocabulary}",
            "mend vocab_size in config.json, or compare checkpoints of the same model",
        )


class _Tally:
    """Figures per scored position, ``[windows, positions]``, as they come in."""

    def __init__(self, windows: Windows) -> None:
        shape = (windows.ids.shape[0], windows.scored_per_window)
        self._text = windows.name
        self._nll = torch.zeros(shape, dtype=torch.float64)
        self._kl = torch.zeros(shape, dtype=torch.float64)
        self._agrees = torch.zeros(shape, dtype=torch.bool)
        self._expected = torch.zeros(shape, dtype=torch.int64)
        self._predicted = torch.zeros(shape, dtype=torch.int64)

    def add_likelihood(self, window: int, start: int, log_probs: torch.Tensor, targets: torch.Tensor) -> None:
        if not log_probs.amin().isfinite():
            raise EvaluationError(
                f"the model gives NaN or infinite logits in window {window} of text '{self._text}'",
                "its weights are broken, or its activations overflow: try evaluation.dtype float32",
            )
        nll = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
        self._nll[window, start : start + len(nll)] = nll.double().cpu()

    def add_comparison(self, window: int, start: int, log_probs: torch.Tensor, stored: torch.Tensor) -> None:
        """Compare with rows of a reference, in which the likeliest tokens stand at zero."""
        shifted = stored.to(log_probs.device, torch.float32)
        likeliest = log_probs.max(dim=-1, keepdim=True).indices
        agrees = shifted.gather(1, likeliest).squeeze(1) == 0
        expected = torch.log_softmax(shifted, dim=-1)
        kl = expected.exp().mul_(expected.sub_(log_probs)).sum(dim=-1)
        rows = slice(start, start + len(kl))
        self._kl[window, rows] = kl.double().cpu()
        self._agrees[window, rows] = agrees.cpu()
        self._expected[window, rows] = shifted.argmax(dim=-1).cpu()
        self._predicted[window, rows] = likeliest.squeeze(1).cpu()

    def result(self, *, compared: bool) -> TextScore:
        alone = TextScore(self._nll.sum().item(), self._nll.numel(), nll_by_window=_sums(self._nll))
        if not compared:
            return alone
        return replace(
            alone,
            kl=summarize(self._kl),
            top1_agreement=self._agrees.double().mean().item(),
            kl_by_window=_sums(self._kl),
            agreements_by_window=tuple(self._agrees.sum(dim=1).tolist()),
            departures=departures(self._kl, self._nll, self._expected, self._predicted),
        )


def _sums(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.sum(dim=1).tolist())
