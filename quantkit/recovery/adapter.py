"""An adapter for a quantized checkpoint: which layers get a term, the walk that finds them, and the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.checkpoint.adapter_folder import WEIGHTS
from quantkit.engine.batches import make_batches
from quantkit.engine.causality import can_be_padded
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.empty_model import empty_model
from quantkit.engine.layers import Layer, whole_modules
from quantkit.engine.low_rank_terms import LowRankWalk, Term
from quantkit.engine.precision import pass_dtype, training_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.exports import Export, open_export
from quantkit.exports.adapter import AdapterSettings, base_digest, write_adapter
from quantkit.exports.decoded_reader import DecodedReader
from quantkit.exports.manifest import model_name, read_manifest
from quantkit.exports.rewriting import origin_folder
from quantkit.quantization.left_float import few
from quantkit.quantization.memory_use import experts_room
from quantkit.recipe.adapting import AdapterOptions
from quantkit.recipe.fields import compiled
from quantkit.recipe.recovering import RecoverOptions
from quantkit.recovery.stage import machine_of, schedule_of, take_up, told, training_folder
from quantkit.recovery.trained_terms import KIND, train_terms
from quantkit.recovery.training import Trained
from quantkit.recovery.whole_changes import whole_changes
from quantkit.system.artifacts import check_writable, new_folder, read_stage, write_stage
from quantkit.system.devices import resolve_device
from quantkit.system.distribution import own_version
from quantkit.system.locks import alone
from quantkit.system.os_errors import may_pass
from quantkit.system.progress import Observer
from quantkit.system.shutdown import patient
from quantkit.transforms.base import Changes

STAGE = "adapter"
CODE_VERSION = 6
"""Part of the fingerprint: raised when the same inputs would give other bytes."""
STRANGE = 0.9
"""Share of a weight's square that its error may be before the float model is taken for another one."""

Describe = Callable[[Path, str], None]
"""Called with the folder of an adapter when all but its mark is written, and with the name that it will have."""


@dataclass(frozen=True, slots=True)
class AdapterJob:
    """What an adapter is made of.

    Attributes:
        checkpoint: the quantized one, a folder or a GGUF file.
        original: folder of the float model that it was made of.
        original_facts: what identifies that.
        options: how the adapter is made.
        rows: calibration token ids; none are needed for a ``plain`` start without a training.
        calibration_sha256: of them.
        training: how the terms are trained on these rows from where they start; None leaves them there.
        device: ``auto`` is CUDA where there is one.
        trust_remote_code: run Python code that comes with the model.
    """

    checkpoint: Path
    original: Path
    original_facts: dict[str, Any]
    options: AdapterOptions
    rows: Sequence[Sequence[int]] = ()
    calibration_sha256: str | None = None
    training: RecoverOptions | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    @property
    def reads_rows(self) -> bool:
        """Whether its bytes depend on the rows."""
        return self.training is not None or self.options.start == "weighted"

    def made_from(self) -> dict[str, Any]:
        """What the adapter's bytes depend on, for its fingerprint."""
        device = resolve_device(self.device)
        return {
            "code": CODE_VERSION,
            "base": base_digest(self.checkpoint),
            "original": self.original_facts,
            "options": self.options.model_dump(mode="json"),
            "training": None if self.training is None else self.training.model_dump(mode="json"),
            "calibration": self.calibration_sha256 if self.reads_rows else None,
            "device": device.type,
            "versions": {name: version(name).rsplit(".", 1)[0] for name in ("torch", "transformers")},
        }


@dataclass(frozen=True, slots=True)
class Opened:
    """A quantized checkpoint and the float model beside it, as a walk needs them.

    Attributes:
        export: the checkpoint.
        skeleton: of its model.
        reader: its weights, decoded.
        transposed: paths of the modules that PEFT can adapt, and whether their weight lies transposed.
        modules: paths of all modules of the model.
        dtype: of its float tensors.
        floats: the float model, and its weights.
        changes: what transforms made of the whole float model before it was quantized.
    """

    export: Export
    skeleton: Skeleton
    reader: DecodedReader
    transposed: Mapping[str, bool]
    modules: frozenset[str]
    dtype: torch.dtype
    floats: tuple[Skeleton, CheckpointReader]
    changes: Changes = field(default_factory=Changes)

    def original(self, layer: Layer) -> torch.Tensor:
        """The float weight that a layer stands for, float32, but for factors of channels.

        Raises:
            CheckpointError: the float model has none of this shape.
        """
        skeleton, weights = self.floats
        found = skeleton.read(f"{layer.path}.weight", weights.read_finite)
        if tuple(found.shape) != layer.shape:
            raise CheckpointError(
                f"{layer.name} is {list(layer.shape)} in {self.export.path} and {list(found.shape)} in the float model",
                "give the float model that the checkpoint was made of",
            )
        return self.changes.apply(layer.path, "weight", found.float())


