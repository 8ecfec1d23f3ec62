"""The rows of variants that one of the field's libraries quantizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.estimation.measured import beside_measured
from quantkit.evaluation.stage import report_figures
from quantkit.exports.manifest import identity, read_manifest
from quantkit.isolation.attempt import Attempt, not_installed
from quantkit.isolation.environments import environment_of
from quantkit.isolation.install import announcement
from quantkit.isolation.launch import WorkerFailedError
from quantkit.isolation.stage import quantize_by_library
from quantkit.pipeline.context import Baseline, Run, attempted, marker, score_beside
from quantkit.pipeline.titles import library_title
from quantkit.pipeline.workers import Task
from quantkit.publishing import CARD, describe
from quantkit.quantization import Job, Quantized
from quantkit.recipe import LibrarySpec, VariantSpec
from quantkit.recipe.scheme import written_keys
from quantkit.schemes import scheme_from_json
from quantkit.system.progress import Observer
from quantkit.system.validation import parse_section

LOG = "quantize"
"""Kind of the log files of workers."""
FAILURE = "worker"
"""Key of a row that failed: how the worker ended."""


def check_environments(current: Run) -> None:
    """Say which environments the run will make, or refuse where it may not.

    Variants that have a checkpoint already are left out: whether it is theirs is not known yet.

    Raises:
        QuantkitError: one is not there and may not be made.
    """
    missing = {
        variant.library: variant.plugin
        for variant in current.recipe.library_variants
        if variant.env == "own"
        and not current.variant_folder(variant.name).exists()
        and environment_of(variant.plugin).state != "ready"
    }
    if missing and not current.installs:
        raise not_installed(list(missing.values()))
    for library in missing.values():
        current.observer.note(f"will be installed: {announcement(library)}")


def library_row(
    current: Run,
    job: Job,
    variant: LibrarySpec,
    baseline: Baseline,
    write_card: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Quantize a variant in a worker and score it; whatever goes wrong becomes its row."""
    scheme = variant.asked_scheme()
    row: dict[str, Any] = {
        "name": variant.name,
        "status": "ok",
        "error": None,
        "method": variant.label,
        "format": variant.stores(),
        "scheme": f"{variant.width} bits" if scheme is None else scheme.describe(),
        "bits": variant.width,
        "group_size": variant.group,
        "symmetric": variant.is_symmetric,
        "options": variant.all_options(),
    }
    log = current.log(LOG, variant.name)

    def work() -> dict[str, Any]:
        out = current.variant_folder(variant.name)
        task = Task(library_title(variant), job.device, reads=(marker(job.source),), outputs=(out,))
        try:
            done = current.do(task, partial(_attempt, job, variant, out, log, current.installs), peak=False)
        except WorkerFailedError as error:
            row[FAILURE] = error.facts
            raise
        if not (done.folder / CARD).is_file():  # if it cannot be scored, it has one nonetheless
            describe(job, done.folder, done.folder.name)
        scored = _scored(current, variant, done, baseline)
        write_card(row | scored)
        return scored

    return attempted(current, row, work)


def _attempt(job: Job, variant: LibrarySpec, out: Path, log: Path, installs: bool, observer: Observer) -> Quantized:
    """Quantize it, wherever that is done."""
    return quantize_by_library(Attempt(job, variant, out, log, observer, installs))


def _scored(current: Run, variant: LibrarySpec, done: Quantized, baseline: Baseline) -> dict[str, Any]:
    if done.reused:
        current.observer.note(f"{variant.name}: reused the finished checkpoint")
    for note in done.facts["notes"]:
        current.observer.note(f"{variant.name}: {note}")
    scored = score_beside(current, variant.name, done.folder, identity(done.folder), baseline)
    facts, figures, told = done.facts, report_figures(scored), _as_own(variant, done)
    return {
        "format": facts["format"],
        "scheme": Counter(layer["scheme"] for layer in facts["layers"]).most_common(1)[0][0],
        "checkpoint": str(done.folder),
        "bits_per_weight": facts["bits_per_weight"],
        "bits_per_weight_file": facts.get("bits_per_weight_file"),
        "layers": facts["layers"],
        "notes": facts["notes"],
        "library": facts["library"],
        **(figures if told is None else beside_measured(figures, scored, done.folder, told)),
        "seconds": {"quantize": facts["seconds"], "evaluate": scored["seconds"]},
    }


def _as_own(variant: LibrarySpec, done: Quantized) -> VariantSpec | None:
    """A variant of quantkit's own with the same bytes, for estimates; None where one scheme does not say it all."""
    manifest = read_manifest(done.folder) or {"layers": {}}
    schemes = {scheme_from_json(each) for each in manifest["layers"].values()}
    if len(schemes) != 1:
        return None
    (scheme,) = schemes
    method = scheme.quantizer or ("gptq" if scheme.orders_columns else "rtn")
    keys = {"name": variant.name, "method": method, "format": manifest["format"], "ignore": list(variant.ignore)}
    try:
        return parse_section(VariantSpec, {**keys, **written_keys(scheme)}, variant.name)
    except RecipeError:
        return None  # a grid that quantkit reads and does not write in this format
