"""What each choice costs each layer: one walk on the float model's activations in which every choice is a task.

Some rows are held out: they are in no statistics, and by them errors of the solved layers are told, so that methods
which fit the calibration rows closely look no better than they are. By the same rows the reverse walk finds how much
the model's loss minds errors of each output and at each token (:mod:`quantkit.engine.fisher`). A layer costs half the
sum over its outputs of that moment times the mean square of the error, each token weighed by its own moment: nats a
token. What layers cost adds up as long as errors are small (Malinovskii et al. 2024, arXiv:2411.17525).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.allocation.judging import Costs, Found, Judged
from quantkit.allocation.table import Unit
from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.batches import Batch
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.originals import Originals
from quantkit.engine.parking import Parking
from quantkit.engine.precision import pass_dtype
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import VariantTask
from quantkit.engine.transforming import Transforming
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.formats import FORMATS
from quantkit.quantization.job import NOT_IN_BYTES, Job, made_from
from quantkit.quantization.memory_use import experts_room
from quantkit.quantization.oom import FallbackStep, fallback_steps, out_of_memory, ran_out
from quantkit.quantization.plan import plan_layers
from quantkit.quantization.sensitivity import load, sensitivity
from quantkit.quantization.sensitivity import made_from as told_by
from quantkit.system.artifacts import fingerprint, new_folder, read_json, read_stage, write_json
from quantkit.system.artifacts import write_stage as mark
from quantkit.system.devices import resolve_device
from quantkit.system.free_memory import kept_to
from quantkit.system.shutdown import heed, patient

if TYPE_CHECKING:
    from quantkit.recipe.mixing import AutoSpec

STAGE = "costs"
COSTS = "costs.json"
CODE_VERSION = 3
"""Part of the fingerprint: raised when the same inputs would give other figures."""
HELD_OUT_EACH = 4
"""Every so many rows one is held out."""
HELD_OUT_TOKENS = 8192
"""Tokens of them at most: the reverse walk takes about four forward passes of these."""
ONE_ROW = (
    "warning: choices are judged by the calibration row that they are fitted to, as there is no other, and look "
    "better than they are: give more rows"
)
FLOAT = "float"
"""The kind of scheme of a choice that leaves layers as they are."""

OnSegment = Callable[[int, int], None]
OnNote = Callable[[str], None]


def measured(
    job: Job, spec: AutoSpec, units: Sequence[Unit], out: Path, *, on_segment: OnSegment, on_note: OnNote
) -> list[Unit]:
    """Units with what each choice costs them, found out or read where it is there.

    Any number of budgets share what is found: neither they nor the name of the variant are part of its fingerprint.

    Args:
        job: the float model and the calibration rows.
        spec: the variant, whose method solves each choice.
        units: with the sizes of the choices that suit them, and without costs.
        out: the stage's folder; beside it that of the sensitivity.
        on_segment: called with the number of blocks that are done and how many there are.
        on_note: called with what the user should know.

    Raises:
        SchemeError: a choice suits no layer.
        CheckpointError: the source is broken.
        QuantizationError: there are no rows, a layer cannot be solved, the model's code does not run backward, or
            nothing is known of any layer.
        OutputError: ``out`` cannot be written.
        Terminated: somebody asked to stop; what was found is kept.
    """
    if not job.rows:
        raise QuantizationError(f"{spec.name}: bits: auto needs calibration rows", "give a data set")
    solved = [name for name, patch in spec.choice_patches().items() if patch.scheme != FLOAT]
    asked = _asked_for(job, spec, solved, units)
    written = read_stage(out, STAGE, asked)
    if written is None:
        measuring = _Measuring(job, spec, solved, out, asked, on_segment, on_note)
        with new_folder(out) as folder:
            write_json(folder / COSTS, measuring.run(units))
            mark(folder, STAGE, asked)
        measuring.found.part.unlink(missing_ok=True)
    found: Costs = read_json(out / COSTS)
    return [
        replace(unit, costs={name: _cost(unit, name, found) if name in solved else 0.0 for name in unit.sizes})
        for unit in units
    ]


def _asked_for(job: Job, spec: AutoSpec, names: Sequence[str], units: Sequence[Unit]) -> dict[str, Any]:
    """What the costs depend on, and for which layers there are some."""
    alone = replace(job, inputs="float", generated=0, sensitivity=None)
    return {
        "code": CODE_VERSION,
        "choices": {name: made_from(alone, spec.uniform(name)) for name in names},
        "layers": {name: fingerprint(sorted(_suited(units, name))) for name in names},
        "judged": {**told_by(job), "experts": asdict(job.experts)},
        "held_out": [HELD_OUT_EACH, HELD_OUT_TOKENS],
        "ignored": list(NOT_IN_BYTES),
    }


def _suited(units: Iterable[Unit], choice: str) -> set[str]:
    """The layers that a choice is solved for."""
    return {layer for unit in units if choice in unit.sizes for layer in unit.layers}


def _cost(unit: Unit, choice: str, found: Costs) -> float:
    """What a choice that is solved costs a unit.

    A layer of which nothing is known, as no token that is held out reaches it, costs as much as the others of its unit
    on average; where nothing is known of any, as layers of its kind, or as all: it would look free otherwise.

    Raises:
        QuantizationError: nothing is known of any layer.
    """
    kinds = {_kind(layer) for layer in unit.layers}
    for members in (unit.layers, [each for each in found if _kind(each) in kinds], list(found)):
        own = [found[layer].get(choice) for layer in members if layer in found]
        known = [each for each in own if each is not None]
        if known:
            return sum(known) / len(known) * len(unit.layers)
    raise QuantizationError(
        f"nothing is known of what {choice} costs any layer, as no gradient of the model's loss reaches one",
        "give longer calibration rows, or write bits in place of auto",
    )


def _kind(layer: str) -> str:
    """The name of a layer without the numbers of its block and expert."""
    return re.sub(r"\d+", "", layer)


@dataclass(slots=True)
class _Measuring:
    """Costs on their way.

    Args:
        job: what is measured.
        spec: the variant.
        names: of the choices that are solved.
        out: the stage's folder.
        asked: what the costs depend on.
        on_segment: see :func:`measured`.
        on_note: see there.

    Attributes:
        found: the costs.
    """

    job: Job
    spec: AutoSpec
    names: Sequence[str]
    out: Path
    asked: Mapping[str, Any]
    on_segment: OnSegment
    on_note: OnNote
    found: Found = field(init=False)

    def __post_init__(self) -> None:
        self.found = Found(self.out.absolute().parent / f".{self.out.name}.part.json", self.asked)

    def run(self, units: Sequence[Unit]) -> Costs:
        """Solve every choice, and judge what comes of it."""
        skeleton = Skeleton(self.job.source, self.job.trust_remote_code)
        skeleton.check_blocks()
        tasks = self._tasks(skeleton, units)
        calibrates = any(task.calibrated for task in tasks)
        held_out = held_out_rows(self.job, calibrates)
        if calibrates and len(self.job.rows) == 1:
            self.on_note(ONE_ROW)
        seen = _of_rows(self.job, held_out)
        known = sensitivity(
            seen, self.out.with_name(f"{self.out.name}-fisher"), on_segment=self.on_segment, on_note=self.on_note
        )
        judged = Sensitivity(load(known.folder), _starts(self.job, held_out), 0)
        self.found.take_up()
        device = resolve_device(self.job.device)
        for step in fallback_steps(device, "one-pass", "float", calibrated=True):
            if step.says:
                self.on_note(ran_out(step, device))
            if self._walked(skeleton, tasks, held_out, judged, step, device):
                break
        self._embedding(skeleton, judged, device)
        return self.found.costs

    def _tasks(self, skeleton: Skeleton, units: Sequence[Unit]) -> list[VariantTask]:
        """A task for each choice, for the layers that it suits."""
        tasks = []
        for name in self.names:
            wanted = _suited(units, name)
            if not wanted:
                continue
            variant = self.spec.uniform(name, tied=bool(skeleton.tied))
            transforms = variant.build_transforms()
            plan = plan_layers(skeleton, variant)
            store = FORMATS.get(variant.format)(self.job.dtype)
            tasks.append(
                VariantTask(
                    name=name,
                    method=variant.build_method(),
                    schemes={layer: scheme for layer, scheme in plan.quantized.items() if layer in wanted},
                    scale_dtype=FLOATS[store.scale_dtype(self.job.dtype)],
                    sink=Judged(name, plan.embedding, self.found),
                    fused=plan.fused,
                    memory=None if transforms else Judged(name, plan.embedding, self.found),
                    transforms=transforms,
                )
            )
        return [task for task in tasks if task.schemes]

    def _walked(
        self,
        skeleton: Skeleton,
        tasks: Sequence[VariantTask],
        held_out: Sequence[int],
        judged: Sensitivity,
        step: FallbackStep,
        device: torch.device,
    ) -> bool:
        """Walk once; false where the memory of the GPU ran out and less is to be tried."""
        reader = CheckpointReader(self.job.source)
        dtype = dtype_that_runs(skeleton, reader, device, pass_dtype(device, FLOATS[self.job.dtype]), self.job.rows)
        rest = [place for place in range(len(self.job.rows)) if place not in held_out or len(self.job.rows) == 1]
        batches = [
            replace(batch, held_out=is_held, rows=tuple(places[row] for row in batch.rows))
            for is_held, places in ((False, rest), (True, held_out))
            for batch in self._batches(places, skeleton, reader, device, dtype, step)
        ]
        settings = WalkSettings(
            device,
            dtype,
            "float",
            step.strategy,
            Parking() if step.offload else None,
            tries_again=not step.is_last,
            experts=self.job.experts,
            room=experts_room(device, self.job.bounds) // step.parts,
            sensitivity=judged,
        )
        walk = Walk(skeleton, reader, batches, tasks, settings, self._segment_done)
        try:
            with patient(), kept_to(device, self.job.bounds):
                walk.run()
        except torch.OutOfMemoryError as error:
            if step.is_last:
                raise out_of_memory(error, device) from error
            gc.collect()
            torch.cuda.empty_cache()
            return False
        for failure in walk.failures.values():
            raise failure
        return True

    def _batches(
        self,
        places: Sequence[int],
        skeleton: Skeleton,
        reader: CheckpointReader,
        device: torch.device,
        dtype: torch.dtype,
        step: FallbackStep,
    ) -> list[Batch]:
        if not places:
            return []
        return _of_rows(self.job, places).batches(skeleton, reader, device, dtype, step.batch_tokens)

    def _embedding(self, skeleton: Skeleton, judged: Sensitivity, device: torch.device) -> None:
        """Judge a quantized embedding by the tokens of all rows, of which it gives one row each.

        Where a transform mixes its channels, the model's loss minds each alike.
        """
        if skeleton.embedding is None or not self.found.embeddings:
            return
        (layer,) = skeleton.embedding.layers
        originals, transforms = (
            Originals(skeleton, CheckpointReader(self.job.source), device),
            self.spec.build_transforms(),
        )
        changes = Transforming(originals, live=False).of_model(transforms)
        original = changes.apply(layer.path, "weight", originals.weight(layer.path))
        mixed = any(transform.mixes for transform in transforms)
        tokens = torch.tensor([token for row in self.job.rows for token in row])
        times = torch.bincount(tokens, minlength=layer.shape[0]).to(original)
        for choice, weight in self.found.embeddings.items():
            missing = original - weight.dequantize(torch.float32)
            errors = (times / times.sum()) @ missing.square()
            nats = judged.nats(layer.name, errors.mean().expand_as(errors) if mixed else errors)
            self.found.add(layer.name, choice, nats)

    def _segment_done(self, done: int, total: int) -> None:
        self.found.keep()
        self.on_segment(done, total)
        heed()


def held_out_rows(job: Job, calibrates: bool) -> list[int]:
    """The places of the rows by which errors are told: some of them, or where no method is calibrated, any.

    A single row is in the statistics as well.
    """
    places = list(range(len(job.rows)))
    wanted = places[HELD_OUT_EACH - 1 :: HELD_OUT_EACH] if calibrates else places
    found: list[int] = []
    tokens = 0
    for place in wanted or places[-1:]:
        if not found or tokens + len(job.rows[place]) <= HELD_OUT_TOKENS:
            found.append(place)
            tokens += len(job.rows[place])
    return found


def _of_rows(job: Job, places: Sequence[int]) -> Job:
    """The job with some of its rows."""
    images = {index: job.images[place] for index, place in enumerate(places) if place in job.images}
    rows = [job.rows[place] for place in places]
    told = fingerprint([job.calibration_sha256, list(places)])
    return replace(job, rows=rows, images=images, calibration_sha256=told)


def _starts(job: Job, held_out: Sequence[int]) -> torch.Tensor:
    """Where the tokens of each row begin among those of the rows that are held out, int64 ``[rows]``."""
    found, start = torch.zeros(len(job.rows), dtype=torch.int64), 0
    for place in held_out:
        found[place] = start
        start += len(job.rows[place])
    return found
