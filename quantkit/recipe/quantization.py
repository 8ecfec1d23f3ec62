"""The sections ``calibration`` and ``quantization``: on which records variants are calibrated, and on which device."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantkit.errors import RecipeError
from quantkit.recipe.columns import Columns, Tags, with_entry
from quantkit.recipe.fields import Device, Place, Section, Whole, known_device
from quantkit.system.names import spelled_device
from quantkit.system.validation import located

MOST_DEVICES = 64


class CalibrationSpec(Section):
    """The calibration set that every method of the recipe shares.

    Attributes:
        dataset: a name of ``calib_data/``, a file (JSON, JSONL, Parquet, CSV, text), ``hub:org/name``,
            ``llamafactory:DIR/NAME``, or an entry as LLaMA-Factory's ``dataset_info.json`` has it.
        columns: what the data set calls what a record has; see :mod:`quantkit.recipe.columns`.
        tags: what its conversations call the keys and roles of their turns.
        samples: records to use.
        max_length: tokens per row; longer records are truncated, which the audit counts.
        seed: order in which records are drawn.
        packing: ``none`` is one record a row, ``full`` fills each row to ``max_length``.
        crop: share of the rows that begin within their record, where packing is ``none``; None is a half where the
            tokenizer begins texts with no token of its own and most records begin alike, and none elsewhere.
        chat_template: ``auto`` uses the model's where it has one, ``none`` joins the plain texts,
            anything else is a file that holds a Jinja template.
        max_lost: share of the records drawn that may be lost because the chat template or the processor of images
            refuses them; with more the run stops.
        inputs: ``quantized`` calibrates each layer on what the quantized layers before it give,
            ``float`` on the float model's activations, shared by all variants.
        experts: ``routed`` calibrates an expert on the tokens that its router sends it, ``all`` on all tokens.
        sensitivity: find out how much the model's loss minds errors of each layer, row and token, by a pass backward.
        token_weights: power of the sensitivity to a token by which it counts in the statistics of layers; 0 counts all
            alike. More than 0 turns ``sensitivity`` on.
        expert_prior: the statistics of all experts of a layer count for each of them as those of as many tokens as this
            times the width of its input; 0 leaves each its own alone.
        generated: tokens that the float model writes and that are added to the rows of every calibrated variant; None
            is as many as suit the variants that are tuned, and none for others.
    """

    dataset: Place = "alpaca_gpt4"
    columns: Columns = Field(default_factory=dict)
    tags: Tags = Field(default_factory=dict)
    samples: Annotated[Whole, Field(ge=1)] = 128
    max_length: Annotated[Whole, Field(ge=8)] = 512
    seed: Whole = 0
    packing: Literal["none", "full"] = "none"
    crop: Annotated[float, Field(ge=0, le=1)] | None = None
    chat_template: Place = "auto"
    max_lost: Annotated[float, Field(ge=0, le=1)] = 0.5
    inputs: Literal["quantized", "float"] = "quantized"
    experts: Literal["routed", "all"] = "routed"
    expert_prior: Annotated[float, Field(ge=0, le=100)] = 0.5
    generated: Annotated[Whole, Field(ge=0)] | None = None
    sensitivity: bool = False
    token_weights: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def wants_sensitivity(self) -> bool:
        """Whether the model is run backward."""
        return self.sensitivity or self.token_weights > 0

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, given: Any) -> Any:
        return with_entry(given, "dataset")

    @model_validator(mode="after")
    def _crops_records(self) -> CalibrationSpec:
        with located():
            if self.crop and self.packing == "full":
                raise RecipeError("crop is of rows of one record, and packing is full", "leave out crop")
        return self


def _one_of_three(given: Any) -> Any:
    """Devices as they may be written; whatever else is one mistake, and not one for each way."""
    is_count = isinstance(given, int) and not isinstance(given, bool)
    if given is None or given == "all" or (is_count and 1 <= given <= MOST_DEVICES):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(each, str) for each in given):
        return tuple(known_device(spelled_device(each)) for each in given)
    with located():
        raise RecipeError(
            f"{given!r} is neither all, nor how many, from 1 to {MOST_DEVICES}, nor a list of devices",
            "write all, 2, or [cuda:0, cuda:1]",
        )


class QuantizationSpec(Section):
    """The device on which variants are quantized, or several.

    Attributes:
        device: ``auto`` is CUDA where there is one.
        devices: over which a walk is dealt, in the place of ``device``: ``all`` GPUs of the machine, how many (on a CPU
            that many processes), or their names. No byte depends on it.
    """

    device: Device = "auto"
    devices: Annotated[Literal["all"] | Whole | tuple[Device, ...] | None, BeforeValidator(_one_of_three)] = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> QuantizationSpec:
        with located():
            if self.devices is not None and self.device != "auto" and not isinstance(self.devices, int):
                raise RecipeError("give device or devices, and not both", "leave out device")
            if isinstance(self.devices, tuple) and len({each.partition(":")[0] for each in self.devices}) > 1:
                raise RecipeError("devices of several kinds give other bytes each", "give devices of one kind")
            if isinstance(self.devices, tuple) and "auto" in self.devices:
                raise RecipeError("devices names auto, which is one device", "give their names, or all")
        return self

    @property
    def first(self) -> str:
        """The name of the device of the first process."""
        return self.devices[0] if isinstance(self.devices, tuple) else self.device
