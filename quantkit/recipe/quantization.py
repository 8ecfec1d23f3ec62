"""The section ``quantization``: where variants are quantized."""

from __future__ import annotations

from quantkit.recipe.fields import Device, Section


class QuantizationSpec(Section):
    """Where variants are quantized.

    Attributes:
        device: ``auto`` is CUDA where there is one.
    """

    device: Device = "auto"
