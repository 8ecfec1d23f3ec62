"""The sections ``calibration`` and ``quantization``: on which records variants are calibrated, and on which device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantkit.recipe.fields import Device, Section, Whole


class CalibrationSpec(Section):
    """The calibration set that every method of the recipe shares.

    Attributes:
        dataset: a name of ``calib_data/``, a file (JSON, JSONL, Parquet, text) or ``hub:org/name``.
        samples: records to use.
        max_length: tokens per row; longer records are truncated, which the audit counts.
        seed: order in which records are drawn.
        packing: ``none`` is one record a row, ``full`` fills each row to ``max_length``.
        chat_template: ``auto`` uses the model's where it has one, ``none`` joins the plain texts,
            anything else is a file that holds a Jinja template.
        inputs: ``quantized`` calibrates each layer on what the quantized layers before it give,
            ``float`` on the float model's activations, shared by all variants.
        experts: ``routed`` calibrates an expert on the tokens that its router sends it, ``all`` on all tokens.
        expert_prior: the statistics of all experts of a layer count for each of them as those of as many tokens as this
            times the width of its input; 0 leaves each its own alone.
    """

    dataset: str = "alpaca_gpt4"
    samples: Annotated[Whole, Field(ge=1)] = 128
    max_length: Annotated[Whole, Field(ge=8)] = 512
    seed: Whole = 0
    packing: Literal["none", "full"] = "none"
    chat_template: str = "auto"
    inputs: Literal["quantized", "float"] = "quantized"
    experts: Literal["routed", "all"] = "routed"
    expert_prior: Annotated[float, Field(ge=0, le=100)] = 0.5


class QuantizationSpec(Section):
    """The device on which variants are quantized.

    Attributes:
        device: ``auto`` is CUDA where there is one.
    """

    device: Device = "auto"
