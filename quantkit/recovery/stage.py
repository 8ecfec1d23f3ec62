"""The recover stage: a quantized checkpoint in, the same with what it stores trained out."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.precision import training_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.exports import open_export
from quantkit.exports.manifest import FOREIGN, VERIFIED, identity, is_whole, read_manifest, write_manifest
from quantkit.quantization.job import Job, Quantized
from quantkit.quantization.left_float import few
from quantkit.recipe.recovering import RecoverOptions
from quantkit.recovery.schedule import Schedule
from quantkit.recovery.student import Student
from quantkit.recovery.targets import Targets
from quantkit.recovery.training import Trained, Training
from quantkit.recovery.whole_changes import whole_changes
from quantkit.system.artifacts import (
    STAGE_FILE,
    check_writable,
    fingerprint,
    new_folder,
    read_json,
    read_stage,
    translated_os_errors,
    write_json,
    write_stage,
    write_text,
)
from quantkit.system.devices import device_name, resolve_device
from quantkit.system.distribution import own_version
from quantkit.system.locks import alone
from quantkit.system.os_errors import may_pass
from quantkit.system.progress import Observer
from quantkit.system.shutdown import patient

STAGE = "recover"
CODE_VERSION = 6
"""Part of the fingerprint: raised when the same inputs would give other bytes."""
IDENTITY = "identity.json"
RECIPE = "recipe.yaml"

Describe = Callable[[Path, str], None]


def recover(
    job: Job,
    checkpoint: Path,
    options: RecoverOptions,
    out: Path,
    observer: Observer,
    describe: Describe = lambda _folder, _name: None,
) -> Quantized:
    """Train what a quantized checkpoint stores, or find it trained.

    Args:
        job: the float model, and the rows to train on.
        checkpoint: a folder that quantkit wrote.
        options: how it is trained.
        out: folder of the new checkpoint; it appears when it is whole.
        observer: is told what happens.
        describe: see :func:`quantkit.quantization.quantize_together`.

    Raises:
        CheckpointError: the checkpoint is broken, or was not made of the float model.
        QuantizationError: there are too few rows, or nothing that can be trained.
        OutputError: ``out`` cannot be written.
        Terminated: somebody asked to stop; the next run goes on.
    """
    check_writable(out, stage=STAGE, source=checkpoint)
    manifest = _manifest(checkpoint)
    made = made_from(job, checkpoint, options)
    finished = read_stage(out, STAGE, made)
    if finished is not None and is_whole(out):
        return Quantized(out, finished["facts"], reused=True)
    if not job.rows:
        raise QuantizationError("there are no rows to train on", "give a data set")
    started = time.perf_counter()
    folder = training_folder(out)
    with alone(out, "recover"):
        take_up(folder, {**made, **machine_of(job.device)})
        try:
            with patient():
                student, trained = _train(job, checkpoint, options, folder, observer)
            for note in trained.notes:
                observer.note(note)
            with new_folder(out, guests=True) as new:
                _write(student, trained, checkpoint, new)
                facts = _facts(checkpoint, manifest, student, trained, time.perf_counter() - started)
                _write_records(new, manifest, job, options, facts)
                describe(new, out.name)
                write_stage(new, STAGE, made, facts=facts)
        except BaseException as error:
            if not may_pass(error):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    return Quantized(out, facts, reused=False)


def training_folder(out: Path) -> Path:
    """Where the state of a training waits: beside its checkpoint."""
    return out.absolute().parent / f".{out.name}.training"


def made_from(job: Job, checkpoint: Path, options: RecoverOptions) -> dict[str, Any]:
    """What the bytes of a result depend on, for its fingerprint."""
    device = resolve_device(job.device)
    return {
        "code": CODE_VERSION,
        "checkpoint": identity(checkpoint),
        "source": job.source_facts,
        "options": options.model_dump(mode="json"),
        "data": job.calibration_sha256,
        "device": device.type,
        "passes": str(training_dtype(device, FLOATS[job.dtype])),
        "versions": {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")},
    }


def machine_of(device: str) -> dict[str, Any]:
    """What a training that goes on must have been computed with, beside what its bytes depend on."""
    return {
        "machine": {
            "device": device_name(resolve_device(device)),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
        },
        "packages": {name: version(name) for name in ("torch", "transformers")} | {"quantkit": own_version()},
    }


def take_up(folder: Path, made: Mapping[str, Any]) -> None:
    """Keep what an earlier run of the same left, and remove anything else."""
    with translated_os_errors(folder):
        try:
            same = fingerprint(read_json(folder / IDENTITY)) == fingerprint(dict(made))
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / IDENTITY, dict(made))
        shutil.rmtree(folder / "work", ignore_errors=True)
        (folder / "work").mkdir()


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that quantkit wrote.

    Raises:
        CheckpointError: another tool wrote it.
    """
    found = read_manifest(checkpoint) if checkpoint.is_dir() else None
    if found is None or found.get(FOREIGN) is True:
        remedy = "write it anew with 'quantkit convert', in the same format"
        raise CheckpointError(f"{checkpoint} is no checkpoint that quantkit wrote", remedy)
    return found


