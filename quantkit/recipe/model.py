"""The sections ``model`` and ``merge``: what is quantized, and how adapters are merged into it first."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.recipe.fields import Flag, Place, Section, require_distinct

HUB_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
"""``org/name`` or ``org/name@revision`` of the hub."""
NAMED_BY_ADAPTER = "auto"
"""The source that stands for the base which the first adapter names."""


class AdapterSpec(Section):
    """A LoRA adapter that is merged into the model.

    Attributes:
        source: folder, hub id (``org/name`` or ``org/name@revision``), or archive (``.zip``, ``.tar``, ``.tar.gz``)
            of a PEFT adapter in safetensors.
        weight: what its change of the weights is multiplied with.
    """

    source: Annotated[Place, Field(min_length=1)]
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @field_validator("weight")
    @classmethod
    def _not_nothing(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("an adapter of weight 0 changes nothing: leave it out")
        return weight


class ModelSpec(Section):
    """The model to quantize.

    Attributes:
        source: hub id (``org/name``), folder, GGUF file, or ``package:NAME/path/inside.gguf``; ``auto`` is the base
            that the first adapter was trained on, or the float original of that.
        adapter: LoRA adapters to merge first: one reference, or a list of references and of mappings with ``source``
            and ``weight``; see :class:`AdapterSpec` and the section ``merge``.
        revision: branch, tag or commit of a hub model.
        dtype: float dtype of the checkpoint that is quantized, of scales and of all that stays float: ``auto`` is the
            model's own of 16 bits, and one of 16 bits for a wider model; ``own`` is the model's own in any case.
        trust_remote_code: run Python code that comes with the model.
        decode: decode a source that a tool has quantized (GPTQ, AWQ, bitsandbytes ...), instead of refusing it.
    """

    source: Place
    adapter: tuple[AdapterSpec, ...] = ()
    revision: str | None = None
    dtype: Literal["auto", "own", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: Flag = False
    decode: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given

    @field_validator("adapter", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        if given is None:
            return ()
        several = given if isinstance(given, list | tuple) else (given,)
        return tuple({"source": one} if isinstance(one, str) else one for one in several)

    @model_validator(mode="after")
    def _is_named(self) -> ModelSpec:
        if self.source == NAMED_BY_ADAPTER and not self.adapter:
            raise ValueError(
                f"source: {NAMED_BY_ADAPTER} is the base that an adapter names: give an adapter, or a model"
            )
        return self

    @field_validator("adapter")
    @classmethod
    def _each_once(cls, adapters: tuple[AdapterSpec, ...]) -> tuple[AdapterSpec, ...]:
        require_distinct([adapter.source for adapter in adapters], "adapters")
        return adapters


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