@contextmanager
def opened(checkpoint: Path, original: Path, device: torch.device, *, trust_remote_code: bool) -> Iterator[Opened]:
    """A quantized checkpoint and its float model, while the block lasts.

    Args:
        checkpoint: a folder or a GGUF file.
        original: folder of the float model.
        device: where the float model is run on a few tokens, to find what transforms made of it.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        CheckpointError: one of them cannot be read.
        SourceError: transformers cannot build the model.
    """
    export = open_export(checkpoint)
    reader = DecodedReader(export)
    with TemporaryDirectory(prefix="quantkit-adapter-") as scratch:
        origin = origin_folder(export, Path(scratch) / "origin")
        model = empty_model(origin, trust_remote_code)
        dtype = str(export.config().get("dtype") or export.config().get("torch_dtype")).removeprefix("torch.")
        floats = Skeleton(original, trust_remote_code), CheckpointReader(original)
        manifest = read_manifest(checkpoint if checkpoint.is_dir() else checkpoint.parent)
        yield Opened(
            export,
            Skeleton(origin, trust_remote_code, stored=reader.names()),
            reader,
            whole_modules(model),
            frozenset(name for name, _ in model.named_modules()),
            FLOATS.get(dtype, torch.float32),
            floats,
            whole_changes(manifest, *floats, device),
        )


def chosen_layers(found: Opened, options: AdapterOptions) -> tuple[list[Layer], list[str]]:
    """The layers that get a term, in the order of the model, and what the user should know of others.

    Raises:
        QuantizationError: there are none.
    """
    patterns = [compiled(pattern) for pattern in options.layers]
    head = found.skeleton.head.prefix if found.skeleton.head else None
    layers = [layer for layer in found.skeleton.layers() if layer.name in found.export.schemes]
    asked = [
        layer
        for layer in layers
        if (any(each.search(layer.name) for each in patterns) if patterns else layer.path != head)
    ]
    held = [layer for layer in asked if layer.path in found.transposed]
    if not held:
        raise QuantizationError(
            f"no quantized layer of {found.export.path} gets a term" + (" by these patterns" if patterns else ""),
            f"its layers are called {few([layer.name for layer in layers])}",
        )
    left = [layer.name for layer in asked if layer.path not in found.transposed]
    told = f"{len(left)} layers get no term, as the model holds them in stacks, which PEFT does not adapt one by one"
    return held, [f"{told}: {few(left)}"] if left else []


def target_names(paths: Sequence[str], modules: Collection[str]) -> tuple[str, ...]:
    """What tells PEFT the adapted modules: the last parts of their names where no other module has one, else all names.

    PEFT takes a module whose name is one of these or ends with one behind a dot.
    """
    leaves = {path.rpartition(".")[2] for path in paths}
    others = set(modules) - set(paths)
    if any(other.rpartition(".")[2] in leaves for other in others):
        return tuple(paths)
    return tuple(sorted(leaves))


def fit_adapter(
    job: AdapterJob, out: Path, observer: Observer, describe: Describe, state: Path | None = None
) -> dict[str, Any]:
    """Make an adapter, or find it made.

    Args:
        job: what it is made of.
        out: its folder, which appears when it is whole.
        observer: is told what happens.
        describe: adds to the new folder what is said of it, such as a model card.
        state: where the state of a training is kept; beside ``out`` by default.

    Returns:
        ``layers``, ``rank``, ``bytes`` of its tensors, ``start``, the mean of the layers' relative output errors as
        ``error`` and ``error_left``, and ``notes``.

    Raises:
        CheckpointError: the checkpoint or the float model is broken, or they are not of one model.
        QuantizationError: there are no calibration rows, or no layer gets a term.
        OutputError: ``out`` cannot be written.
    """
    check_writable(out, stage=STAGE, source=job.checkpoint)
    identity = job.made_from()
    done = read_stage(out, STAGE, identity)
    if done is not None and (out / WEIGHTS).is_file():
        return dict(done["facts"])
    if job.reads_rows and not job.rows:
        what = "a weighted start" if job.training is None else "a training"
        raise QuantizationError(f"{what} needs calibration rows", "give a data set, or start: plain and no steps")
    trained, kept = None, state or training_folder(out)
    device = resolve_device(job.device)
    with opened(job.checkpoint, job.original, device, trust_remote_code=job.trust_remote_code) as found:
        layers, notes = chosen_layers(found, job.options)
        terms = _terms(job, found, layers, observer)
        _check_original(terms, job)
        if job.training is not None:
            terms, trained = _train(job, job.training, found, terms, kept, observer)
    name = model_name(str(job.checkpoint))
    settings = AdapterSettings(
        rank=job.options.rank,
        alpha=job.options.alpha or job.options.rank,
        base=name,
        targets=target_names([layer.path for layer in layers], found.modules),
        transposed=any(found.transposed[layer.path] for layer in layers),
        dtype=found.dtype,
    )
    facts = _facts(job, terms, trained, [*notes, *job.options.notes()])
    with new_folder(out, guests=True) as folder:
        low_ranks = {term.layer.path: term.low_rank for term in terms}
        write_adapter(folder, low_ranks, settings, identity["base"], _told(job, terms, found, facts))
        facts["bytes"] = (folder / WEIGHTS).stat().st_size
        describe(folder, out.name)
        write_stage(folder, STAGE, identity, facts=facts)
    shutil.rmtree(kept, ignore_errors=True)
    return facts


