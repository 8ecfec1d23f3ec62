"""What `quantkit fit` is asked for, and the recipe that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from quantkit.errors import QuantkitError, RecipeError
from quantkit.recipe.document import Recipe
from quantkit.recipe.fields import Device, Flag, Place, Section, Whole, named_after
from quantkit.recipe.local_files import calibration_files, missing, model_files
from quantkit.recipe.model import ModelSpec
from quantkit.recipe.outputs import BudgetSpec, ReportSpec
from quantkit.recipe.quantization import CalibrationSpec
from quantkit.recipe.targets import runtime_of
from quantkit.system.artifacts import check_writable
from quantkit.system.validation import located, parse_section

STAGE = "fit"
RUN, CHECK = "run", "check"
"""Folders in that of a fit: in which candidates are made, and in which checks work later."""
GATES = ("kl_divergence.mean +25 %", "perplexity +5 %")
"""What next week's file is held to, beside this one."""
SCORED = ("perplexity", "kl_divergence", "top1_agreement")


class FitSpec(Section):
    """What is asked for.

    Attributes:
        model: the model and its adapters.
        out: the folder of the results.
        budget: what the file may take.
        runtime: who shall load it: a runtime, or a program that loads what one loads.
        data: the data set to calibrate and to score on; None takes the usual one and the texts that come along.
        max_tokens: to score on, at most.
        device: on which candidates are made and scored.
        quick: stop at the first good answer.
        keep: leave the other candidates where they were made.
    """

    model: ModelSpec
    out: Place
    budget: BudgetSpec
    runtime: str = "vllm"
    data: CalibrationSpec | None = None
    max_tokens: Annotated[Whole, Field(ge=2)] = 8192
    device: Device = "auto"
    quick: Flag = False
    keep: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _data_may_be_a_name(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("data"), str | Path):
            return {**given, "data": {"dataset": str(given["data"])}}
        return given

    @field_validator("budget")
    @classmethod
    def _limits_something(cls, budget: BudgetSpec) -> BudgetSpec:
        with located():
            if budget.memory is None and budget.size is None:
                raise RecipeError("there is none", "give --memory 8GiB, what serving may take, or --size 5GiB of file")
        return budget

    @field_validator("runtime")
    @classmethod
    def _is_known(cls, runtime: str) -> str:
        with located():
            runtime_of(runtime)
        return runtime

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.out)

    @property
    def name(self) -> str:
        """Of the recipe."""
        return named_after(self.folder.resolve().name, STAGE)

    def check_files(self) -> None:
        """Find out before any work what is not there, or cannot be written.

        Raises:
            QuantkitError: with what it is.
        """
        absent = missing([*model_files(self.model), *(() if self.data is None else calibration_files(self.data))])
        if absent:
            raise QuantkitError.together(absent)
        check_writable(self.folder, stage=STAGE, source=self.model.source)

    def recipe(
        self, variants: Sequence[Mapping[str, Any]], folder: Path, parts: tuple[Path, Path] | None, row: int
    ) -> Recipe:
        """The recipe of candidates, which are all calibrated on the float model's activations, so that one walk does.

        Args:
            variants: the candidates.
            folder: in which the folder of the run lies.
            parts: the files of records to calibrate on and to score on, where there is a data set.
            row: tokens of a calibration row and of a scored window.
        """
        calibration: dict[str, Any] = {"max_length": row, "inputs": "float"}
        texts: list[Any] = ["prose", "answers"]
        if self.data is not None and parts is not None:
            given = self.data.model_dump(mode="json", exclude_unset=True, exclude={"dataset", "columns", "tags"})
            calibration |= {**given, "dataset": str(parts[0])}
            texts = [str(parts[1])]
        scored = {"texts": texts, "context_length": row, "max_tokens": self.max_tokens, "device": self.device}
        data = {
            "name": self.name,
            "model": self.model,
            "calibration": calibration,
            "variants": list(variants),
            "quantization": {"device": self.device},
            "evaluation": {**scored, "metrics": SCORED},
            "budget": self.budget,
            "report": {"folder": str(folder / RUN), "formats": ["json"]},
        }
        return parse_section(Recipe, data, "fit")

    def weekly(self, ran: Recipe, chosen: str, room: int | None) -> Recipe:
        """The recipe of the file that was chosen, with gates, for `quantkit check`.

        Args:
            ran: the recipe that ran.
            chosen: name of the variant.
            room: bytes that the file may have.
        """
        gates = (*GATES, *([] if room is None else [f"size_bytes <= {room}"]))
        variants = tuple(variant for variant in ran.variants if variant.name == chosen)
        report = ReportSpec(folder=str(self.folder / CHECK))
        return ran.model_copy(update={"variants": variants, "gates": gates, "report": report})
