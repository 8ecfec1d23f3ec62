"""How a model is used: how much it reads at a time, how it is calibrated, how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from quantkit.recipe.fields import Flag, Section, Whole
from quantkit.system.units import parse_bytes
from quantkit.system.validation import located

KV_BYTES = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
}
"""Bytes of a cached number; ``q8_0`` and ``q4_0`` are llama.cpp's blocks of 32 with a float16 scale."""
OVERHEAD = 600 * 2**20
"""What a CUDA process takes beside its tensors: context, kernels, workspaces of cuBLAS, and what the allocator holds
back. A round number between what is said of small and large cards; quantkit has not measured it."""
CALIBRATION_TOKENS = 128 * 512
"""Of the calibration set that a recipe has by default."""


def _own_bytes(given: dict[str, Any]) -> int:
    return 0 if given.get("device") == "cpu" else OVERHEAD


Count = Annotated[Whole, Field(ge=1)]


class Use(Section):
    """What an estimate depends on beside the model and the variant.

    Attributes:
        batch: sequences at a time.
        context: tokens of a sequence.
        kv_dtype: of the KV cache, a key of :data:`KV_BYTES`; None is the dtype of the activations.
        device: ``cuda``, or ``cpu``, which passes fewer tokens at a time through a model that is quantized and has
            no context of its own.
        overhead: bytes that the device's runtime takes for itself, or a text such as ``600MiB``; by default
            :data:`OVERHEAD` on CUDA, and nothing on a CPU.
        calibration_tokens: that the model is quantized with.
        inputs: what a layer is calibrated on, see :class:`quantkit.recipe.CalibrationSpec`.
        strategy: how the walk waits for statistics, see ``docs/engine.md``.
        waiting: bytes of activations that may wait on the device between blocks; None for all.
        pass_dtype: in which calibration computes: float32 on most CPUs; None is 16 bits, as on CUDA and on CPUs that
            multiply bfloat16.
        lora_rank: of the adapters, which all linear layers of the blocks get.
        optimizer: which states are kept in training.
        gradient_checkpointing: activations of a block are computed anew in the backward pass.
    """

    batch: Count = 1
    context: Count = 2048
    kv_dtype: Literal["float32", "float16", "bfloat16", "fp8", "int8", "q8_0", "q4_0"] | None = None
    device: Literal["cpu", "cuda"] = "cuda"
    overhead: Annotated[int, Field(ge=0)] = Field(default_factory=_own_bytes)
    calibration_tokens: Count = CALIBRATION_TOKENS
    inputs: Literal["quantized", "float"] = "quantized"
    strategy: Literal["one-pass", "recompute"] = "one-pass"
    waiting: Annotated[int, Field(ge=0)] | None = None
    pass_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    lora_rank: Count = 16
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "paged_adamw_8bit"
    gradient_checkpointing: Flag = True

    @field_validator("overhead", mode="before")
    @classmethod
    def _overhead_is_a_size(cls, given: Any) -> int:
        with located():
            return parse_bytes(given)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.batch * self.context
