"""Quantize one variant by a library, in a worker: its checkpoint, with a recipe and a manifest beside it."""

from __future__ import annotations

import glob
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.companions import licence_files, model_files
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError
from quantkit.exports.manifest import CALIBRATION, FOREIGN, public_reference, write_manifest
from quantkit.exports.writing import bits_of_file
from quantkit.isolation.attempt import Attempt, device_for, made_from, place_for
from quantkit.isolation.checking import RESCALED, WEIGHTS_ALONE, Findings, as_bad_output, checked_export
from quantkit.isolation.codes import chosen_format, read_schemes, write_in_format
from quantkit.isolation.launch import Place, ending_facts, failure, fixed_variables, launch
from quantkit.libraries.base import CODES
from quantkit.methods.base import MEANS_TOKENS
from quantkit.quantization import Job, Quantized, finished_variant
from quantkit.quantization.calibration_need import gram_note, means_note
from quantkit.quantization.job import STAGE
from quantkit.system.artifacts import (
    STAGE_FILE,
    check_writable,
    new_folder,
    translated_os_errors,
    write_json,
    write_stage,
    write_text,
)
from quantkit.system.child import Limits
from quantkit.system.distribution import own_version
from quantkit.system.ending import Ending, Kind
from quantkit.system.locks import held

if TYPE_CHECKING:
    from quantkit.recipe import LibrarySpec
    from quantkit.schemes import Scheme

OUTPUT = "output"
"""In the folder of an attempt: where the library writes."""
RENAMED = {"recipe.yaml": "library_recipe.yaml", "README.md": "library_README.md"}
"""Files of libraries that have the names of ours."""


def quantize_by_library(attempt: Attempt) -> Quantized:
    """Quantize a variant in a worker, or reuse what is there.

    Raises:
        QuantizationError: the library failed, was ended, or left nothing that can be used; the log is named.
        QuantkitError: its environment cannot be had, the device is not one of its own, ``out`` cannot be written.
    """
    check_writable(attempt.out)
    identity = made_from(attempt.job, attempt.variant)
    finished = finished_variant(attempt.out, identity)
    if finished is not None:
        return Quantized(attempt.out, finished["facts"], reused=True)
    if attempt.variant.calibrated and not attempt.job.rows:
        raise QuantizationError(f"{attempt.variant.label} needs calibration rows", "give a data set")
    place = place_for(attempt)
    started = time.perf_counter()
    with _scratch(attempt.out) as scratch, new_folder(attempt.out, guests=True) as folder:
        (scratch / OUTPUT).mkdir()
        fixed = fixed_variables(attempt.variant.plugin, device_for(attempt.variant, attempt.job))
        ending = _run(attempt, place, scratch, fixed)
        store, schemes, findings = _written(attempt, ending, scratch, folder)
        facts = {"format": store, **_facts(attempt, ending, fixed, findings, time.perf_counter() - started)}
        facts["bits_per_weight_file"] = bits_of_file(folder, attempt.job.source)
        _write_records(folder, attempt, store, schemes, identity, facts)
        write_stage(folder, STAGE, identity, facts=facts)
    return Quantized(attempt.out, facts, reused=False)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """An empty folder beside an output that nobody else may write meanwhile; what killed runs left of theirs goes."""
    prefix = f".{out.name}.library-"
    with held(out, "quantizing it"), translated_os_errors(out):
        for orphan in out.absolute().parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(orphan, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=prefix) as scratch:
            yield Path(scratch)


def _run(attempt: Attempt, place: Place, scratch: Path, fixed: dict[str, str]) -> Ending:
    """The worker's good end.

    Raises:
        QuantizationError: it came to another.
    """
    variant, limits = attempt.variant, attempt.variant.limits
    ending = launch(
        variant.plugin,
        place,
        _request(attempt, scratch),
        fixed,
        scratch=scratch,
        limits=Limits(limits.seconds, limits.memory_bytes),
        log=attempt.log,
        on_progress=attempt.observer.progress,
    )
    if ending.kind is not Kind.DONE:
        raise failure(ending, variant.label)
    return ending


def _request(attempt: Attempt, scratch: Path) -> dict[str, Any]:
    job, variant = attempt.job, attempt.variant
    model = job.source if variant.plugin.takes == "folder" else _as_gguf(job, scratch)
    return {
        "model": str(model.absolute()),
        "tokens": [list(row) for row in job.rows] if variant.calibrated else [],
        "out": str((scratch / OUTPUT).absolute()),
        "method": variant.offer.method,
        "bits": variant.width,
        "group_size": variant.group,
        "symmetric": variant.is_symmetric,
        "ignore": list(variant.ignore),
        "dtype": job.dtype,
        "device": device_for(variant, job),
        "options": variant.all_options(),
    }


def _as_gguf(job: Job, scratch: Path) -> Path:
    """The float model as a GGUF file of 16 bits."""
    from quantkit.exports import find_gguf
    from quantkit.quantization import quantize
    from quantkit.recipe import VariantSpec
    from quantkit.system.validation import parse_section

    scheme = "bfloat16" if job.dtype == "bfloat16" else "float16"
    keys = {"name": "float", "method": "none", "scheme": scheme, "format": "gguf"}
    made = quantize(job, parse_section(VariantSpec, keys, "float model"), scratch / "gguf")
    file = find_gguf(made.folder)
    if file is None:
        raise QuantizationError(f"{made.folder} holds no GGUF file")
    return file


