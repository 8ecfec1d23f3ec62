"""A checkpoint scored, alone or beside its float model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError, RecipeError
from quantkit.recipe import COMPARING_METRICS, EvaluationSpec, ModelSpec
from quantkit.system.progress import Logged, Observer
from quantkit.system.validation import parse_section


def evaluate(
    checkpoint: str | Path,
    *,
    texts: str | Sequence[str | Mapping[str, Any]] | None = None,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a checkpoint in a fresh process.

    Args:
        checkpoint: folder of a float or quantized checkpoint, a GGUF file, or the name of a hub model.
        texts: names of bundled texts, files, or mappings as in a recipe, or one of these; the bundled ones by default.
        reference: the float model to compare with; without it there is no divergence.
        adapter: folder of an adapter that ``recover`` made for the checkpoint, with which it is scored.
        trust_remote_code: run Python code that comes with the checkpoint or the reference.
        observer: is told what happens.
        settings: further keys of a recipe's ``evaluation`` section: ``context_length``, ``tasks``, ``device`` ...

    Returns:
        ``metrics``, ``texts``, ``size_bytes``, ``loaded_by``, ``notes``, ``memory``, ``speed``, ``seconds`` and
        ``environment``.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.evaluation import EvaluationJob, run_job
    from quantkit.exports.adapter import with_adapter
    from quantkit.pipeline.preflight import check_scoring
    from quantkit.source.view import loadable

    watching = observer or Logged()
    given = settings if texts is None else {**settings, "texts": texts if isinstance(texts, str) else list(texts)}
    spec = parse_section(EvaluationSpec, given, "evaluation")
    if spec.precision is not None:
        raise RecipeError("'precision' is for recipes, whose files are scored together", "give max_tokens")
    if spec.served is not None:
        raise RecipeError("'served' is for recipes, whose files are scored twice", "give loader: vllm to score by it")
    check_scoring(spec, [checkpoint] if reference is None else [checkpoint, reference])
    folder = _checkpoint_folder(checkpoint, trusted=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch, _logs() as logs, ExitStack() as ends:
        if adapter is not None:
            folder = ends.enter_context(with_adapter(folder, Path(adapter).expanduser()))
        logprobs = samples = None
        if reference is not None and spec.compares:
            watching.stage(f"baseline: {reference}")
            logprobs = Path(scratch) / "logprobs"
            baseline = _float_folder(reference, Path(scratch), watching, trusted=trust_remote_code)
            job = EvaluationJob(
                baseline, _without_costs(spec), logprobs, writes_reference=True, trust_remote_code=trust_remote_code
            )
            found = run_job(job, log=logs / "baseline.log", on_progress=watching.progress)
            _tell(watching, found)
            samples = found["samples"]["items"] if "samples" in found else None
        watching.stage(f"evaluate: {checkpoint}")
        alone = spec if reference is not None else _alone(spec)
        with loadable(folder, trust_remote_code=trust_remote_code, tell=watching.note) as seen:
            job = EvaluationJob(seen, alone, logprobs, trust_remote_code=trust_remote_code, float_samples=samples)
            found = run_job(job, log=logs / "evaluate.log", on_progress=watching.progress)
        _tell(watching, found)
        return found


def _tell(observer: Observer, scored: Mapping[str, Any]) -> None:
    for note in scored["notes"]:
        observer.note(note)


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


def _checkpoint_folder(checkpoint: str | Path, *, trusted: bool) -> Path:
    """The folder or file of a checkpoint; one of the hub is fetched.

    Raises:
        EvaluationError: there is no checkpoint.
    """
    from quantkit.checkpoint.adapter_folder import adapter_in
    from quantkit.exports import find_gguf
    from quantkit.recipe.model import HUB_REFERENCE
    from quantkit.source import hub

    folder = Path(checkpoint).expanduser()
    if not folder.exists() and HUB_REFERENCE.fullmatch(str(checkpoint)) and folder.suffix != ".gguf":
        return hub.download(str(checkpoint), None, trust_remote_code=trusted).folder
    adapter = adapter_in(folder)
    if adapter is not None:
        raise EvaluationError(*adapter)
    if not (folder / "config.json").is_file() and not (folder.exists() and find_gguf(folder)):
        raise EvaluationError(
            f"{folder} is not a checkpoint: it has no config.json",
            "name the folder of a checkpoint, a GGUF file, or org/name of the hub",
        )
    return folder


def _float_folder(reference: str | Path, work: Path, observer: Observer, *, trusted: bool) -> Path:
    from quantkit.source import resolve

    found = resolve(ModelSpec(source=str(reference), trust_remote_code=trusted), work)
    for note in found.notes:
        observer.note(f"baseline: {note}")
    return found.folder


def _without_costs(spec: EvaluationSpec) -> EvaluationSpec:
    """The same without memory, speed, tasks and answers, which nobody asked for of the baseline."""
    metrics = tuple(metric for metric in spec.metrics if metric not in ("memory", "speed"))
    return spec.model_copy(update={"metrics": metrics, "tasks": (), "answers": None})


def _alone(spec: EvaluationSpec) -> EvaluationSpec:
    """The metrics that need no float model.

    Raises:
        RecipeError: none is left.
    """
    metrics = tuple(metric for metric in spec.metrics if metric not in COMPARING_METRICS)
    if not metrics:
        raise RecipeError("kl_divergence and top1_agreement compare with a float model", "give reference=")
    return spec.model_copy(update={"metrics": metrics})
