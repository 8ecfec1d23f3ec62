"""How far the logits of a runtime are from those of the reference."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """One prompt.

    Attributes:
        tokens: of the prompt.
        kl: mean of ``KL(reference || runtime)`` over its positions, nats.
        max_abs: largest difference of two logits.
        agreeing: positions at which both find the same token likeliest.
    """

    tokens: int
    kl: float
    max_abs: float
    agreeing: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All prompts.

    Attributes:
        prompts: each.
        finite: whether every logit of the runtime is a number.
    """

    prompts: tuple[PromptFigures, ...]
    finite: bool

    @property
    def kl(self) -> float:
        """Mean of ``KL(reference || runtime)`` over the positions of the worst prompt."""
        return max((each.kl for each in self.prompts), key=_nan_last)

    @property
    def max_abs(self) -> float:
        """Largest difference of two logits."""
        return max((each.max_abs for each in self.prompts), key=_nan_last)

    @property
    def top1(self) -> float:
        """Share of all positions at which both find the same token likeliest."""
        return sum(each.agreeing for each in self.prompts) / sum(each.tokens for each in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """As JSON data; what is not finite is None."""
        return {
            "kl": _number(self.kl),
            "max_abs": _number(self.max_abs),
            "top1": self.top1,
            "prompts": [{key: _number(value) for key, value in asdict(each).items()} for each in self.prompts],
        }


def compare(reference: Path, found: Path, lengths: list[int]) -> Figures:
    """Compare two files of logits, float32 ``[tokens, vocabulary]``, prompt by prompt.

    Raises:
        EvaluationError: they differ in shape.
    """
    expected, got = (np.load(file, mmap_mode="r", allow_pickle=False) for file in (reference, found))
    if expected.shape != got.shape:
        raise EvaluationError(
            f"the runtime gives logits {list(got.shape)}, and the reference {list(expected.shape)}",
            "its vocabulary or its tokens are not the checkpoint's",
        )
    prompts, finite, place = [], True, 0
    for length in lengths:
        rows = slice(place, place + length)
        ours, theirs = (torch.from_numpy(np.array(each[rows])).double() for each in (expected, got))
        finite = finite and bool(theirs.isfinite().all())
        prompts.append(_prompt(ours, theirs))
        place += length
    return Figures(tuple(prompts), finite)


def _prompt(expected: torch.Tensor, found: torch.Tensor) -> PromptFigures:
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return PromptFigures(
        tokens=len(expected),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        max_abs=float((expected - found).abs().max()),
        agreeing=int((expected.argmax(-1) == found.argmax(-1)).sum()),
    )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
