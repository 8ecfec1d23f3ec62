"""The section ``model``: what is quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from quantkit.recipe.fields import Flag, Section


class ModelSpec(Section):
    """The model to quantize.

    Attributes:
        source: hub id (``org/name``), folder, GGUF file, or ``package:NAME/path/inside.gguf``.
        adapter: a LoRA adapter to merge first; not built yet, so it is refused.
        revision: branch, tag or commit of a hub model.
        dtype: float dtype of the checkpoint that is quantized; ``auto`` keeps the model's own.
        trust_remote_code: run Python code that comes with the model.
    """

    source: str
    adapter: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: Flag = False

    @field_validator("adapter")
    @classmethod
    def _no_adapter_yet(cls, adapter: str | None) -> str | None:
        if adapter is not None:
            raise ValueError("this version does not merge adapters: merge with PEFT and give the merged folder")
        return adapter
