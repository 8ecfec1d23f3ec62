"""Adapters on quantized checkpoints: one by a command, and the rows of a report that are other variants with one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit import calibration
from quantkit.exports.adapter import FOLDER
from quantkit.exports.manifest import MANIFEST, VERIFIED, is_whole, write_manifest
from quantkit.merging import merged_source
from quantkit.publishing.adapter_card import describe_adapter
from quantkit.quantization import Job, Quantized
from quantkit.recipe import CalibrationSpec, MergeSpec, ModelSpec, RecoverOptions
from quantkit.recipe.adapting import AdapterOptions
from quantkit.recovery.adapter import STAGE, AdapterJob, fit_adapter
from quantkit.recovery.stage import training_folder
from quantkit.system.artifacts import (
    STAGE_FILE,
    check_writable,
    file_sha256,
    new_folder,
    read_json,
    read_stage,
    write_stage,
)
from quantkit.system.progress import Observer
from quantkit.system.scratch import workplace

ADAPTED = "adapted"
"""The stage of a checkpoint with its adapter in one folder."""


def adapt_one(
    checkpoint: Path,
    reference: str,
    data: CalibrationSpec,
    options: AdapterOptions,
    training: RecoverOptions,
    out: Path,
    observer: Observer,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Make an adapter for a quantized checkpoint; see :func:`quantkit.recovery.adapter.fit_adapter`.

    Args:
        checkpoint: its folder or file.
        reference: the float model.
        data: by which the start is weighed, and on which the terms are trained.
        options: of the adapter.
        training: how the terms are trained, where the options ask for it.
        out: folder of the adapter.
        observer: is told what happens.
        device: where it is computed.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        ``adapter``, its folder, and what :func:`~quantkit.recovery.adapter.fit_adapter` gives.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    check_writable(out, stage=STAGE, source=checkpoint)
    with workplace(out, "adapter") as scratch:
        observer.stage(f"source: {reference}")
        model = ModelSpec(source=reference, trust_remote_code=trust_remote_code)
        found = merged_source(model, MergeSpec(), scratch, observer)
        observer.stage(f"data: {data.dataset}")
        built = calibration.build(data, found.folder, scratch / "data", trust_remote_code=trust_remote_code)
        for line in calibration.audit_lines(built.audit):
            observer.note(line)
        observer.stage(f"adapter: {checkpoint}")
        job = AdapterJob(
            checkpoint,
            found.folder,
            found.made_from(),
            options,
            built.rows,
            built.sha256,
            training if options.trained else None,
            device,
            trust_remote_code,
        )
        return {"adapter": str(out), **fit_adapter(job, out, observer, describe_adapter)}


def adapted(
    job: Job, checkpoint: Path, options: AdapterOptions, training: RecoverOptions, out: Path, observer: Observer
) -> Quantized:
    """A checkpoint with an adapter in its folder ``adapter``, as the row of a report is scored.

    Args:
        job: the float model, and the rows.
        checkpoint: of another variant.
        options: of the adapter.
        training: how the terms are trained, where the options ask for it.
        out: folder of the new checkpoint; files of the other that it holds too are links where the disk has them.
        observer: is told what happens.

    Raises:
        QuantkitError: see :func:`quantkit.recovery.adapter.fit_adapter`.
    """
    made = AdapterJob(
        checkpoint,
        job.source,
        job.source_facts,
        options,
        job.rows,
        job.calibration_sha256,
        training if options.trained else None,
        job.device,
        job.trust_remote_code,
    )
    check_writable(out, stage=ADAPTED, source=checkpoint)
    identity = {"manifest": file_sha256(checkpoint / MANIFEST), **made.made_from()}
    done = read_stage(out, ADAPTED, identity)
    if done is not None and is_whole(out):
        return Quantized(out, done["facts"], reused=True)
    started = time.perf_counter()
    with new_folder(out, guests=True) as folder:
        manifest = read_json(checkpoint / MANIFEST)
        for name in [*manifest["files"], MANIFEST]:
            _link(checkpoint / name, folder / name)
        told = fit_adapter(made, folder / FOLDER, observer, describe_adapter, training_folder(out))
        kept = {key: value for key, value in manifest.items() if key not in ("files", VERIFIED)}
        (folder / MANIFEST).unlink()
        write_manifest(folder, {**kept, "adapter": {key: told[key] for key in ("layers", "rank", "start", "bytes")}})
        facts = _facts(checkpoint, manifest, told, time.perf_counter() - started)
        write_stage(folder, ADAPTED, identity, facts=facts)
    return Quantized(out, facts, reused=False)


def _facts(checkpoint: Path, manifest: Mapping[str, Any], told: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What ``stage.json`` and the report say of the result."""
    before = read_json(checkpoint / STAGE_FILE).get("facts", {})
    layers, experts = before.get("layers", []), before.get("experts", [])
    size = f"adapter: rank {told['rank']} for {told['layers']} layers, {told['bytes'] / 2**20:.1f} MiB beside the codes"
    return {
        **{key: manifest.get(key) for key in ("bits_per_weight", "bits_per_weight_file", "share")},
        "layers": layers if isinstance(layers, list) else [],
        "experts": experts,
        "notes": [size, *told["notes"], *before.get("notes", [])],
        "recovered": {key: told.get(key) for key in ("before", "after", "steps")},
        "seconds": seconds,
        "strategy": ADAPTED,
    }


def _link(file: Path, place: Path) -> None:
    """The same file at another place, or a copy where the disk has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
