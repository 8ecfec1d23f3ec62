"""How far from the reference a runtime may be, by what it rounds beside the weights.

The reference decoder multiplies decoded weights with inputs that are not rounded. A runtime that does the same in
another order differs by rounding of its compute dtype alone; one that rounds the inputs of quantized layers to 8 bits
differs by that as well.

Measured on SmolLM2-135M on a CPU, KL of the worst of sixteen prompts and agreement over all: float32 (vLLM, not
quantized) 6e-11 nats and 100%; float16 1e-4 and 99.7%; bfloat16 up to 0.009 and down to 95.0%; llama.cpp's Q4_0 0.018
and 94.0%; fp8 with rounded inputs 0.041 and 92.4%; W8A8 up to 0.15 and down to 85.5%. Codes read in the wrong order
gave 20 nats and 0%; the mildest mistake tried, zero points of 8-bit codes that are off by one, 1.8 nats and 53%.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.schemes import Scheme


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
TOKENS = Tolerance("inputs of quantized layers rounded to 8 bits with one scale a token", kl=0.3, top1=0.75)
"""How far these are is the model's own: outliers of a token's inputs leave few steps for the rest."""
ROUNDS_BLOCKS = ("llama.cpp",)
"""Runtimes that round the inputs of quantized layers whatever the file says."""


def tolerance(runtime: str, dtype: str, schemes: Iterable[Scheme]) -> Tolerance:
    """What passes for a runtime that computes a checkpoint with these schemes in a dtype."""
    if runtime in ROUNDS_BLOCKS:
        return BLOCKS
    if runtime != "reference" and any(scheme.activations is not None for scheme in schemes):
        return TOKENS
    return BY_DTYPE[dtype]
