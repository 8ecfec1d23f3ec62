"""What can be known to fail is told before anything is loaded or fetched, and all of it at once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantkit import records
from quantkit.errors import CalibrationError, MissingDependencyError, QuantkitError, RecipeError, did_you_mean
from quantkit.estimation.models import fetched_config
from quantkit.evaluation.tasks import check_task_names
from quantkit.gguf.config import model_config
from quantkit.gguf.head import read_head
from quantkit.llama_cpp.library import library
from quantkit.publishing.mlflow import check_tracking
from quantkit.recipe import CalibrationSpec, EvaluationSpec, ModelSpec, Recipe
from quantkit.recipe.evaluation import LOADERS
from quantkit.recipe.local_files import (
    LLAMAFACTORY,
    allocation_files,
    calibration_files,
    is_file_of_records,
    missing,
    model_files,
    scoring_files,
    training_files,
)
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.records.hub import HUB_PREFIX
from quantkit.runtimes import RUNTIMES
from quantkit.source import package
from quantkit.system.devices import Devices, resolve_devices
from quantkit.system.distribution import requirement

LLAMA_CPP = "llama.cpp"
"""The method whose codes a library chooses that may not be installed."""


def preflight(recipe: Recipe) -> None:
    """Check all that a run needs and that can be looked at without loading anything.

    Raises:
        QuantkitError: the first that is wrong, with all else that is beside it.
    """
    _raise_all(_file_mistakes(recipe), _machine_mistakes(recipe), _scoring_mistakes(recipe))


def preflight_of_files(recipe: Recipe) -> None:
    """Check what the process that reads a run's model and records needs, where others do the work.

    Raises:
        QuantkitError: the first that is wrong, with all else that is beside it.
    """
    _raise_all(_file_mistakes(recipe))


def preflight_of_machine(recipe: Recipe) -> None:
    """Check what a machine needs that does the work of a run.

    Raises:
        QuantkitError: the first that is wrong, with all else that is beside it.
    """
    _raise_all(_machine_mistakes(recipe), _scoring_mistakes(recipe))


def _scoring_mistakes(recipe: Recipe) -> Iterator[QuantkitError]:
    scoring = recipe.evaluation
    found: tuple[Iterable[QuantkitError], ...] = (
        missing(scoring_files(scoring)),
        _failures(
            lambda: check_device("evaluation", scoring.device),
            lambda: check_tracking(recipe.tracking),
            lambda: check_loader(scoring),
            lambda: check_served(scoring),
        ),
        scoring_mistakes(scoring, longest_input(recipe.model.source)),
    )
    for mistakes in found:
        yield from mistakes


def check_inputs(recipe: Recipe) -> None:
    """Check all that quantizing alone needs.

    Raises:
        QuantkitError: the first that is wrong, with all else that is beside it.
    """
    _raise_all(_file_mistakes(recipe), _machine_mistakes(recipe))


def check_scoring(spec: EvaluationSpec, models: Sequence[str | Path]) -> None:
    """Check all that scoring a checkpoint needs.

    Args:
        spec: how it is scored.
        models: the checkpoint, and the float model that it is compared with.

    Raises:
        QuantkitError: the first that is wrong, with all else that is beside it.
    """
    known = [longest for model in models if (longest := longest_input(str(model))) is not None]
    _raise_all(
        missing(scoring_files(spec)),
        _failures(lambda: check_device("evaluation", spec.device), lambda: check_loader(spec)),
        scoring_mistakes(spec, min(known, default=None)),
    )


def _file_mistakes(recipe: Recipe) -> Iterator[QuantkitError]:
    """What is wrong with the model and the records."""
    calibrated = any(variant.calibrated for variant in recipe.variants)
    yield from missing(model_files(recipe.model))
    yield from missing(calibration_files(recipe.calibration)) if calibrated else ()
    yield from missing(training_files(recipe))
    yield from missing(allocation_files(recipe))
    yield from _failures(
        lambda: check_package_source(recipe.model),
        *([lambda: check_data_set(recipe.calibration)] if calibrated else []),
        *(partial(check_data_set, each.data) for each in recipe.recover_variants if each.data is not None),
    )


def _machine_mistakes(recipe: Recipe) -> Iterator[QuantkitError]:
    """What of quantizing cannot be done on this machine."""
    yield from _failures(
        lambda: check_device("quantization", recipe.quantization.first, recipe.quantization.devices),
        *([library] if any(variant.method == LLAMA_CPP for variant in recipe.own_variants) else []),
    )


def _failures(*checks: Callable[[], object]) -> Iterator[QuantkitError]:
    for check in checks:
        try:
            check()
        except QuantkitError as error:
            yield error


def _raise_all(*mistakes: Iterable[QuantkitError]) -> None:
    found = [error for several in mistakes for error in several]
    if found:
        raise QuantkitError.together(found)


def scoring_mistakes(spec: EvaluationSpec, longest: int | None) -> Iterator[QuantkitError]:
    """What of a section ``evaluation`` cannot be done here.

    Args:
        spec: the section.
        longest: tokens that the model reads at most; None where that is not known yet.
    """
    if longest is not None and spec.context_length > longest:
        yield RecipeError(
            f"evaluation.context_length is {spec.context_length}, and the model reads {longest} tokens at most",
            f"set it to {longest} or less",
        )
    if spec.tasks and importlib.util.find_spec("lm_eval") is None:
        yield MissingDependencyError("lm-eval", "scoring tasks", requirement("tasks"))
    else:
        yield from _failures(lambda: check_task_names(spec.tasks))
    rouge = spec.answers is not None and "rouge" in spec.answers.metrics
    if rouge and importlib.util.find_spec("rouge_score") is None:
        yield MissingDependencyError("rouge-score", "the metric 'rouge'", requirement("tasks"))


def longest_input(reference: str) -> int | None:
    """Tokens that a model reads at most, as its config says, which is fetched; None where it is not there or silent."""
    try:
        path = package.locate(reference) if reference.startswith(package.PREFIX) else Path(reference).expanduser()
        is_hub = not path.exists() and HUB_REFERENCE.fullmatch(reference) is not None
        config = _config(fetched_config(reference).parent if is_hub else path)
    except (QuantkitError, OSError, ValueError):
        return None  # whoever loads the model says what is wrong with it
    parts: list[Any] = [config, config.get("text_config")]
    found = [part.get("max_position_embeddings") for part in parts if isinstance(part, dict)]
    return next((each for each in found if isinstance(each, int)), None)


def _config(path: Path) -> dict[str, Any]:
    if path.is_dir():
        found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return found
    if path.suffix == ".gguf" and path.is_file():
        import torch

        return dict(model_config(read_head(path), torch.float16))
    return {}


def check_package_source(spec: ModelSpec) -> None:
    """Refuse a model in a package that is not installed.

    Raises:
        SourceError: with the command that installs it.
    """
    if spec.source.startswith(package.PREFIX):
        package.locate(spec.source)


def check_data_set(spec: CalibrationSpec) -> None:
    """Refuse a name that is no data set's; files are looked for elsewhere, and the hub is asked when it is read.

    Raises:
        CalibrationError: with the nearest name.
    """
    reference = spec.dataset
    if reference.startswith((HUB_PREFIX, LLAMAFACTORY)) or is_file_of_records(reference) or Path(reference).exists():
        return
    if reference not in records.dataset_names():
        remedy = f"{did_you_mean(reference, records.dataset_names())}; or a file's path, or hub:org/name"
        raise CalibrationError(f"calibration.dataset: unknown data set '{reference}'", remedy)


def check_device(section: str, name: str, devices: Devices = None) -> None:
    """Refuse a device that is not there, or one of several.

    Raises:
        QuantkitError: with the key.
    """
    try:
        resolve_devices(name, devices)
    except QuantkitError as error:
        key = "device" if devices is None else "devices"
        raise RecipeError(f"{section}.{key}: {error.problem}", error.remedy) from error


def check_served(spec: EvaluationSpec) -> None:
    """Refuse to serve files by what is not here.

    Raises:
        RecipeError: with the reason.
    """
    if spec.served is None:
        return
    try:
        RUNTIMES.get(spec.served.runtime).check(spec.served.python)
    except QuantkitError as error:
        raise RecipeError(f"evaluation.served: {error.problem}", error.remedy) from error


def check_loader(spec: EvaluationSpec) -> None:
    """Refuse a runtime that is asked for and cannot be used here.

    Raises:
        RecipeError: with the reason.
    """
    if spec.loader in LOADERS:
        return
    try:
        RUNTIMES.get(spec.loader).check(spec.python)
    except QuantkitError as error:
        raise RecipeError(f"evaluation.loader: {error.problem}", error.remedy) from error
