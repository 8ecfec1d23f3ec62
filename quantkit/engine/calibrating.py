"""What a walk does at a segment: gather the statistics of its inputs, solve its layers, bring all passes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.cache_rounding import Largest, hand_over_scales
from quantkit.engine.crew import Crew
from quantkit.engine.gathering import Gathering, Replay
from quantkit.engine.input_group import Group
from quantkit.engine.passes import AtSegment
from quantkit.engine.segment import Segment
from quantkit.engine.solver import Solver
from quantkit.engine.steps import Solvable, Step, batch_of
from quantkit.engine.tasks import VariantTask
from quantkit.engine.tuning import Example
from quantkit.engine.twins import Outputs, Twins, leaving
from quantkit.methods.base import InputStatistics


@dataclass(frozen=True, slots=True)
class Calibration:
    """The passes of a walk and what solves, at a segment that is loaded.

    Args:
        solver: the tasks.
        streams: the passes through the model as it is solved.
        twins: those through the float model beside them; None where nothing asks for these.
        quantized: inputs are quantized: what is solved is put into the places of the layers.
        one_pass: passes pause at each group, where activations of all batches fit into memory.
        device: of the walk.
        crew: the processes that walk together.
    """

    solver: Solver
    streams: Gathering
    twins: Twins | None
    quantized: bool
    one_pass: bool
    device: torch.device
    crew: Crew

    def calibrate(self, segment: Segment, last: bool) -> None:
        """Solve a segment before which every pass stands, and bring them to the next."""
        if segment.is_layer:
            for name, layer in self.solver.wanted(segment).items():
                group = self.streams.group({name: layer})
                self.crew.deal([(group,)])
                if self.twins is not None and self.solver.corrects():
                    self.twins.prepare_layer(segment, group)
                statistics = self.streams.read_before(segment, group)
                self._solve(segment, [(group, statistics)])
            self._advance_twins(segment, last)
            if not last:
                self.streams.advance(segment)
            return
        found = self.streams.steps(segment, self.solver.wanted(segment))
        if self.solver.smooths():
            self._find_places(segment)
        if self.quantized:
            self._calibrate_quantized(segment, found, last)
        else:
            self._calibrate_float(segment, found)

    def repeat(self, segment: Segment, last: bool) -> None:
        """Bring every pass through a segment that all tasks remember, as it was when they solved it."""
        if self.solver.smooths() and not segment.is_layer and self.streams.comes_to(segment):
            self._find_places(segment)
        if self.quantized:
            self.solver.put_back_changes(segment)
            self._advance_twins(segment, last)
            self.solver.put_back(segment)
        if not last:
            self.streams.advance(segment)

    def solve_uncalibrated(self, segment: Segment) -> None:
        """Solve a segment of which nothing is gathered, from its weights alone."""
        wanted = self.solver.wanted(segment)
        fused = dict.fromkeys(names for task in self.solver.tasks for names in task.fused if set(names) <= set(wanted))
        alone = set(wanted) - {name for names in fused for name in names}
        named = [*fused, *((name,) for name in wanted if name in alone)]
        groups = [Group.of({name: wanted[name] for name in names}) for names in named]
        self.crew.deal([(group,) for group in groups])
        for group in groups:
            self._solve_own(segment, [(group, InputStatistics())] if self.crew.owns(group) else [])
        self._share(segment, groups)

    def _find_places(self, segment: Segment) -> None:
        """Find where the inputs of a segment can be scaled."""
        trial = self.streams.trial(segment) if self.streams.at(segment) else None
        self.solver.transforming.find(trial, self.crew)

    def _advance_twins(self, segment: Segment, last: bool) -> None:
        if self.twins is not None and not last:
            self.twins.advance(segment)

    def _calibrate_float(self, segment: Segment, found: Sequence[Step]) -> None:
        """Gather everything in one run of the segment, then solve all groups.

        Experts whose statistics would not fit together are gathered and solved before, part by part, unless a transform
        is to see those of the whole segment.
        """
        self._observe_cache(segment)
        observing = self.solver.observing(segment)
        large = [step for step in found if not observing and not self.streams.fits(step, self.device)]
        self.streams.deal(large, whole=False)
        for step in large:
            self._solve_experts(segment, step)
        rest = [step for step in found if step not in large]
        self.streams.deal(rest)
        groups, tunes = [group for step in rest for group in step.groups], bool(self.solver.tuning(segment))
        learns = any(task.learns for task in observing)
        places = self.streams.standing(segment) if tunes or learns else ()
        with self.streams.gathering(segment, groups, pausing=False), ExitStack() as seeing:
            outputs = seeing.enter_context(leaving(segment)) if tunes else {}
            self.streams.advance(segment)
        known = self.streams.results(rest, everywhere=bool(observing))
        for task in observing:
            self.solver.work(task, partial(self.solver.transforming.choose, task, segment, known, places))
        for step in rest:
            own = [group for group in step.groups if self.crew.owns(group)]
            self._solve_own(segment, [(group, known[group.name]) for group in own], step.experts)
        self._share(segment, groups)
        if tunes:
            self._tune(segment, places, outputs)

    def _calibrate_quantized(self, segment: Segment, found: Sequence[Step], last: bool) -> None:
        """Solve step by step, each from inputs that the steps before it have changed."""
        transforming, observing = self.solver.transforming, self.solver.observing(segment)
        if transforming.has_work(observing):
            self._choose(segment, observing[0], found)
            transforming.apply(observing[0], segment)
        self.streams.deal(found, whole=False)
        self._observe_cache(segment)
        tunes, corrects = bool(self.solver.tuning(segment)), self.solver.corrects()
        one_pass = self.one_pass and not tunes and not any(step.experts for step in found)
        replay = None
        if self.twins is not None and corrects:
            groups = [step.group for step in found if not step.experts]
            self.twins.prepare(segment, groups)
            experts = [group for step in found if step.experts for group in step.groups]
            replay = self.twins.prepare_experts(segment, experts)
            if one_pass:
                self.twins.run(segment, groups)
        if one_pass:
            groups = [step.group for step in found]
            with self.streams.gathering(segment, groups, pausing=True):
                self._one_pass(segment, groups, last)
            return
        for step in found:
            if step.experts:
                self._solve_experts(segment, step, replay)
            else:
                see = partial(self.twins.see, segment, step.group) if self.twins is not None and corrects else None
                statistics = self.streams.gather_alone(segment, step.group, see)
                self._solve(segment, [(step.group, statistics)])
        if tunes and self.twins is not None:
            self._tune(segment, self.streams.standing(segment), self.twins.outputs(segment, last=last))
        else:
            self._advance_twins(segment, last)
        if not last:
            self.streams.advance(segment)

    def _choose(self, segment: Segment, task: VariantTask, found: Sequence[Step]) -> None:
        """Let a task's transforms choose what they do to a segment, by the statistics of all its inputs."""
        known = self.streams.observe(segment, found)
        places = self.streams.standing(segment) if task.learns else ()
        self.solver.work(task, partial(self.solver.transforming.choose, task, segment, known, places))

    def _observe_cache(self, segment: Segment) -> None:
        """Calibrate the scales of keys and values for the tasks that want them, from one run before layers are solved.

        So keys and values are those of float weights, as they are with what the transforms made of these.
        """
        tasks = [task for task in self.solver.at_work(segment) if task.cache is not None]
        if not tasks:
            return
        largest, paths = Largest(), {layer.path: layer.name for layer in segment.layers}
        for each in self.streams.at(segment):
            with largest.watching(segment.module, partial(_tokens_of, each.batch)):
                self.streams.try_alone(segment, each)
        for found in self.crew.gathered(largest.found):
            largest.add(found)
        for task in tasks:
            self.solver.work(task, partial(hand_over_scales, task, segment.prefix, paths, largest, segment.module))

    def _tune(self, segment: Segment, places: Sequence[tuple[Batch, AtSegment]], outputs: Outputs) -> None:
        """Tune a solved segment by what batches bring to it and what the float model makes of them."""
        examples = [Example(batch, place, outputs[id(batch)]) for batch, place in places if id(batch) in outputs]
        self.solver.tune(segment, examples, replace=self.quantized)

    def _solve_experts(self, segment: Segment, step: Step, replay: Replay | None = None) -> None:
        """Gather and solve the experts of a step, as many at a time as there is room for."""
        for groups, part in self.streams.gather_experts(segment, step, self.device, replay):
            self._solve_own(segment, part, step.experts)
            self._share(segment, groups)

    def _one_pass(self, segment: Segment, groups: Sequence[Group], last: bool) -> None:
        """Solve the groups in their order, each when all passes stand at it or beyond."""
        self.streams.advance(segment)
        for index, group in enumerate(groups):
            self._solve(segment, [(group, group.result())])
            if last and index == len(groups) - 1:
                self.streams.stop()
            self.streams.advance_from(index)

    def _solve(self, segment: Segment, part: Solvable) -> None:
        """Solve groups, each by who owns it."""
        self._solve_own(segment, [(group, statistics) for group, statistics in part if self.crew.owns(group)])
        self._share(segment, [group for group, _ in part])

    def _solve_own(self, segment: Segment, part: Solvable, experts: str = "") -> None:
        """Solve groups that are owned here; of experts as many together as are best."""
        size = batch_of(part[0][0], self.device) if experts and part else max(1, len(part))
        for start in range(0, len(part), size):
            batch = [(group.layers, statistics) for group, statistics in part[start : start + size]]
            self._keep(segment, [group for group, _ in part[start : start + size]])
            self.solver.solve(segment, batch, experts, replace=self.quantized)

    def _share(self, segment: Segment, groups: Sequence[Group]) -> None:
        """Have what is solved of groups at every process."""
        if not self.crew.is_alone:
            self._keep(segment, groups)
            layers = [layer for group in groups for layer in group.layers.values()]
            self.solver.share(segment, layers, replace=self.quantized)
        for group in groups:
            group.solved = True

    def _keep(self, segment: Segment, groups: Sequence[Group]) -> None:
        """Keep what twins need of layers that are about to be solved."""
        if self.twins is not None:
            self.twins.keep(segment, [layer for group in groups for layer in group.layers.values()])


def _tokens_of(batch: Batch, flat: torch.Tensor) -> torch.Tensor:
    return batch.tokens_of(flat)[0]
