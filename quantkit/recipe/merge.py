"""The section ``merge``: how the adapters of ``model.adapter`` are merged."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from quantkit.recipe.fields import Flag, Section

BaseWeights = Literal["original", "nf4"]
Nf4Dtype = Literal["float32", "float16", "bfloat16"]


class MergeSpec(Section):
    """How adapters are merged into the float model.

    Attributes:
        base: ``original`` adds to the model's own weights; ``nf4`` adds to what these are after NF4 with double
            quantization, which is what a QLoRA adapter was trained upon.
        compare: the other of the two bases: the report scores a model merged into that one as well.
        nf4_dtype: dtype in which the NF4 weights were decoded in training, ``bnb_4bit_compute_dtype``.
        any_base: merge although ``adapter_config.json`` names another base than ``model.source``.
    """

    base: BaseWeights = "original"
    compare: BaseWeights | None = None
    nf4_dtype: Nf4Dtype = "bfloat16"
    any_base: Flag = False

    @model_validator(mode="after")
    def _bases_differ(self) -> MergeSpec:
        if self.compare == self.base:
            raise ValueError(f"compare is the base that is merged into anyway ({self.base}): name the other one")
        return self