def _terms(job: AdapterJob, found: Opened, layers: Sequence[Layer], observer: Observer) -> list[Term]:
    device = resolve_device(job.device)
    dtype = dtype_that_runs(found.skeleton, found.reader, device, pass_dtype(device, found.dtype), job.rows)
    rows = job.rows if job.options.start == "weighted" else ()
    may_pad = len(set(map(len, rows))) > 1 and not found.skeleton.has_routed_layers()
    may_pad = may_pad and can_be_padded(found.skeleton, found.reader, device, dtype)
    terms: list[Term] = []
    LowRankWalk(
        found.skeleton,
        found.reader,
        found.original,
        dict.fromkeys((layer.path for layer in layers), job.options.rank),
        make_batches(rows, device, may_pad),
        device,
        dtype,
        terms.append,
        lambda done, total: observer.progress("block", done, total),
        experts_room(device),
    ).run()
    return terms


def _train(
    job: AdapterJob, options: RecoverOptions, found: Opened, terms: Sequence[Term], folder: Path, observer: Observer
) -> tuple[list[Term], Trained]:
    """Train the terms, from where they start or from where a run that was stopped had brought them."""
    device = resolve_device(job.device)
    schedule = replace(schedule_of(options), rates={KIND: job.options.rate})
    with alone(folder, "recover"), patient():
        take_up(folder, {**job.made_from(), **machine_of(job.device)})
        dtype = training_dtype(device, found.dtype)
        dtype = dtype_that_runs(found.skeleton, found.reader, device, dtype, job.rows)
        try:
            return train_terms(
                terms,
                found.export,
                found.skeleton,
                (*found.floats, found.changes),
                job.rows,
                schedule,
                folder,
                observer,
                device=device,
                dtypes=(dtype, found.dtype),
            )
        except BaseException as error:
            if not may_pass(error):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _check_original(terms: Sequence[Term], job: AdapterJob) -> None:
    """Refuse a float model of which the checkpoint was not made."""
    strange = [term.layer.name for term in terms if term.distance > STRANGE]
    if len(strange) > len(terms) / 2:
        raise CheckpointError(
            f"the weights in {job.checkpoint} have nothing to do with those of the float model, such as {strange[0]}",
            "give the float model that the checkpoint was made of",
        )


def _facts(job: AdapterJob, terms: Sequence[Term], trained: Trained | None, notes: Sequence[str]) -> dict[str, Any]:
    kept = () if trained is None else (told(trained), *trained.notes)
    history = {} if trained is None else {"before": trained.before, "after": trained.after, "steps": trained.steps}
    return {
        **history,
        "layers": len(terms),
        "rank": job.options.rank,
        "start": job.options.start,
        "error": sum(term.error for term in terms) / len(terms),
        "error_left": sum(term.error_left for term in terms) / len(terms),
        "notes": [*kept, *notes],
    }


def _told(job: AdapterJob, terms: Sequence[Term], found: Opened, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the base and the files."""
    return {
        "created_by": f"quantkit {own_version()}",
        "format": found.export.format,
        "rank": job.options.rank,
        "start": job.options.start,
        "calibration_sha256": job.calibration_sha256 if job.reads_rows else None,
        "trained": {key: facts[key] for key in ("before", "after", "steps")} if "steps" in facts else None,
        "names": {term.layer.path: term.layer.name for term in terms},
        "errors": {term.layer.name: [term.error, term.error_left] for term in terms},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
