"""The section ``model``: what is quantized."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from quantkit.recipe.fields import Flag, Section, require_distinct

HUB_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
"""``org/name`` or ``org/name@revision`` of the hub."""


class AdapterSpec(Section):
    """A LoRA adapter that is merged into the model.

    Attributes:
        source: folder, hub id (``org/name`` or ``org/name@revision``), or archive (``.zip``, ``.tar``, ``.tar.gz``)
            of a PEFT adapter in safetensors.
        weight: what its change of the weights is multiplied with.
    """

    source: Annotated[str, Field(min_length=1)]
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
        source: hub id (``org/name``), folder, GGUF file, or ``package:NAME/path/inside.gguf``.
        adapter: LoRA adapters to merge first: one reference, or a list of references and of mappings with ``source``
            and ``weight``; see :class:`AdapterSpec` and the section ``merge``.
        revision: branch, tag or commit of a hub model.
        dtype: float dtype of the checkpoint that is quantized; ``auto`` keeps the model's own.
        trust_remote_code: run Python code that comes with the model.
    """

    source: str
    adapter: tuple[AdapterSpec, ...] = ()
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: Flag = False

    @field_validator("adapter", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        if given is None:
            return ()
        several = given if isinstance(given, list | tuple) else (given,)
        return tuple({"source": one} if isinstance(one, str) else one for one in several)

    @field_validator("adapter")
    @classmethod
    def _each_once(cls, adapters: tuple[AdapterSpec, ...]) -> tuple[AdapterSpec, ...]:
        require_distinct([adapter.source for adapter in adapters], "adapters")
        return adapters
