"""How far the logits of a runtime are from those of the reference, and how far they may be.

The reference decoder multiplies decoded weights with inputs that it rounds as the file says. A runtime that does the
same in another order differs by rounding of its compute dtype alone; where inputs of quantized layers are rounded to 8
or 4 bits, such a difference moves some of them by a step, and runtimes have scales of their own.

Measured on SmolLM2-135M on a CPU, KL of the worst of sixteen prompts and agreement over all: float32 (vLLM, not
quantized) 6e-11 nats and 100%; float16 1e-4 and 99.7%; bfloat16 up to 0.009 and down to 95.0%; llama.cpp's Q4_0 0.018
and 94.0%. With rounded inputs: fp8 none in transformers' float32, and 0.07 and 87.4% in vLLM's bfloat16; W8A8 0.12 and
87.6% there, and 0.10 and 84.6% in transformers, whose scale of a token is ``max|x| / 127.5`` where vLLM and the
reference have 127. Codes read in the wrong order gave 20 nats and 0%; the mildest mistake tried, zero points of 8-bit
codes that are off by one, 1.8 nats and 53%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import EvaluationError
from quantkit.schemes import Scheme


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


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What passes.

    Attributes:
        because: what the runtime rounds.
        kl: largest mean of ``KL(reference || runtime)`` over the positions of a prompt, nats.
        top1: smallest share of positions at which both find the same token likeliest.
        max_abs: largest difference of two logits; None is not looked at.
    """

    because: str
    kl: float
    top1: float
    max_abs: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


BY_DTYPE = {
    "float32": Tolerance("sums in another order, float32", kl=1e-6, top1=0.99, max_abs=0.05),
    "float16": Tolerance("float16", kl=1e-3, top1=0.97),
    "bfloat16": Tolerance("bfloat16", kl=0.03, top1=0.9),
}
BLOCKS = Tolerance("inputs of quantized layers rounded to 8 bits in blocks", kl=0.05, top1=0.88)
EIGHT_BITS = Tolerance("inputs of quantized layers rounded to 8 bits", kl=0.3, top1=0.75)
FOUR_BITS = Tolerance("inputs of quantized layers rounded to 4 bits", kl=0.3, top1=0.6)
"""How far these are is the model's own: outliers of a token's inputs leave few steps for the rest."""
ROUNDS_BLOCKS = ("llama.cpp",)
"""Runtimes that round the inputs of quantized layers whatever the file says."""


def tolerance(runtime: str, dtype: str, schemes: Iterable[Scheme]) -> Tolerance:
    """What passes for a runtime that computes a checkpoint with these schemes in a dtype."""
    if runtime in ROUNDS_BLOCKS:
        return BLOCKS
    bits = [rounding.bits for scheme in schemes if (rounding := scheme.input_rounding) is not None]
    if runtime == "reference" or not bits:
        return BY_DTYPE[dtype]
    return FOUR_BITS if min(bits) == 4 else EIGHT_BITS
