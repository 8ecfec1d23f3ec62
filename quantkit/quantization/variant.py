"""One variant on its way: begun before a walk, written after it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.errors import QuantizationError
from quantkit.exports.manifest import write_manifest
from quantkit.exports.writing import check_origin, origin_remarks, write_export
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.publishing import CardFacts, write_card
from quantkit.quantization.export import Origin, content_of
from quantkit.quantization.importance import write_importance
from quantkit.quantization.job import DTYPES, STAGE, Job, Quantized, Wanted, made_from
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.quantization.resume import (
    TakenUp,
    drop_spool,
    is_worth_keeping,
    spool_folder,
    spool_identity,
    take_up,
)
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import STAGE_FILE, check_writable, new_folder, write_stage
from quantkit.system.locks import alone
from quantkit.system.os_errors import may_pass


@dataclass(frozen=True, slots=True)
class Underway:
    """A variant that is being quantized.

    Attributes:
        wanted: it and where it goes.
        layers: its plan.
        spool: its finished segments.
        task: what a walk solves of it.
        resumed: what was found of an earlier run.
    """

    wanted: Wanted
    layers: Layers
    spool: SolvedLayers
    task: Task
    resumed: TakenUp


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a walk took: the part that all of its variants share, and the one of this variant."""

    shared: float
    own: float
    variants: int


def start(job: Job, skeleton: Skeleton, wanted: Wanted, folders: ExitStack) -> Underway:
    """Plan a variant and open the folder in which its solved layers wait, with what an earlier run left there.

    Nobody else writes its folder until ``folders`` is closed.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        QuantizationError: it needs calibration rows and there are none.
        OutputError: its folder cannot be written, or another process writes it.
    """
    variant = wanted.variant
    layers = plan_layers(skeleton, variant)
    method = variant.build_method()
    if method.needs and not job.rows:
        raise QuantizationError(f"{variant.name}: method {variant.method} needs calibration rows", "give a data set")
    check_writable(wanted.out)
    check_origin(FORMATS.get(variant.format), job.source)
    folders.enter_context(alone(wanted.out, f"quantize {variant.name}"))
    folder = spool_folder(wanted.out)
    resumed = take_up(folder, spool_identity(job, variant), _segments(skeleton, layers))
    store = FORMATS.get(variant.format)
    replays = bool(method.needs) and job.feed == "quantized"
    spool = SolvedLayers(folder, store(job.dtype), layers.quantized, layers.embedding, replays=replays)
    spool.take_up(resumed.segments)
    scale_dtype = DTYPES[store.scale_dtype(job.dtype)]
    task = Task(variant.name, method, layers.quantized, scale_dtype, spool, layers.fused, spool)
    return Underway(wanted, layers, spool, task, resumed)


def _segments(skeleton: Skeleton, layers: Layers) -> list[str]:
    """The prefixes of the segments that hold quantized layers, in the order in which a walk solves them."""
    head = [] if skeleton.head is None else [skeleton.head]
    holding = [each.prefix for each in [*skeleton.segments, *head] if set(each.linears) & set(layers.quantized)]
    return holding if layers.embedding is None else [layers.embedding, *holding]


def finish(
    job: Job, skeleton: Skeleton, done: Underway, seconds: Seconds, strategy: str, notes: Sequence[str]
) -> Quantized:
    """Write the checkpoint of a solved variant.

    Args:
        job: it was made from.
        skeleton: of the model.
        done: the variant.
        seconds: that its walk took.
        strategy: of its walk.
        notes: on its walk.
    """
    started = time.perf_counter()
    variant, out = done.wanted.variant, done.wanted.out
    store = FORMATS.get(variant.format)(job.dtype)
    identity = made_from(job, variant)
    with new_folder(out) as folder:
        head = skeleton.head.prefix if skeleton.head else None
        origin = Origin(job.source, job.dtype, head, job.trust_remote_code)
        content = content_of(origin, done.spool, done.layers)
        write_export(content, store, folder)
        write_importance(folder, job, content, done.spool.tokens())
        own_before, shared_before = done.spool.seconds_before
        own = own_before + seconds.own + time.perf_counter() - started
        shared = shared_before + seconds.shared
        remarks = [*origin_remarks(store, job.source, job.dtype), *_remarks(store, done.layers)]
        facts = {
            **_facts(done.layers, done.spool, [*remarks, *filter(None, [done.resumed.note]), *notes]),
            "resumed": len(done.resumed.segments),
            "seconds": shared + own,
            "seconds_shared": shared,
            "seconds_own": own,
            "walk_variants": seconds.variants,
            "strategy": strategy if done.task.method.needs and job.feed == "quantized" else "none",
        }
        _write_records(folder, job, variant, identity, facts, done.layers)
        write_card(folder, replace(card_facts(job), repository=out.name))
        write_stage(folder, STAGE, identity, facts=facts)
    drop_spool(out)
    return Quantized(out, facts, reused=False)


def leave(done: Underway, outcome: Quantized | BaseException | None) -> None:
    """Keep what was solved of a variant for the next run, unless it is finished or would fail again.

    Args:
        done: the variant.
        outcome: what became of it, or of the work on all.
    """
    fails_again = isinstance(outcome, BaseException) and not may_pass(outcome)
    folder = spool_folder(done.wanted.out)
    if folder.exists() and (fails_again or not is_worth_keeping(folder)):
        drop_spool(done.wanted.out)


def card_facts(job: Job) -> CardFacts:
    """What the card of a checkpoint may say of the model that it was made of."""
    name, revision = job.hub or (None, None)
    return CardFacts(base_model=name, revision=revision, source=job.source)


def _remarks(store: Format, layers: Layers) -> list[str]:
    """What the format has to say of the linear layers, and of a quantized embedding."""
    remarks = store.remarks({scheme for scheme in layers.linears.values() if scheme is not None})
    if layers.embedding is None:
        return list(remarks)
    return list(dict.fromkeys((*remarks, *store.for_embeddings().remarks({layers.quantized[layers.embedding]}))))


def _facts(layers: Layers, spool: SolvedLayers, remarks: Sequence[str]) -> dict[str, Any]:
    found = spool.layers()
    notes = list(dict.fromkeys(f"{layer['name']}: {note}" for layer in found for note in layer["notes"]))
    return {
        "bits_per_weight": spool.stored_bytes * 8 / layers.weights() if layers.quantized else 16.0,
        "layers": found,
        "notes": [*remarks, *notes],
    }


def _write_records(
    folder: Path, job: Job, variant: VariantSpec, identity: dict[str, Any], facts: dict[str, Any], layers: Layers
) -> None:
    """The recipe of this checkpoint, and its manifest."""
    text = yaml.safe_dump(variant.resolved(), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    versions = {name: version(name) for name in ("quantkit", "torch", "transformers", "safetensors", "numpy")}
    write_manifest(
        folder,
        {
            "schema": 1,
            "created_by": f"quantkit {versions['quantkit']}",
            "source": {**job.source_facts, "reference": public_reference(job.source_facts.get("reference"))},
            "calibration_sha256": identity["calibration"],
            "feed": identity["feed"],
            "format": variant.format,
            "layers": {name: scheme.to_json() for name, scheme in layers.quantized.items()},
            "embedding": layers.embedding,
            "versions": {"python": platform.python_version(), **versions},
            "bits_per_weight": facts["bits_per_weight"],
            "stage_file": STAGE_FILE,
        },
    )


def public_reference(reference: Any) -> Any:
    """A model's reference for others: of one on this machine its name alone."""
    return Path(reference).name if isinstance(reference, str) and Path(reference).expanduser().exists() else reference
