"""The evaluate stage of a run: a checkpoint is scored once for the same content, settings and device.

Figures that were taken on another device, in another dtype or by other versions of torch and transformers are not
reused: all rows of a report are scored anew, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import records
from quantkit.evaluation import EvaluationJob, run_job
from quantkit.evaluation.job import LOGPROBS, POSITIONS, compute_dtype
from quantkit.evaluation.rounds import joined, round_of, take_over, texts_alone, write_round
from quantkit.evaluation.task_files import read_task
from quantkit.recipe import EvaluationSpec
from quantkit.recipe.evaluation import LOADERS
from quantkit.records.llamafactory import LLAMAFACTORY_PREFIX
from quantkit.runtimes import RUNTIMES
from quantkit.system.artifacts import (
    STAGE_FILE,
    file_sha256,
    fingerprint,
    mapping_or_nothing,
    new_folder,
    read_json,
    read_stage,
    write_json,
    write_stage,
)
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds
from quantkit.system.progress import Observer

EVALUATION_VERSION = 5
"""Part of the fingerprint: raised when the same checkpoint and texts would give other figures."""
STAGE = "evaluate"
RESULT = "result.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Scoring:
    """One evaluation of a run.

    Attributes:
        name: what it is called in notes.
        checkpoint: what is scored.
        identity: what the checkpoint's content depends on.
        spec: how it is scored.
        out: the stage's folder.
        log: file for what the scoring process prints.
        reference: the float model's log-probabilities; None if this is the float model, which writes its own.
        trust_remote_code: run Python code that comes with the checkpoint.
        anew: score it although its result is there.
        seen: the questions that the model was calibrated on; they are not asked.
        bounds: what the process may take of each device.
        reach: tokens of each text that are scored, in a run that scores in rounds; empty otherwise.
    """

    name: str
    checkpoint: Path
    identity: dict[str, Any]
    spec: EvaluationSpec
    out: Path
    log: Path
    reference: Path | None = None
    trust_remote_code: bool = False
    anew: bool = False
    seen: tuple[str, ...] = ()
    bounds: MemoryBounds = NO_BOUNDS
    reach: Mapping[str, int] = field(default_factory=dict)

    def made_from(self) -> dict[str, Any]:
        """What the figures depend on, for the fingerprint."""
        made = self.made_from_whatever_reach()
        return {**made, "reach": dict(self.reach)} if self.reach else made

    def made_from_whatever_reach(self) -> dict[str, Any]:
        """What the figures depend on beside how far the texts are read."""
        made = {
            "code": EVALUATION_VERSION,
            "spec": evaluation_identity(self.spec),
            "computed": computed(self.spec),
            "checkpoint": self.identity,
        }
        return made if self.spec.answers is None else {**made, "seen": fingerprint(self.seen)}

    def finished(self) -> dict[str, Any] | None:
        """The result that is there, with its ``fingerprint``, or None."""
        if self.anew:
            return None
        if self._written() is None or self._lacks_reference():
            return None
        try:
            result = round_of(self.out, self.reach) if self.reach else read_json(self.out / RESULT)
            result = {**result, "fingerprint": self.fingerprint()}
        except (OSError, ValueError, TypeError, KeyError):
            return None  # damaged since it was written, or of a shorter reach: scored again
        return result if "answers" not in result or (self.out / ANSWERS).is_file() else None

    def fingerprint(self) -> str:
        """Of the stage, the same in all its rounds."""
        return fingerprint({"stage": STAGE, **self.made_from_whatever_reach()})

    def begun(self) -> Path | None:
        """The stage's folder, if it holds figures of the beginnings of all texts, from which this one can go on."""
        written = None if self.anew or not self.reach else self._written()
        if written is None or self._lacks_reference() or not (self.out / POSITIONS).is_file():
            return None
        reach = written["made_from"]["reach"]
        goes_on = reach.keys() == self.reach.keys() and all(reach[text] <= self.reach[text] for text in reach)
        return self.out if goes_on else None

    def _lacks_reference(self) -> bool:
        """Whether this is the float model, and the log-probabilities that files are compared with are gone."""
        return self.reference is None and self.spec.compares and not (self.out / LOGPROBS).is_dir()

    def _written(self) -> dict[str, Any] | None:
        """The ``stage.json`` that is there if it is of the same; of rounds whatever their reach."""
        if not self.reach:
            return read_stage(self.out, STAGE, self.made_from())
        given = mapping_or_nothing(self.out / STAGE_FILE).get("made_from")
        reach = given.get("reach") if isinstance(given, dict) else None
        made = self.made_from_whatever_reach()
        return read_stage(self.out, STAGE, {**made, "reach": reach}) if isinstance(reach, dict) else None

    def computed_otherwise(self) -> dict[str, str] | None:
        """What the result that is there was computed by, if it is of the same all but for that."""
        try:
            then = read_json(self.out / STAGE_FILE)["made_from"]["computed"]
        except (OSError, ValueError, TypeError, KeyError):
            return None  # there is none, it is damaged, or older
        made = self.made_from()
        same = then != made["computed"] and read_stage(self.out, STAGE, {**made, "computed": then})
        return then if same else None


