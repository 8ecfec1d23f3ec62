"""A transform as another package brings one, in one file: the channels between the blocks in another order.

The simplest of the rotations: embedding, norms, blocks and head change together, and the model computes what it did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from quantkit.methods.base import InputStatistics
from quantkit.transforms.base import Change, ModelView, Transform, TransformOptions

READING = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Leaves whose columns are channels between blocks; of all other parameters of this width it is the rows."""
WRITING = ("norm", "o_proj", "down_proj")


@dataclass
class Reordered(Change):
    """The channels in another order, of the modules that are named."""

    order: torch.Tensor
    modules: list[str]

    def touches(self) -> list[str]:
        """All that reads or writes between blocks."""
        return self.modules

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """Columns in the order for what reads, rows for what writes."""
        if module not in self.modules or (leaf == "bias" and module.endswith(READING)):
            return parameter
        return parameter[..., self.order] if module.endswith(READING) else parameter[self.order]

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """Those of the channels in the order."""
        if not layer.endswith(READING):
            return found
        order = self.order
        return replace(
            found,
            abs_mean=None if found.abs_mean is None else found.abs_mean[order],
            square_mean=None if found.square_mean is None else found.square_mean[order],
            gram=None if found.gram is None else found.gram[order][:, order],
            derived={},
        )

    def to_json(self) -> dict[str, Any]:
        """How many modules it is."""
        return {"modules": len(self.modules)}


class ReorderOptions(TransformOptions):
    """Options of the order.

    Attributes:
        seed: of the order.
    """

    seed: int = 0


class Reorder(Transform):
    """Puts the channels between the blocks in another order."""

    name = "reorder"
    summary = "puts the channels between the blocks in an order"
    source = "quantkit's tests"
    Options: ClassVar[type[TransformOptions]] = ReorderOptions
    options: ReorderOptions

    def of_model(self, model: ModelView) -> Change | None:
        """An order of the embedding's columns, for every module that touches them."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in model.shapes())
        width = model.parameter("model.embed_tokens.weight").shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.options.seed))
        return Reordered(order, [name for name in modules if name.endswith((*READING, *WRITING))])
