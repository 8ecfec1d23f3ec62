"""The public functions. Each is what a command of the command line does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError, RecipeError
from quantkit.progress import Observer, Silent
from quantkit.recipe import COMPARING_METRICS, CalibrationSpec, EvaluationSpec, ModelSpec, Recipe, VariantSpec
from quantkit.validation import parse_section


def run(recipe: Recipe | str | Path, observer: Observer | None = None) -> dict[str, Any]:
    """Run a recipe: quantize every variant, score each exported file, write the report.

    Args:
        recipe: a recipe, or the path of one.
        observer: is told what happens; nobody by default.

    Returns:
        The content of ``report.json``. ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: nothing can run: the recipe, the model or the calibration set is unusable.
    """
    from quantkit.pipeline import run as run_recipe

    return run_recipe(_loaded(recipe), observer or Silent())


def plan(recipe: Recipe | str | Path) -> dict[str, Any]:
    """What a run would do: stages with their state, and for each variant its layers and estimated bytes.

    The model is fetched or converted if it is not here yet; nothing else is written.

    Raises:
        QuantkitError: the recipe or the model is unusable, or a variant does not suit the model.
    """
    from quantkit.forecast import forecast

    return forecast(_loaded(recipe))


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    method: str = "gptq",
    scheme: str = "int",
    format: str = "compressed-tensors",  # noqa: A002 - the recipe's word
    calibration: str | Path | Mapping[str, Any] | CalibrationSpec | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Path:
    """Quantize a model into one checkpoint.

    Args:
        model: hub id, folder, GGUF file or ``package:`` reference; see :class:`quantkit.recipe.ModelSpec`.
        out: folder of the checkpoint; it appears when it is whole.
        method: name of a method.
        scheme: kind of scheme: ``int``, ``nf4``, ``fp4``, ``fp8``, ``mxfp4`` or ``nvfp4``.
        format: name of a format.
        calibration: a data set, or the keys of a recipe's ``calibration`` section.
        observer: is told what happens.
        options: further keys of a variant: those of its scheme (``bits``, ``group_size``, ``symmetric`` ..., by default
            the scheme's own), ``ignore``, ``overrides``, ``first_blocks``, ``last_blocks``, the method's own options.

    Returns:
        ``out``.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.single import quantize_one

    watching = observer or Silent()
    given = {"name": "variant", "method": method, "scheme": scheme, "format": format}
    variant = parse_section(VariantSpec, {**given, **options}, "quantize")
    for warning in variant.warnings():
        watching.note(f"warning: {warning}")
    found = parse_section(ModelSpec, {"source": str(model)}, "model")
    return quantize_one(found, variant, _calibration(calibration), Path(out), watching)


def evaluate(
    checkpoint: str | Path,
    *,
    texts: Sequence[str | Mapping[str, Any]] | None = None,
    reference: str | Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a checkpoint in a fresh process.

    Args:
        checkpoint: folder of a float or quantized checkpoint.
        texts: names of bundled texts, files, or mappings as in a recipe; the bundled ones by default.
        reference: the float model to compare with; without it there is no divergence.
        observer: is told what happens.
        settings: further keys of a recipe's ``evaluation`` section, such as ``context_length``.

    Returns:
        ``metrics``, ``texts``, ``size_bytes``, ``loaded_by``, ``memory``, ``speed``, ``seconds`` and ``environment``.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.evaluation import EvaluationJob, run_job

    watching = observer or Silent()
    given = dict(settings) if texts is None else {**settings, "texts": list(texts)}
    spec = parse_section(EvaluationSpec, given, "evaluation")
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder} is not a checkpoint: it has no config.json", "name the folder of a checkpoint")
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch, _logs() as logs:
        logprobs = None
        if reference is not None and spec.compares:
            watching.stage(f"baseline: {reference}")
            logprobs = Path(scratch) / "logprobs"
            baseline = _float_folder(reference, Path(scratch))
            job = EvaluationJob(baseline, _without_costs(spec), logprobs, writes_reference=True)
            run_job(job, log=logs / "baseline.log", on_progress=watching.progress)
        watching.stage(f"evaluate: {folder}")
        job = EvaluationJob(folder, spec if reference is not None else _alone(spec), logprobs)
        return run_job(job, log=logs / "evaluate.log", on_progress=watching.progress)


@contextmanager
def _logs() -> Iterator[Path]:
    """A temporary folder for logs, which stays where an error tells the user to read them."""
    folder = Path(tempfile.mkdtemp(prefix="quantkit-logs-"))
    try:
        yield folder
    except EvaluationError as error:
        if str(folder) not in str(error):
            shutil.rmtree(folder)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _loaded(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _calibration(given: str | Path | Mapping[str, Any] | CalibrationSpec | None) -> CalibrationSpec:
    if isinstance(given, CalibrationSpec):
        return given
    if given is None:
        return CalibrationSpec()
    keys = given if isinstance(given, Mapping) else {"dataset": str(given)}
    return parse_section(CalibrationSpec, keys, "calibration")


def _float_folder(reference: str | Path, work: Path) -> Path:
    from quantkit.source import resolve

    return resolve(ModelSpec(source=str(reference)), work).folder


def _without_costs(spec: EvaluationSpec) -> EvaluationSpec:
    """The same without memory and speed, which nobody asked for of the baseline."""
    return spec.model_copy(update={"metrics": tuple(m for m in spec.metrics if m not in ("memory", "speed"))})


def _alone(spec: EvaluationSpec) -> EvaluationSpec:
    """The metrics that need no float model.

    Raises:
        RecipeError: none is left.
    """
    metrics = tuple(metric for metric in spec.metrics if metric not in COMPARING_METRICS)
    if not metrics:
        raise RecipeError("kl_divergence and top1_agreement compare with a float model", "give reference=")
    return spec.model_copy(update={"metrics": metrics})