def score(scoring: Scoring, observer: Observer) -> dict[str, Any]:
    """Score a checkpoint in a fresh process, or reuse its result.

    Returns:
        The result of :func:`quantkit.evaluation.run_job`, with the stage's ``fingerprint``.

    Raises:
        QuantkitError: the checkpoint cannot be scored, or the result not written.
    """
    finished = scoring.finished()
    if finished is not None:
        observer.note(f"{scoring.name}: reused the finished evaluation")
        return finished
    then = None if scoring.anew else scoring.computed_otherwise()
    if then is not None:
        now = computed(scoring.spec)
        changed = ", ".join(f"{key} {then.get(key)}, now {now[key]}" for key in now if then.get(key) != now[key])
        observer.note(
            f"{scoring.name}: scored anew with all that is compared with it, for it was computed otherwise: {changed}"
        )
    is_baseline, compares, begun = scoring.reference is None, scoring.spec.compares, scoring.begun()
    with new_folder(scoring.out) as folder:
        job = EvaluationJob(
            checkpoint=scoring.checkpoint,
            spec=scoring.spec if begun is None else texts_alone(scoring.spec),
            reference=(folder / LOGPROBS if is_baseline else scoring.reference) if compares else None,
            writes_reference=is_baseline and compares,
            trust_remote_code=scoring.trust_remote_code,
            answers_file=folder / ANSWERS if scoring.spec.answers and begun is None else None,
            float_answers=_float_answers(scoring),
            float_samples=_float_samples(scoring),
            seen=scoring.seen,
            bounds=scoring.bounds,
            scratch=folder.absolute(),
            reach=scoring.reach,
            positions=folder if scoring.reach else None,
            known=begun,
        )
        result = run_job(job, log=scoring.log, on_progress=observer.progress)
        for note in result["notes"]:
            observer.note(f"{scoring.name}: {note}")
        if begun is not None:
            result = joined(read_json(begun / RESULT), result)
            take_over(begun, folder, (ANSWERS,))
        if scoring.reach:
            write_round(folder, scoring.reach, result, begun)
        write_json(folder / RESULT, result)
        write_stage(folder, STAGE, scoring.made_from())
    return {**result, "fingerprint": scoring.fingerprint()}


def _float_answers(scoring: Scoring) -> Path | None:
    """The float model's answers, which lie beside its log-probabilities where it was asked for some and could write."""
    if scoring.reference is None or scoring.spec.answers is None:
        return None
    file = scoring.reference.with_name(ANSWERS)
    return file if file.is_file() else None


def _float_samples(scoring: Scoring) -> list[dict[str, Any]] | None:
    """What the float model wrote; None where it did not."""
    if scoring.reference is None or scoring.spec.samples is None:
        return None
    found: dict[str, Any] = read_json(scoring.reference.with_name(RESULT))
    return found["samples"]["items"] if "samples" in found else None


def evaluation_identity(spec: EvaluationSpec) -> dict[str, Any]:
    """What the figures of a checkpoint depend on beside it: settings, and the content of local texts."""
    files = {text.name: content for text in spec.texts if text.file and (content := _content(text.file)) is not None}
    tasks = {task.file: read_task(Path(task.file)).identity() for task in spec.tasks if task.file}
    if spec.answers is not None and spec.answers.file and (content := _content(spec.answers.file)) is not None:
        tasks["answers"] = {"file": content}
    if spec.samples is not None and spec.samples.file and (content := _content(spec.samples.file)) is not None:
        tasks["samples"] = {"file": content}
    left_out = {"device", "dtype", "python", "served", "precision"}
    left_out |= set() if spec.precision is None else {"max_tokens"}  # the reach of a round tells it
    settings = spec.model_dump(mode="json", exclude=left_out)
    return {"settings": settings, "files": {**files, **tasks}}


def _content(file: str) -> Any:
    """What tells the content of a file of records; None where there is none, which reading it will say."""
    if file.startswith(LLAMAFACTORY_PREFIX):
        return records.identify(file)
    if Path(file).is_dir():
        return records.identify(str(Path(file).absolute()))
    return file_sha256(Path(file)) if Path(file).is_file() else None


def computed(spec: EvaluationSpec) -> dict[str, str]:
    """By what figures are computed here: ``device``, a GPU by its name, ``dtype``, ``torch`` and ``transformers``.

    Of a runtime that has an interpreter of its own also its version, and settings of its.

    Raises:
        QuantkitError: the device that the recipe names is not there.
    """
    from quantkit.system.devices import device_name, resolve_device

    device = resolve_device(spec.device)
    other = {} if spec.loader in LOADERS else RUNTIMES.get(spec.loader).computes_by(spec.python)
    return {
        "device": device_name(device),
        "dtype": compute_dtype(spec.dtype, device.type) or "the checkpoint's",
        **{package: version(package) for package in ("torch", "transformers")},
        **other,
    }


def report_figures(result: dict[str, Any]) -> dict[str, Any]:
    """A result as the report has it."""
    speed = result["speed"]
    return {
        "metrics": result["metrics"],
        "texts": result["texts"],
        **{key: result[key] for key in ("tasks", "answers", "samples") if key in result},
        "size_bytes": result["size_bytes"],
        "loaded_by": result.get("loaded_by"),
        "rounded_inputs": result.get("rounded_inputs") or [],
        **({"scoring_notes": result["notes"]} if result.get("notes") else {}),
        "scored_on": {key: result["environment"][key] for key in ("device", "dtype", "threads")},
        "memory": result["memory"],
        "speed": speed
        and {
            "prefill_tokens_per_second": speed["prefill"]["tokens_per_second"],
            "decode_tokens_per_second": speed["decode"]["tokens_per_second"],
            **speed,
        },
        **({"served": result["served"]} if "served" in result else {}),
    }


def served_figures(result: dict[str, Any]) -> dict[str, Any]:
    """What a report has of a file as it is served, beside the figures of the loader."""
    environment = result["environment"]
    told = {key: environment[key] for key in ("device", "dtype", "threads", "settings") if key in environment}
    return {
        "by": result["loaded_by"],
        "version": environment.get(result["loaded_by"]),
        **told,
        "metrics": result["metrics"],
        "weights_bytes": (result["memory"] or {}).get("weights_bytes"),
        "speed": result["speed"],
        "seconds": result["seconds"],
    }
