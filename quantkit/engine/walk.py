"""The walk: segment by segment, gather the statistics of every input, solve, go on with the result.

Within a segment the layers that share an input form a group. With quantized inputs (``inputs: quantized``) all
passes pause before the first layer of a group; when every pass stands there or beyond, the statistics are
complete, the group is solved, its weights are replaced, and the same passes go on with them: true
sequential calibration in one forward pass. Where the activations of all batches inside a segment would not
fit in memory, the segment is run anew for each group instead, one batch at a time. With float inputs nothing
is replaced and nothing pauses, so that any number of variants is solved from the same statistics.

The experts of a layer are solved together: first what reads the layer's input in all of them, then what reads that.
Their statistics are known when the whole segment has run, so that with quantized inputs a segment with experts is run
anew for each step. Where they would not fit in memory they come in parts.

Batches may leave a segment out, as text leaves out layers that look at images. One that no batch comes to is solved
from its weights alone.

The input embedding, where a task quantizes it, comes before the first segment and is solved from its weight alone: what
it is read with are token ids.

Transforms are asked what they do to the whole model before the first segment, and what they do to a segment before its
first layer is solved, from its statistics as it is; with quantized inputs these are gathered by one more run of it.
Where one mixes channels, passes run through what transforms make of the whole model with float inputs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.cache_rounding import Largest, hand_over_scales
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.gathering import Group, Replay, Solvable, Step, Streams, batch_of, pause_at
from quantkit.engine.input_rounding import take_rounders
from quantkit.engine.originals import Originals
from quantkit.engine.parking import Parking
from quantkit.engine.passes import AtSegment
from quantkit.engine.routing import ROUTED, ExpertSettings
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.solve import Solver
from quantkit.engine.tasks import VariantTask
from quantkit.engine.tuning import Example
from quantkit.engine.twins import Outputs, Twins, leaving
from quantkit.methods.base import InputStatistics

Inputs = Literal["quantized", "float"]
Strategy = Literal["one-pass", "recompute"]


@dataclass(frozen=True, slots=True)
class WalkSettings:
    """How a walk computes.

    Attributes:
        device: where segments are loaded and solved.
        dtype: of weights and activations in the forward passes; layers are solved in float32.
        inputs: what a layer is calibrated on, see :class:`quantkit.recipe.CalibrationSpec`.
        strategy: ``one-pass`` keeps the activations of all batches alive at a pause, ``recompute`` those of one.
        parking: where activations wait between segments; None where they are.
        tries_again: a GPU that is full ends the walk, and whoever runs it tries with less; without, it is the failure
            of the task whose own work it is.
        experts: how experts are calibrated.
        room: bytes that statistics of experts may take at a time; None for no limit.
        sensitivity: what is known of the model's loss; None for nothing.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    inputs: Inputs = "quantized"
    strategy: Strategy = "one-pass"
    parking: Parking | None = None
    tries_again: bool = False
    experts: ExpertSettings = ROUTED
    room: int | None = None
    sensitivity: Sensitivity | None = None


