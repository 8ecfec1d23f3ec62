"""The stage of a model's sensitivity: a folder with what :mod:`quantkit.engine.fisher` finds, for all variants.

``sensitivity.safetensors`` holds of each layer, by its name in the checkpoint, float32 ``LAYER.rows`` and
``LAYER.tokens``, and of one that was given some tokens only int32 ``LAYER.places``; ``sensitivity.json`` how many
tokens each was given, and its mean. A stage that was cut short begins anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.batches import BATCH_TOKENS, Batch, row_starts
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.fisher import Fisher, FisherSweep, LayerFisher
from quantkit.engine.kept_calls import Keep, OnDisk, on_cpu, on_device
from quantkit.engine.precision import pass_dtype
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import OutputError, QuantizationError
from quantkit.quantization.job import Job, Known, minor_versions
from quantkit.quantization.memory_use import SPARE_MEMORY
from quantkit.quantization.oom import PARTS, out_of_memory
from quantkit.system.artifacts import check_writable, new_folder, read_json, read_stage, write_json, write_stage
from quantkit.system.devices import resolve_device
from quantkit.system.free_memory import free_bytes
from quantkit.system.scratch import folder_in
from quantkit.system.shutdown import heed, patient
from quantkit.system.units import in_units

OnSegment = Callable[[int, int], None]
OnNote = Callable[[str], None]

STAGE = "sensitivity"
CODE_VERSION = 2
"""Part of the fingerprint: raised when the same inputs would give other figures."""
TENSORS, FACTS = "sensitivity.safetensors", "sensitivity.json"
SEED = 0
"""Of the labels."""


def sensitivity(job: Job, out: Path, *, on_segment: OnSegment, on_note: OnNote) -> Known:
    """Find out what the model is sensitive to, or reuse what is there.

    Args:
        job: the float model and the calibration rows.
        out: the stage's folder.
        on_segment: called with the number of blocks that were run, forward and backward, and how many there are.
        on_note: called with what the user should know.

    Raises:
        CheckpointError: the source is broken.
        QuantizationError: the model's code does not run on the rows or not backward, or the memory of the GPU is too
            small.
        OutputError: ``out`` cannot be written.
        Terminated: somebody asked to stop.
    """
    check_writable(out, stage=STAGE)
    asked = made_from(job)
    written = read_stage(out, STAGE, asked)
    if written is not None:
        return Known(out, written["fingerprint"])
    skeleton = Skeleton(job.source, job.trust_remote_code)
    skeleton.check_blocks()
    with new_folder(out) as folder, _scratch(job, folder) as scratch:
        found = _found(job, skeleton, scratch, on_segment, on_note)
        save(folder, found)
        mark = write_stage(folder, STAGE, asked)
    on_note(f"sensitivity: the model's own labels cost it {found.loss:.2f} nats a token; {len(found.layers)} layers")
    return Known(out, mark)


def _scratch(job: Job, folder: Path) -> AbstractContextManager[Path]:
    """Where inputs of blocks wait on disk: where the user says, or in the folder of the stage."""
    return nullcontext(folder) if job.bounds.disk is None else folder_in(job.bounds.disk, f"{STAGE}-")


def made_from(job: Job) -> dict[str, Any]:
    """What the figures depend on, for the fingerprint."""
    device = resolve_device(job.device)
    return {
        "code": CODE_VERSION,
        "source": job.source_facts,
        "calibration": job.calibration_sha256,
        "seed": SEED,
        "device": device.type,
        "passes": str(pass_dtype(device, FLOATS[job.dtype])),
        "versions": minor_versions("torch", "transformers"),
    }


def _found(job: Job, skeleton: Skeleton, folder: Path, on_segment: OnSegment, on_note: OnNote) -> Fisher:
    """One sweep; on a GPU that is full one with smaller batches."""
    device, reader = resolve_device(job.device), CheckpointReader(job.source)
    dtype = dtype_that_runs(skeleton, reader, device, pass_dtype(device, FLOATS[job.dtype]), job.rows)
    keep = _keep(job, skeleton, device, dtype, folder, on_note)

    def done(segments: int, total: int) -> None:
        on_segment(segments, total)
        heed()

    def sweep(batch_tokens: int) -> Fisher:
        batches = job.batches(skeleton, reader, device, dtype, batch_tokens)
        with patient():
            return FisherSweep(skeleton, reader, batches, device, dtype, SEED, keep, done).run()

    for part in (1, *PARTS[:-1]):
        try:
            return sweep(BATCH_TOKENS[device.type] // part)
        except torch.OutOfMemoryError:
            on_note(f"sensitivity: the memory of {device} ran out: smaller batches")
        torch.cuda.empty_cache()
    try:
        return sweep(BATCH_TOKENS[device.type] // PARTS[-1])
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, device) from error


def _keep(
    job: Job, skeleton: Skeleton, device: torch.device, dtype: torch.dtype, folder: Path, on_note: OnNote
) -> Keep:
    """Where the inputs of blocks wait: on the device, in the memory of the CPU, or where that is too small on disk.

    Raises:
        OutputError: the disk is too small, too.
    """
    hidden: int = skeleton.text.get_input_embeddings().weight.shape[1]
    wanted = sum(map(len, job.rows)) * hidden * len(skeleton.segments) * dtype.itemsize
    for place, keep in ((device, on_device), (torch.device("cpu"), on_cpu)):
        if wanted <= SPARE_MEMORY * free_bytes(place, job.bounds):
            return keep
    if wanted > shutil.disk_usage(folder).free:
        raise OutputError(
            f"the inputs of all blocks take {in_units(wanted)}, more than memory and the disk of {folder.parent} have",
            "use fewer calibration samples, or turn calibration.sensitivity off",
        )
    on_note(f"sensitivity: the inputs of all blocks, {in_units(wanted)}, wait in {folder.parent}")
    inputs = folder / "inputs"
    inputs.mkdir()
    return OnDisk(inputs)


def save(folder: Path, found: Fisher) -> None:
    """Write the tensors and the summary."""
    tensors: dict[str, torch.Tensor] = {}
    for name, each in sorted(found.layers.items()):
        parts = {"rows": each.rows, "tokens": each.tokens, "places": each.places}
        tensors |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    if (folder / "inputs").exists():
        (folder / "inputs").rmdir()
    save_file(tensors, folder / TENSORS)
    layers = {
        name: {"tokens": each.seen, "row_moment": float(each.rows.mean())}
        for name, each in sorted(found.layers.items())
    }
    write_json(folder / FACTS, {"loss": found.loss, "tokens": found.tokens, "layers": layers})


def load(folder: Path) -> Fisher:
    """Read the folder of a finished stage.

    Raises:
        QuantizationError: a file is missing or broken.
    """
    try:
        facts, tensors = read_json(folder / FACTS), load_file(folder / TENSORS)
        layers = {
            name: LayerFisher(
                tensors[f"{name}.rows"], each["tokens"], tensors.get(f"{name}.tokens"), tensors.get(f"{name}.places")
            )
            for name, each in facts["layers"].items()
        }
        return Fisher(layers, facts["loss"], facts["tokens"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise QuantizationError(
            f"{folder} is not a whole stage of sensitivity: {error}", "remove the folder and run again"
        ) from error


def known_sensitivity(known: Known | None, batches: Sequence[Batch]) -> Sensitivity | None:
    """What a walk with these batches is told; None for nothing."""
    if known is None or not batches:
        return None
    return Sensitivity(load(known.folder), *row_starts(batches), known.token_weights)