def _written(attempt: Attempt, ending: Ending, scratch: Path, folder: Path) -> tuple[str, dict[str, Scheme], Findings]:
    """The library's output, checked and in the checkpoint's folder: its format, its schemes, what was seen of it.

    What it copied from the model's folder and no model needs stays behind.
    """
    job, variant, output = attempt.job, attempt.variant, scratch / OUTPUT
    offer, checked = variant.offer, partial(as_bad_output, variant.label, output, ending)
    if offer.writes == CODES:
        with checked():
            schemes = read_schemes(output)
        store = chosen_format(variant.format, schemes)(job.dtype)
        with checked():
            return store.name, schemes, write_in_format(job, output, schemes, store, scratch, folder)
    with checked():
        unknown = Skeleton(job.source, job.trust_remote_code).names.unmatched()[1]
        export, findings = checked_export(output, offer.writes, CheckpointReader(job.source), unknown)
    schemes = dict(export.schemes)
    kept = {file.name for file in (*export.files(), *model_files(job.source, code=True), *licence_files(job.source))}
    del export  # it holds the files open
    for path in sorted(output.iterdir()):
        if path.name in kept or path.name in RENAMED or not (job.source / path.name).exists():
            with translated_os_errors(folder):
                shutil.move(path, folder / RENAMED.get(path.name, path.name))
    return offer.writes, schemes, findings


def _facts(
    attempt: Attempt, ending: Ending, fixed: dict[str, str], findings: Findings, seconds: float
) -> dict[str, Any]:
    """What the report and ``stage.json`` hold of the variant."""
    variant, job, result = attempt.variant, attempt.job, ending.result or {}
    used, has_errors = result["used"], any(layer["error_after"] is not None for layer in findings.layers)
    given = {"samples": len(job.rows), "tokens": sum(map(len, job.rows))} if variant.calibrated else None
    return {
        "bits_per_weight": findings.packed_bytes * 8 / findings.weights,
        "layers": findings.layers,
        "notes": [
            *calibration_notes(given, used),
            *_image_notes(attempt),
            *option_notes(variant),
            *used["notes"],
            WEIGHTS_ALONE if has_errors else RESCALED,
            *_few_tokens(attempt, [layer["name"] for layer in findings.layers]),
        ],
        "seconds": seconds,
        "strategy": "library",
        "library": {
            "name": variant.library,
            "method": variant.offer.method,
            "env": variant.env,
            "versions": result["versions"],
            "variables": fixed,
            "calibration": None if given is None else {"given": given, "used": {k: used[k] for k in given}},
            "cuda_peak_bytes": result.get("cuda_peak_bytes"),
            "seconds_quantizing": result["seconds"],
            **ending_facts(ending),
        },
    }


def option_notes(variant: LibrarySpec) -> list[str]:
    """Whether a method ran with its library's own options, and which it was given others in place of."""
    recommended = variant.recommended_options()
    if not recommended:
        return []
    changed = ", ".join(f"{key} {value}" for key, value in variant.options.items() if recommended[key] != value)
    return [f"{variant.label} ran with the library's own options{f' but for {changed}' if changed else ''}"]


def _write_records(
    folder: Path,
    attempt: Attempt,
    store: str,
    schemes: Mapping[str, Scheme],
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write ``recipe.yaml`` and ``manifest.json``.

    The manifest says ``foreign`` where the library wrote the tensors, which then are read as any file of its kind.
    """
    job, variant = attempt.job, attempt.variant
    write_text(folder / "recipe.yaml", yaml.safe_dump(variant.resolved(), sort_keys=False))
    if variant.calibrated and job.audit is not None:
        write_json(folder / CALIBRATION, job.audit)
    library = facts["library"]
    made_by = f"{variant.library} {library['versions'].get(variant.plugin.distribution, '')}".strip()
    write_manifest(
        folder,
        {
            "schema": 1,
            "created_by": f"{made_by}, run by quantkit {own_version()}",
            FOREIGN: variant.offer.writes != CODES,
            "source": {**job.source_facts, "reference": public_reference(job.source_facts.get("reference"))},
            "calibration_sha256": identity["calibration"],
            "inputs": None,
            "format": store,
            "layers": {name: scheme.to_json() for name, scheme in schemes.items()},
            "embedding": None,
            "versions": {"quantkit": own_version(), **library["versions"]},
            "variables": library["variables"],
            "bits_per_weight": facts["bits_per_weight"],
            "stage_file": STAGE_FILE,
        },
    )


def _few_tokens(attempt: Attempt, layers: Iterable[str]) -> list[str]:
    """What is to be said where the calibration set is small for the library's method."""
    offer, tokens = attempt.variant.offer, sum(map(len, attempt.job.rows))
    if not offer.calibrated:
        return []
    reader = CheckpointReader(attempt.job.source)
    names = set(reader.names())
    widths = {name: reader.shape(f"{name}.weight")[-1] for name in layers if f"{name}.weight" in names}
    widest = max(widths, key=lambda name: widths[name], default=None)
    if offer.factorizes and widest is not None and tokens <= widths[widest]:
        return [gram_note(attempt.variant.label, tokens, widest, widths[widest])]
    return [means_note(attempt.variant.label, tokens)] if tokens < MEANS_TOKENS else []


def _image_notes(attempt: Attempt) -> list[str]:
    """What is to be said where rows have images, of which libraries are given the tokens alone."""
    images = len(attempt.job.images) if attempt.variant.calibrated else 0
    return [f"{images} calibration rows have images, and the library was given their tokens alone"] if images else []


def calibration_notes(given: dict[str, int] | None, used: dict[str, Any]) -> list[str]:
    """What is to be said where a library did not run the calibration set that it was given."""
    if given is None or all(given[key] == used[key] for key in given):
        return []
    return [
        f"of {given['samples']} calibration rows with {given['tokens']} tokens the library ran "
        f"{used['samples']} with {used['tokens']}"
    ]