def _train(
    job: Job, checkpoint: Path, options: RecoverOptions, folder: Path, observer: Observer
) -> tuple[Student, Trained]:
    """Train, on the device and in the precision of calibration passes."""
    device = resolve_device(job.device)
    original, weights = Skeleton(job.source, job.trust_remote_code), CheckpointReader(job.source)
    wanted = training_dtype(device, FLOATS[job.dtype])
    dtype = dtype_that_runs(original, weights, device, wanted, job.rows)
    if dtype != wanted:
        observer.note("training computes in float32: the model's code does not run in bfloat16 here")
    export = open_export(checkpoint)
    changes = whole_changes(read_manifest(checkpoint), original, weights, device)
    student = Student(export, folder / "work", original, weights, options, device, job.trust_remote_code, changes)
    if student.left:
        observer.note(f"{len(student.left)} layers are not trained, as their scales cannot be: {few(student.left)}")
    try:
        with ExitStack() as ends:
            known = Targets(original, weights, job.rows, folder, device, dtype, changes, between=options.hidden > 0)
            targets = ends.enter_context(known)
            targets.prepare(partial(observer.progress, "row of the float model"))
            on_step = partial(observer.progress, "step")
            schedule = schedule_of(options)
            training = Training(
                student.skeleton, student.reader, student.parts, targets, schedule, folder, on_step, job.bounds
            )
            return student, training.run()
    except torch.OutOfMemoryError as error:
        raise QuantizationError(
            f"the memory of the GPU is too small to train {checkpoint}",
            "take fewer batch_tokens, optimizer: paged_adam8bit, or train: [scales, norms]",
        ) from error


def schedule_of(options: RecoverOptions) -> Schedule:
    """The schedule that options ask for."""
    rates = {
        "scales": options.learning_rate,
        "zeros": options.learning_rate,
        "qa-lora": options.learning_rate,
        "codes": options.rate_of_codes(),
        "norms": options.norm_rate,
        "biases": options.norm_rate,
    }
    return Schedule(
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        rates=rates,
        warmup=options.warmup,
        hidden=options.hidden,
        held_out=options.held_out,
        evaluations=options.evaluations,
        optimizer=options.optimizer,
        seed=options.seed,
    )


def _write(student: Student, trained: Trained, checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint as it became, or as it was where nothing was better."""
    if trained.best is not None:
        student.write(trained.best, folder)
        return
    with translated_os_errors(folder):
        for name in (read_manifest(checkpoint) or {}).get("files", {}):
            if name != STAGE_FILE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)


def _facts(
    checkpoint: Path, manifest: Mapping[str, Any], student: Student, trained: Trained, seconds: float
) -> dict[str, Any]:
    """What ``stage.json`` and the report say of the result."""
    before = read_json(checkpoint / STAGE_FILE).get("facts", {})
    layers = before.get("layers", [])
    kept = layers if isinstance(layers, list) else []
    notes = before.get("notes", [])
    return {
        "bits_per_weight": manifest.get("bits_per_weight"),
        "bits_per_weight_file": manifest.get("bits_per_weight_file"),
        "share": manifest.get("share"),
        "layers": [{**each, "error_before": None, "error_after": None, "notes": []} for each in kept],
        "experts": before.get("experts", []),
        "notes": [told(trained), *trained.notes, *notes],
        "recovered": {
            "before": trained.before,
            "after": trained.after,
            "steps": trained.steps,
            "tokens": trained.tokens,
            "history": [list(each) for each in trained.history],
            "layers": sum(1 for _ in student.export.schemes) - len(student.left),
        },
        "seconds": seconds,
        "strategy": STAGE,
    }


def told(trained: Trained) -> str:
    """The result of a training in a line."""
    share = trained.after / trained.before if trained.before else 1.0
    return (
        f"recovered: divergence from the float model on held-out rows {trained.before:.4g} to {trained.after:.4g} nats "
        f"({share:.2f} of what it was), by {trained.steps} steps on {trained.tokens:,} tokens"
    )


def _write_records(
    folder: Path, manifest: Mapping[str, Any], job: Job, options: RecoverOptions, facts: Mapping[str, Any]
) -> None:
    """The recipe of the checkpoint with how it was trained, and its manifest."""
    file = folder / RECIPE
    recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_text(file, yaml.safe_dump({**recipe, "recover": options.model_dump(mode="json")}, sort_keys=False))
    kept = {key: value for key, value in manifest.items() if key not in ("files", VERIFIED)}
    versions = {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")}
    write_manifest(
        folder,
        {
            **kept,
            "created_by": f"quantkit {own_version()}",
            "recovered": {
                "from": fingerprint(dict(manifest)),
                "data_sha256": job.calibration_sha256,
                **{key: facts["recovered"][key] for key in ("before", "after", "steps", "tokens")},
            },
            "versions": {"python": platform.python_version(), "quantkit": own_version(), **versions},
        },
    )