@dataclass(slots=True)
class Walk:
    """One walk over a model.

    Args:
        skeleton: the model.
        reader: where weights come from.
        batches: the calibration tokens, on the device of the walk.
        tasks: what is solved; quantized inputs is the stream of one variant and takes one task.
        settings: how.
        on_segment: called with the number of finished segments and how many there are.
        crew: the processes that walk together, of which this is one.
    """

    skeleton: Skeleton
    reader: WeightReader
    batches: Sequence[Batch]
    tasks: Sequence[VariantTask]
    settings: WalkSettings
    on_segment: Callable[[int, int], None] = lambda _done, _total: None
    crew: Crew = ALONE
    _solver: Solver = field(init=False)
    _streams: Streams = field(init=False)
    _twins: Twins | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        originals = Originals(self.skeleton, self.reader, self.settings.device)
        self._solver = Solver(
            self.tasks,
            originals,
            self._is_quantized,
            self.settings.tries_again,
            any(task.mixing for task in self._reading()),
            self.settings.sensitivity,
            self.crew,
        )
        settings = self.settings
        self._streams = Streams(
            self.skeleton.text,
            self.batches,
            self._solver.needs(),
            settings.parking,
            settings.experts,
            settings.room if settings.room is None or self.crew.is_alone else settings.room // 2,  # sums, and a turn's
            settings.sensitivity,
            self.crew,
        )
        tunes = self._solver.tunes()
        if self._is_quantized and (tunes or self._solver.corrects()) and self.skeleton.runs_once:
            self._twins = Twins(self.skeleton.text, self.batches, settings.parking, all_paired=tunes, crew=self.crew)

    @property
    def failures(self) -> dict[str, Exception]:
        """By name the tasks that failed and were dropped while others went on."""
        return self._solver.failures

    @property
    def seconds(self) -> dict[str, float]:
        """By name what each task's own work took; the rest of the walk is shared."""
        return self._solver.seconds()

    @property
    def _is_quantized(self) -> bool:
        return self.settings.inputs == "quantized"

    def run(self) -> None:
        """Walk through all segments.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: a layer cannot be solved, and no other task is left that can.
            torch.OutOfMemoryError: the GPU is full.
        """
        if self._is_quantized and len(self.tasks) > 1:
            raise ValueError("quantized inputs is the stream of one variant: give one task per walk")
        if len({str([(each.name, each.options) for each in task.mixing]) for task in self._reading()}) > 1:
            raise ValueError("what mixes channels is the same for all tasks of a walk")
        segments = self._wanted_segments()
        if not self._is_left(segments):
            return
        calibrated = bool(self._reading()) and bool(self.batches)
        with torch.no_grad(), ExitStack() as cleanup:
            cleanup.callback(take_rounders, [layer.module for segment in segments for layer in segment.layers])
            self._solver.begin()
            self._solver.agree()
            if calibrated:
                self._load_frame()
                pause_at(segments, self.skeleton.text.get_output_embeddings(), cleanup)
                if self._twins is not None:
                    self._twins.start(segments, cleanup)
            self._solve_embedding(live=calibrated)
            self._solver.agree()
            if calibrated:
                self._streams.start(segments, cleanup)
            for index, segment in enumerate(segments):
                started = self._solver.clock()
                if calibrated or self._solver.at_work(segment):
                    self._pass(segment, calibrated, last=index == len(segments) - 1)
                self._solver.finish(segment, started)
                self._solver.agree()
                self.on_segment(index + 1, len(segments))

    def _reading(self) -> list[VariantTask]:
        """The tasks for which passes run: those that are calibrated, and all where batches that are held out judge."""
        judged = any(batch.held_out for batch in self.batches)
        return [task for task in self.tasks if task.calibrated or judged]

    def _load_frame(self) -> None:
        """Load what runs before, between and after the blocks, as the transforms make it where the passes see that."""
        sees = any(batch.inputs for batch in self.batches)
        apart = self._wanted_towers()
        self.skeleton.load_frame(self.reader, self.settings.device, self.settings.dtype, towers=sees, apart=apart)
        if self._solver.transforming.mixed:
            self._solver.transforming.apply_to_frame(self._solver.alive()[0])

    def _pass(self, segment: Segment, calibrated: bool, last: bool) -> None:
        """Load a segment, solve what is still to be solved of it, and go on."""
        self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
        self._solver.enter(segment)
        try:
            at_work = bool(self._solver.at_work(segment))
            if not calibrated or (at_work and not self._streams.comes_to(segment)):
                self._solve_uncalibrated(segment)
            elif at_work:
                self._calibrate(segment, last)
            else:
                self._repeat(segment, last)
        finally:
            self.skeleton.unload(segment)

    def _repeat(self, segment: Segment, last: bool) -> None:
        """Bring every pass through a segment that all tasks remember, as it was when they solved it."""
        if self._solver.smooths() and not segment.is_layer and self._streams.comes_to(segment):
            self._find_places(segment)
        if self._is_quantized:
            self._solver.put_back_changes(segment)
            self._advance_twins(segment, last)
            self._solver.put_back(segment)
        if not last:
            self._streams.advance(segment)

    def _find_places(self, segment: Segment) -> None:
        """Find where the inputs of a segment can be scaled."""
        trial = self._streams.trial(segment) if self._streams.at(segment) else None
        self._solver.transforming.find(trial, self.crew)

    def _advance_twins(self, segment: Segment, last: bool) -> None:
        if self._twins is not None and not last:
            self._twins.advance(segment)

    def _wanted_segments(self) -> list[Segment]:
        head = self.skeleton.head
        wants_head = head is not None and any(head.linears[0] in task.schemes for task in self.tasks)
        return [*self._wanted_towers(), *self.skeleton.segments, *([head] if head is not None and wants_head else [])]

    def _wanted_towers(self) -> list[Segment]:
        """The blocks of models of images and sound of which a task quantizes some; all of a model, in their order."""
        towers = self.skeleton.towers
        asked = {name for task in self.tasks for name in task.schemes}
        wanted = {_list_of(each) for each in towers if not asked.isdisjoint(each.linears)}
        return [each for each in towers if _list_of(each) in wanted]

    def _is_left(self, segments: Sequence[Segment]) -> bool:
        """Whether some task still has something to solve."""
        embedding = self.skeleton.embedding
        places = [(segment.prefix, segment.linears) for segment in segments]
        places += [] if embedding is None else [(embedding.prefix, embedding.linears)]
        return any(task.lacks(prefix, layers) for task in self.tasks for prefix, layers in places)

    def _solve_embedding(self, live: bool) -> None:
        """Solve the input embedding for the tasks that want it.

        Args:
            live: the passes will read it, so that it is loaded and with quantized inputs gives way to the result.
        """
        segment = self.skeleton.embedding
        if segment is None or not any(segment.linears[0] in task.schemes for task in self.tasks):
            return
        if not live:
            self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
            self.skeleton.unload(segment)
        self._solver.solve_embedding(segment, replace=live and self._is_quantized)

    def _calibrate(self, segment: Segment, last: bool) -> None:
        """Solve a segment before which every pass stands, and bring them to the next."""
        if segment.is_layer:
            for name, layer in self._solver.wanted(segment).items():
                group = self._streams.group({name: layer})
                self.crew.deal([(group,)])
                if self._twins is not None and self._solver.corrects():
                    self._twins.prepare_layer(segment, group)
                statistics = self._streams.read_before(segment, group)
                self._solve(segment, [(group, statistics)])
            self._advance_twins(segment, last)
            if not last:
                self._streams.advance(segment)
            return
        found = self._streams.steps(segment, self._solver.wanted(segment))
        if self._solver.smooths():
            self._find_places(segment)
        if self._is_quantized:
            self._calibrate_quantized(segment, found, last)
        else:
            self._calibrate_float(segment, found)

    def _calibrate_float(self, segment: Segment, found: Sequence[Step]) -> None:
        """Gather everything in one run of the segment, then solve all groups.

        Experts whose statistics would not fit together are gathered and solved before, part by part, unless a transform
        is to see those of the whole segment.
        """
        self._observe_cache(segment)
        observing = self._solver.observing(segment)
        large = [step for step in found if not observing and not self._streams.fits(step, self.settings.device)]
        self._streams.deal(large, whole=False)
        for step in large:
            self._solve_experts(segment, step)
        rest = [step for step in found if step not in large]
        self._streams.deal(rest)
        groups, tunes = [group for step in rest for group in step.groups], bool(self._solver.tuning(segment))
        learns = any(task.learns for task in observing)
        places = self._streams.standing(segment) if tunes or learns else ()
        with self._streams.gathering(segment, groups, pausing=False), ExitStack() as seeing:
            outputs = seeing.enter_context(leaving(segment)) if tunes else {}
            self._streams.advance(segment)
        known = self._streams.results(rest, everywhere=bool(observing))
        for task in observing:
            self._solver.work(task, partial(self._solver.transforming.choose, task, segment, known, places))
        for step in rest:
            own = [group for group in step.groups if self.crew.owns(group)]
            self._solve_own(segment, [(group, known[group.name]) for group in own], step.experts)
        self._share(segment, groups)
        if tunes:
            self._tune(segment, places, outputs)

    def _calibrate_quantized(self, segment: Segment, found: Sequence[Step], last: bool) -> None:
        """Solve step by step, each from inputs that the steps before it have changed."""
        transforming, observing = self._solver.transforming, self._solver.observing(segment)
        if transforming.has_work(observing):
            self._choose(segment, observing[0], found)
            transforming.apply(observing[0], segment)
        self._streams.deal(found, whole=False)
        self._observe_cache(segment)
        tunes, corrects = bool(self._solver.tuning(segment)), self._solver.corrects()
        one_pass = self.settings.strategy == "one-pass" and not tunes and not any(step.experts for step in found)
        replay = None
        if self._twins is not None and corrects:
            groups = [step.group for step in found if not step.experts]
            self._twins.prepare(segment, groups)
            experts = [group for step in found if step.experts for group in step.groups]
            replay = self._twins.prepare_experts(segment, experts)
            if one_pass:
                self._twins.run(segment, groups)
        if one_pass:
            groups = [step.group for step in found]
            with self._streams.gathering(segment, groups, pausing=True):
                self._one_pass(segment, groups, last)
            return
        for step in found:
            if step.experts:
                self._solve_experts(segment, step, replay)
            else:
                see = partial(self._twins.see, segment, step.group) if self._twins is not None and corrects else None
                statistics = self._streams.gather_alone(segment, step.group, see)
                self._solve(segment, [(step.group, statistics)])
        if tunes and self._twins is not None:
            self._tune(segment, self._streams.standing(segment), self._twins.outputs(segment, last=last))
        else:
            self._advance_twins(segment, last)
        if not last:
            self._streams.advance(segment)

    def _choose(self, segment: Segment, task: VariantTask, found: Sequence[Step]) -> None:
        """Let a task's transforms choose what they do to a segment, by the statistics of all its inputs."""
        known = self._streams.observe(segment, found)
        places = self._streams.standing(segment) if task.learns else ()
        self._solver.work(task, partial(self._solver.transforming.choose, task, segment, known, places))

    def _observe_cache(self, segment: Segment) -> None:
        """Calibrate the scales of keys and values for the tasks that want them, from one run before layers are solved.

        So keys and values are those of float weights, as they are with what the transforms made of these.
        """
        tasks = [task for task in self._solver.at_work(segment) if task.cache is not None]
        if not tasks:
            return
        largest, paths = Largest(), {layer.path: layer.name for layer in segment.layers}
        for each in self._streams.at(segment):
            with largest.watching(segment.module, partial(_tokens_of, each.batch)):
                self._streams.try_alone(segment, each)
        for found in self.crew.gathered(largest.found):
            largest.add(found)
        for task in tasks:
            self._solver.work(task, partial(hand_over_scales, task, segment.prefix, paths, largest, segment.module))

    def _tune(self, segment: Segment, places: Sequence[tuple[Batch, AtSegment]], outputs: Outputs) -> None:
        """Tune a solved segment by what batches bring to it and what the float model makes of them."""
        examples = [Example(batch, place, outputs[id(batch)]) for batch, place in places if id(batch) in outputs]
        self._solver.tune(segment, examples, replace=self._is_quantized)

    def _solve_experts(self, segment: Segment, step: Step, replay: Replay | None = None) -> None:
        """Gather and solve the experts of a step, as many at a time as there is room for."""
        for groups, part in self._streams.gather_experts(segment, step, self.settings.device, replay):
            self._solve_own(segment, part, step.experts)
            self._share(segment, groups)

    def _one_pass(self, segment: Segment, groups: Sequence[Group], last: bool) -> None:
        """Solve the groups in their order, each when all passes stand at it or beyond."""
        self._streams.advance(segment)
        for index, group in enumerate(groups):
            self._solve(segment, [(group, group.result())])
            if last and index == len(groups) - 1:
                self._streams.stop()
            self._streams.advance_from(index)

    def _solve_uncalibrated(self, segment: Segment) -> None:
        """Solve a segment of which nothing is gathered, from its weights alone."""
        wanted = self._solver.wanted(segment)
        fused = dict.fromkeys(names for task in self.tasks for names in task.fused if set(names) <= set(wanted))
        alone = set(wanted) - {name for names in fused for name in names}
        named = [*fused, *((name,) for name in wanted if name in alone)]
        groups = [Group.of({name: wanted[name] for name in names}) for names in named]
        self.crew.deal([(group,) for group in groups])
        for group in groups:
            self._solve_own(segment, [(group, InputStatistics())] if self.crew.owns(group) else [])
        self._share(segment, groups)

    def _solve(self, segment: Segment, part: Solvable) -> None:
        """Solve groups, each by who owns it."""
        self._solve_own(segment, [(group, statistics) for group, statistics in part if self.crew.owns(group)])
        self._share(segment, [group for group, _ in part])

    def _solve_own(self, segment: Segment, part: Solvable, experts: str = "") -> None:
        """Solve groups that are owned here; of experts as many together as are best."""
        size = batch_of(part[0][0], self.settings.device) if experts and part else max(1, len(part))
        for start in range(0, len(part), size):
            batch = [(group.layers, statistics) for group, statistics in part[start : start + size]]
            self._keep(segment, [group for group, _ in part[start : start + size]])
            self._solver.solve(segment, batch, experts, replace=self._is_quantized)

    def _share(self, segment: Segment, groups: Sequence[Group]) -> None:
        """Have what is solved of groups at every process."""
        if not self.crew.is_alone:
            self._keep(segment, groups)
            layers = [layer for group in groups for layer in group.layers.values()]
            self._solver.share(segment, layers, replace=self._is_quantized)
        for group in groups:
            group.solved = True

    def _keep(self, segment: Segment, groups: Sequence[Group]) -> None:
        """Keep what twins need of layers that are about to be solved."""
        if self._twins is not None:
            self._twins.keep(segment, [layer for group in groups for layer in group.layers.values()])


def _tokens_of(batch: Batch, flat: torch.Tensor) -> torch.Tensor:
    return batch.tokens_of(flat)[0]


def _list_of(segment: Segment) -> str:
    """The name of the list that a block is in."""
    return segment.prefix.rpartition(".")[0]
