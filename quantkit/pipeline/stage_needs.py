"""What each stage of a run will take on this machine, whether bounds leave it that, and what it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.passes import CPU
from quantkit.engine.precision import pass_dtype
from quantkit.errors import RecipeError, SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.measured import held_by, known_anatomy
from quantkit.estimation.stages import (
    Room,
    StageNeed,
    copying_need,
    recover_need,
    scoring_need,
    sensitivity_need,
    walk_need,
)
from quantkit.estimation.streaming import How, Loaded, Scored, loaded_as
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.evaluation.job import compute_dtype
from quantkit.evaluation.stage_peak import warm_up
from quantkit.formats import FORMATS
from quantkit.merging import MergedModel
from quantkit.pipeline.context import BASELINE
from quantkit.pipeline.mixing import measured_alike, plain_or_like
from quantkit.pipeline.titles import (
    BASELINE_TITLE,
    SENSITIVITY_TITLE,
    SOURCE_TITLE,
    evaluation_title,
    library_title,
    mixing_title,
    recover_title,
    served_title,
    walk_title,
)
from quantkit.quantization import Job, walks
from quantkit.recipe import AutoSpec, LibrarySpec, Recipe, RecoverSpec, VariantSpec
from quantkit.recipe.evaluation import AUTO, LOADERS
from quantkit.runtimes import RUNTIMES
from quantkit.system.devices import resolve_device
from quantkit.system.free_memory import free_bytes
from quantkit.system.units import in_units

if TYPE_CHECKING:
    from quantkit.source import SourceModel

LOGPROB_BYTES = 2
"""Of a log-probability of the float model, of every token of the vocabulary."""
MERGING = 3
"""Copies of the largest tensor while a difference is added to it, in float32 as twice 16 bits."""
MIB = 1 << 20


def stage_needs(recipe: Recipe, model: SourceModel, job: Job, tokens: int) -> list[StageNeed] | None:
    """What each stage takes, in the order of a run; None for a model that transformers does not build by itself.

    Args:
        recipe: what is run.
        model: its source.
        job: of quantizing.
        tokens: of the calibration set.
    """
    anatomy = known_anatomy(model.folder)
    if anatomy is None:
        return None
    process = _process_bytes()
    needs = _Needs(recipe, model, job, tokens, anatomy).all()
    return [replace(need, process=process if need.device == "cpu" else 0) for need in needs]


def _process_bytes() -> int:
    """What a process takes that computes nothing: this one has the same packages, and has computed a little."""
    warm_up()
    return int(psutil.Process().memory_info().rss)


class _Needs:
    """What the stages of one run take."""

    def __init__(self, recipe: Recipe, model: SourceModel, job: Job, tokens: int, anatomy: Anatomy) -> None:
        self.recipe, self.model, self.job, self.anatomy = recipe, model, job, anatomy
        device, scored_on = resolve_device(job.device), resolve_device(recipe.evaluation.device)
        self.room, self.scoring_room = _room(device, job), _room(scored_on, job)
        dtype = str(pass_dtype(device, FLOATS[job.dtype])).removeprefix("torch.")
        self.use = Use(
            calibration_tokens=max(1, tokens),
            inputs=job.inputs,
            device=self.room.device,
            pass_dtype=dtype,
        )
        self.own = [plain_or_like(job, variant, recipe.folder) for variant in recipe.own_variants]
        self.files: dict[str, Stored] = {}
        self.stores: dict[str, str] = {}
        for variant in self.own:
            with suppress(SchemeError):  # it does not suit the model, as its row will say
                self.files[variant.name] = stored(anatomy, variant, job.dtype)
                self.stores[variant.name] = variant.format

    def all(self) -> Iterator[StageNeed]:
        """All of them."""
        if isinstance(self.model, MergedModel):
            reader = CheckpointReader(self.model.folder)
            sizes = [reader.nbytes(name) for name in reader.names()]
            yield copying_need(SOURCE_TITLE, "adding adapters", max(sizes), MERGING, sum(sizes))
        compares = self.recipe.evaluation.compares
        logprobs = LOGPROB_BYTES * self._scored().tokens * self.anatomy.vocabulary if compares else 0
        yield self._scoring_of(BASELINE_TITLE, disk=logprobs)
        yield from self._served(BASELINE)
        if self.recipe.calibration.wants_sensitivity:
            yield sensitivity_need(SENSITIVITY_TITLE, self.anatomy, self.use, self.room)
        for mixes in measured_alike(self.recipe.own_variants):
            planned = list(self._choices(mixes[0]))
            if planned:  # an allocation that is given back is not measured
                use = self.use.model_copy(update={"inputs": "float"})
                yield walk_need(mixing_title(mixes), self.anatomy, planned, use, self.room)
        for places in walks(self.job, self.own):
            yield from self._walk([self.own[place] for place in places])
        for library in self.recipe.library_variants:
            yield StageNeed(library_title(library), self.room.device, None, "by the library")
            yield from self._scorings(library)
        for trained in self.recipe.recover_variants:
            yield from self._trained(trained)

    def _choices(self, spec: AutoSpec) -> Iterator[tuple[VariantSpec, Stored]]:
        """The choices of a mix that are measured, each with its file; one that suits no layer is not."""
        for name, scheme in spec.choice_schemes().items():
            if scheme is None:
                continue
            with suppress(SchemeError):
                choice = spec.uniform(name, tied=self.anatomy.tied)
                yield choice, stored(self.anatomy, choice, self.job.dtype)

    def _walk(self, group: Sequence[VariantSpec]) -> Iterator[StageNeed]:
        planned = [(variant, self.files[variant.name]) for variant in group if variant.name in self.files]
        if not planned:
            return
        yield walk_need(walk_title(group), self.anatomy, planned, self.use, self.room)
        for variant, _ in planned:
            yield from self._scorings(variant)

    def _trained(self, variant: RecoverSpec) -> Iterator[StageNeed]:
        file = self.files.get(variant.recover)
        title = recover_title(variant)
        if file is None:
            yield StageNeed(title, self.room.device, None, "a block at a time")
        else:
            self.files[variant.name], self.stores[variant.name] = file, self.stores[variant.recover]
            yield recover_need(title, self.anatomy, file, variant.options, self.use, self.room)
        yield from self._scorings(variant)

    def _scorings(self, variant: VariantSpec | LibrarySpec | RecoverSpec) -> Iterator[StageNeed]:
        """The scoring of a file, and the one as it is served."""
        file, scored = self.files.get(variant.name), self._scored()
        loaded = None
        if file is not None:
            loaded = loaded_as(self.anatomy, scored, self._held(self.stores[variant.name], scored.dtype), file.nbytes)
        yield self._scoring_of(evaluation_title(variant.name), loaded=loaded)
        yield from self._served(variant.name)

    def _served(self, name: str) -> Iterator[StageNeed]:
        spec = self.recipe.evaluation.as_served
        if spec is not None:
            yield StageNeed(served_title(name, spec.loader), self.scoring_room.device, None, f"by {spec.loader}")

    def _scoring_of(self, title: str, *, loaded: Loaded | None = None, disk: int = 0) -> StageNeed:
        room, loader = self.scoring_room, self.recipe.evaluation.loader
        return scoring_need(title, self.anatomy, self._scored(), room, loaded=loaded, disk=disk, loader=loader)

    def _held(self, store: str, dtype: str) -> How:
        """How who scores a file holds it."""
        kind, asked = FORMATS.get(store), self.recipe.evaluation.loader
        wanted = AUTO if asked in LOADERS else asked
        if store == "float":
            return "float"
        if kind.container == "gguf":
            is_there = wanted in (AUTO, "llama.cpp") and RUNTIMES.get("llama.cpp").missing() is None
            return "packed" if is_there else "decoded"
        is_transformers = "transformers" in kind.runtimes and wanted != "reference"
        return held_by("transformers" if is_transformers else "reference", store, dtype).how

    def _scored(self) -> Scored:
        spec, device = self.recipe.evaluation, self.scoring_room.device
        dtype = compute_dtype(spec.dtype, device) or self.job.dtype
        return Scored(spec.max_tokens * len(spec.texts), spec.context_length, dtype, device)


def _room(device: torch.device, job: Job) -> Room:
    return Room(device.type, free_bytes(device, job.bounds), free_bytes(CPU, job.bounds))


def check_bounds(needs: Sequence[StageNeed], recipe: Recipe) -> None:
    """Refuse a run that needs more than its bounds however it gets by.

    Raises:
        RecipeError: with the smallest bound that does.
    """
    for kind, key in (("quantization", recipe.quantization.device), ("evaluation", recipe.evaluation.device)):
        device = resolve_device(key)
        bound = recipe.max_memory.of(device)
        own = [need for need in needs if need.stage.startswith(("baseline", "evaluate")) == (kind == "evaluation")]
        if bound is None or not own:
            continue
        most = max(own, key=lambda need: need.least)
        base = most.process
        if most.least + base > bound:
            wanted = -(-(most.least + base) // MIB)
            beside = f", {in_units(base)} of Python and its packages among them" if base else ""
            raise RecipeError(
                f"max_memory: '{most.stage}' takes {wanted} MiB of {device} at the least{beside}, and may have "
                f"{in_units(bound)}",
                f"give {device} {wanted}MiB or more",
            )


def beside_peaks(needs: Sequence[StageNeed] | None, peaks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What stages were expected to take and what they took, for a report.

    Args:
        needs: None where nothing is known.
        peaks: by title ``kind``, ``baseline_bytes`` and ``peak_bytes``.

    Returns:
        For each ``stage``, ``how``, ``estimated_bytes`` (None if unknown), ``measured_bytes`` (what it took beside what
        was there; None where it was not measured or its result was there), ``ratio``, ``baseline_bytes``, ``kind`` and
        ``seconds``; and of the whole process ``estimated_peak_bytes``, ``measured_peak_bytes`` and ``peak_ratio``.
    """
    known = {need.stage: need for need in needs or ()}
    found = []
    for stage in dict.fromkeys([*peaks, *known]):
        need, peak = known.get(stage), peaks.get(stage)
        estimated = None if need is None else need.nbytes
        whole = None if need is None or estimated is None else need.process + estimated
        measured = None if peak is None else max(0, int(peak["peak_bytes"]) - int(peak["baseline_bytes"]))
        most = None if peak is None else int(peak["peak_bytes"])
        found.append(
            {
                "stage": stage,
                "how": "" if need is None else need.how,
                "estimated_bytes": estimated,
                "measured_bytes": measured,
                "ratio": estimated / measured if estimated and measured else None,
                "baseline_bytes": None if peak is None else peak["baseline_bytes"],
                "kind": None if peak is None else peak["kind"],
                "seconds": None if peak is None else peak["seconds"],
                "estimated_peak_bytes": whole,
                "measured_peak_bytes": most,
                "peak_ratio": whole / most if whole and most else None,
            }
        )
    return found
