"""The tokens at which a model departs furthest from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PER_WINDOW = 3
PER_TEXT = 192
CONTEXT_TOKENS = 24


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
