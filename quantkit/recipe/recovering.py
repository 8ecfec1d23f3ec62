"""Recovery: a variant that is another one with what its format stores trained, and the options of that training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from quantkit.recipe.adapting import AdapterOptions
from quantkit.recipe.fields import Name, Section, Title, Whole
from quantkit.recipe.quantization import CalibrationSpec
from quantkit.system.validation import unknown_key

RECOVER = "recover"
"""The key of a variant that names the one it is made of."""
Trained = Literal["codes", "scales", "zeros", "norms", "biases", "qa-lora"]
WITH_TERMS = frozenset({"norms", "biases", "qa-lora"})
"""What can be trained beside QA-LoRA's terms, which go into zero points in the end."""
Optimizer = Literal["signs", "adam", "adam8bit", "paged_adam8bit"]
REACH = 2.4
"""The rate of codes that begin at the file's, times the steps, at most; as it falls to nothing, they go half as far."""
CHANCE = 0.22
"""That rate times the root of the steps, at most: by gradients that are nothing but noise they go 0.6 of this."""
FROM_FLOAT = 1.5e-2
"""The rate of codes that begin at the float weights."""
FEW_BITS = 3
"""Codes of so many bits are trained, too, where nothing is said: of more they gain little that scales do not."""


class RecoverOptions(Section):
    """How a quantized checkpoint is trained.

    Attributes:
        steps: of the optimizer.
        batch_tokens: tokens of a step, about: whole rows.
        train: what is trained, of what the file stores: ``codes``, ``scales``, ``zeros`` (zero points that are any
            number), ``norms`` and ``biases``. By default scales, zeros and norms, and codes of 3 bits and fewer.
            ``qa-lora`` trains a low-rank term on groups of inputs that is merged into zero points that are any number.
        rank: of the terms of ``qa-lora``.
        learning_rate: of scales and zeros, relative to their size; each rate decays to nothing along a cosine.
        codes_from: where the numbers behind codes begin: ``file`` at the codes of the file, up to 0.2 of a step
            towards where the float weight lies; ``float`` there, which leaves the file's codes behind at once.
        code_rate: of codes, in steps of the grid; by default what is right for where they begin, see
            :meth:`rate_of_codes`.
        norm_rate: of norms and biases, relative to their size.
        warmup: share of the steps in which the rates rise.
        hidden: how much the hidden states between blocks count beside the divergence: their squared errors, each
            relative to the square of the float model's, on average.
        held_out: share of the rows by which the training is judged and on which nothing is trained, at least 2 rows.
        evaluations: how often it is judged.
        optimizer: what moves codes: ``signs`` of their gradients, which need no memory, ``adam``, or one of
            bitsandbytes with 8-bit states, on CUDA; all else is moved by Adam.
        seed: order of the rows.
    """

    steps: Annotated[Whole, Field(ge=1, le=1_000_000)] = 300
    batch_tokens: Annotated[Whole, Field(ge=1)] = 1024
    train: Annotated[tuple[Trained, ...], Field(min_length=1)] | None = None
    rank: Annotated[Whole, Field(ge=1, le=1024)] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-3
    codes_from: Literal["file", "float"] = "file"
    code_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    norm_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3
    warmup: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    hidden: Annotated[float, Field(ge=0)] = 0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    evaluations: Annotated[Whole, Field(ge=1, le=10_000)] = 8
    optimizer: Optimizer = "signs"
    seed: Whole = 0

    def rate_of_codes(self) -> float:
        """How far a code goes in a step at most, in steps of the grid.

        From the file little more than a step of the grid in all steps, and less where there are few steps: those change
        whose gradients mostly agree, and hardly any by chance. From the float weights as much as gets them anywhere.
        """
        if self.code_rate is not None:
            return self.code_rate
        if self.codes_from == "float":
            return FROM_FLOAT
        return min(1.0, REACH / self.steps, CHANCE / math.sqrt(self.steps))

    def trains(self, what: Trained, bits: int) -> bool:
        """Whether it trains something of a layer with codes of so many bits; for norms and biases these are nothing."""
        if self.train is not None:
            return what in self.train
        return bits <= FEW_BITS if what == "codes" else what not in ("biases", "qa-lora")

    @model_validator(mode="after")
    def _terms_stand_alone(self) -> Self:
        beside = sorted(set(self.train or ()) - WITH_TERMS)
        if "qa-lora" in (self.train or ()) and beside:
            raise ValueError(f"qa-lora is trained on frozen {beside[0]}: leave {', '.join(beside)} out of train")
        return self


class RecoverSpec(RecoverOptions):
    """A variant that is made of another one by training it.

    Attributes:
        name: its name in the report and its folder.
        title: what people read in its place; any text.
        recover: the name of the variant that is trained.
        data: on what it is trained, with the keys of the section ``calibration``; by default the calibration set.
        adapter: a LoRA on the codes as they are, instead of another file; see
            :class:`quantkit.recipe.adapting.AdapterOptions`.
    """

    name: Name
    title: Title | None = None
    recover: Name
    data: CalibrationSpec | None = None
    adapter: AdapterOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _keys_are_its_own(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for key in given:
                if isinstance(key, str) and key not in cls.model_fields:
                    raise unknown_key(key, set(cls.model_fields), "a variant with 'recover' has those of its original")
        return given

    @model_validator(mode="after")
    def _trains_on_records(self) -> Self:
        if self.data is not None and self.data.generated:
            raise ValueError("data.generated: it is trained on the records alone; leave it out")
        return self

    @property
    def options(self) -> RecoverOptions:
        """The options of the training alone."""
        return RecoverOptions.model_validate({name: getattr(self, name) for name in RecoverOptions.model_fields})

    @property
    def calibrated(self) -> bool:
        """Whether it is trained on the calibration set of the recipe."""
        return self.data is None

    @property
    def chain(self) -> str:
        """What it is called where others name their method."""
        return RECOVER if self.adapter is None else "adapter"

    def warnings(self) -> tuple[str, ...]:
        """No warnings."""
        return ()

    def resolved(self) -> dict[str, Any]:
        """The variant as JSON data, with every default filled in."""
        return self.model_dump(mode="json")
