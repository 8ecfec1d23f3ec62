"""Options of block polish: what a variant's blocks are tuned with once a method has chosen their codes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.methods.base import MethodOptions
from quantkit.schemes import Scheme

TUNE = "tune"
"""The key of a variant, and what stands last in the short form ``gptq+tune``."""
SUMMARY = "after a block is solved: its output is brought closer to the float block's by a few gradient steps"
SOURCE = "EfficientQAT, Chen et al. 2024, arXiv:2407.11062; roundings: SignRound, Cheng et al. 2023, arXiv:2309.05516"
COST = "minutes"

GENERATED = 8192
"""Tokens that the float model writes for tuning at most, where nobody says how many."""
ENOUGH = 16
"""Tokens for each column of the widest layer from which on more that the model writes do not help."""

STEPS, ROUNDED_STEPS = 64, 256
"""Steps for a block where nobody says how many: of scales and the like alone, and with roundings."""
ROUNDING_TOKENS = 128
"""Tokens for a column of the widest layer from which roundings are trained where nobody says: with few they overfit."""

Part = Literal["scales", "zeros", "norms", "biases"]


def generated_for(tokens: int, width: int) -> int:
    """How many tokens the float model writes for tuning, where nobody says how many.

    Args:
        tokens: of the calibration set.
        width: of the widest input of a layer of the blocks.
    """
    return max(min(tokens // 2, GENERATED, ENOUGH * width - tokens), 0)


class TuneOptions(MethodOptions):
    """Options of block polish.

    Attributes:
        steps: of the optimizer for a block, at most; by default :data:`STEPS`, or :data:`ROUNDED_STEPS` with roundings.
        learning_rate: of scales, norms and biases, relative to their size; it rises for some steps and falls to
            nothing. By default 0.005.
        batch_tokens: tokens of a step.
        train: what is trained, of ``scales``, ``zeros`` (zero points that are any number), ``norms`` and ``biases``.
        rounding: train the roundings too, by the signs of their gradients, from the codes that the method chose. By
            default where there are many tokens for each column of the widest layer.
        held_out: share of the batches by which a block is judged and on which it is not trained; one at least.
        patience: how many times in a row the held-out rows may see no gain before a block is done.
    """

    steps: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    batch_tokens: Annotated[int, Field(strict=True, ge=1)] = 1024
    train: tuple[Part, ...] = ("scales", "zeros")
    rounding: Annotated[bool, Field(strict=True)] | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.125
    patience: Annotated[int, Field(strict=True, ge=1)] = 3

    @field_validator("train", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _something_is_trained(self) -> TuneOptions:
        if not self.train and not self.rounding:
            raise ValueError("nothing is trained: name scales, zeros, norms or biases in 'train', or leave it out")
        return self

    def rounds(self, tokens: int, width: int) -> bool:
        """Whether roundings are trained.

        Args:
            tokens: of all rows.
            width: of the widest input of a layer of the block.
        """
        return tokens >= ROUNDING_TOKENS * width if self.rounding is None else self.rounding

    def steps_for(self, *, rounding: bool) -> int:
        """Steps for a block, at most, with roundings or without."""
        return self.steps or (ROUNDED_STEPS if rounding else STEPS)

    def trains(self, scheme: Scheme) -> bool:
        """Whether it trains something of a layer of a scheme, or beside it."""
        scales = ("scales" in self.train or self.rounding) and scheme.free_scales
        zeros = "zeros" in self.train and getattr(scheme, "zeros", None) == "float"
        return scales or zeros or bool({"norms", "biases"} & set(self.train))
