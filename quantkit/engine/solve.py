"""Solving groups of layers for every task of a walk; a task that fails leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.input_rounding import Rounder, put_rounder
from quantkit.engine.layers import Layer
from quantkit.engine.ordering import quantize_in_order
from quantkit.engine.originals import Originals
from quantkit.engine.segment import Segment
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.tasks import LayerResult, Tuned, VariantTask
from quantkit.engine.transforming import Transforming
from quantkit.engine.tunable_floats import tunable_floats
from quantkit.engine.tuning import Example, Polish
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, Solution, Statistic
from quantkit.numerics.activation_rounding import searched_scale, static_scale
from quantkit.numerics.mismatch import corrected
from quantkit.numerics.refine import row_errors
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.rounding import INPUT_SCALE, InputRounding
from quantkit.system.devices import Moment
from quantkit.system.garbage import no_garbage_collection
from quantkit.transforms.base import Change

T = TypeVar("T")
STACKED = 1 << 24
"""Weights of several layers that a CPU solves as one at most: with more it gains nothing by that, and a method holds up
to eleven times as much."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent when the walk came to a segment.

    Attributes:
        own: by name the seconds of each task.
        since: that moment.
        device: of the walk.
    """

    own: Mapping[str, float]
    since: Moment
    device: torch.device

    def elapsed(self) -> float:
        """Seconds since then, in all."""
        return self.since.seconds_until(Moment.now(self.device))


@dataclass(slots=True)
class Solver:
    """The tasks of a walk.

    Args:
        tasks: all of them.
        originals: the parameters of the checkpoint.
        live, mixed: see :class:`quantkit.engine.transforming.Transforming`.
        tries_again: see :class:`quantkit.engine.walk.WalkSettings`.
        sensitivity: see there.

    Attributes:
        transforming: what the transforms of each task do at the segment at which the walk stands.
        failures: by name the tasks that failed and were dropped while others went on.
        tuned: by name what tuning made of the segment at which the walk stands, handed over when it is finished.
        crew: solves the groups that are not solved here.

    A task that remembers a segment from an earlier walk is alive there, and has nothing to do.
    """

    tasks: Sequence[VariantTask]
    originals: Originals
    live: bool
    tries_again: bool
    mixed: bool = False
    sensitivity: Sensitivity | None = None
    crew: Crew = ALONE
    transforming: Transforming = field(init=False)
    failures: dict[str, Exception] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)
    _solved: dict[str, dict[str, QuantizedWeight]] = field(init=False, default_factory=dict)
    _waiting: dict[str, dict[str, LayerResult]] = field(init=False, default_factory=dict)
    _seconds: dict[str, float] = field(init=False, default_factory=dict)
    _timed: list[tuple[str, Moment, Moment]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.transforming = Transforming(self.originals, self.live, self.mixed)

    def alive(self) -> list[VariantTask]:
        """The tasks that did not fail."""
        return [task for task in self.tasks if task.name not in self.failures]

    def at_work(self, segment: Segment) -> list[VariantTask]:
        """Those of them that still have layers of a segment to solve."""
        return [task for task in self.alive() if task.lacks(segment.prefix, segment.linears)]

    def observing(self, segment: Segment) -> list[VariantTask]:
        """Those of them that have transforms that are to see the statistics of a segment first."""
        return [task for task in self.at_work(segment) if task.observes]

    def smooths(self) -> bool:
        """Whether some transform asks where inputs can be scaled."""
        return any(task.smooths for task in self.alive())

    def needs(self) -> frozenset[Statistic]:
        """The statistics that some task asks for."""
        return frozenset[Statistic]().union(*(task.needs for task in self.tasks))

    def corrects(self) -> bool:
        """Whether some task corrects layers for what their inputs lost."""
        return any(task.method.corrects for task in self.tasks)

    def tunes(self) -> bool:
        """Whether some task tunes segments."""
        return any(task.tune is not None for task in self.tasks)

    def wanted(self, segment: Segment) -> dict[str, Layer]:
        """The layers of a segment that a task still has to quantize."""
        tasks = self.at_work(segment)
        return {layer.name: layer for layer in segment.layers if any(layer.name in t.schemes for t in tasks)}

    # Work and time

    def work(self, task: VariantTask, work: Callable[[], T]) -> T | None:
        """Do a task's own work and time it; one that fails is dropped, so that it does not take the others down.

        Any error counts, as methods are plugins; the last one standing raises its own.
        """
        started = Moment.now(self.originals.device)  # what the passes still have to do on a GPU is not this task's
        try:
            done = work()
        except Exception as error:  # methods and transforms are plugins, which may raise anything
            if self.tries_again and isinstance(error, torch.OutOfMemoryError):
                raise
            self.failures[task.name] = error
            if self.crew.is_alone and not self.alive():
                raise
            return None
        else:
            return done
        finally:
            self._timed.append((task.name, started, Moment.now(self.originals.device)))

    def seconds(self) -> dict[str, float]:
        """By name what each task's own work took so far; a GPU is waited for."""
        timed, self._timed = self._timed, []
        for name, start, stop in timed:
            self._seconds[name] = self._seconds.get(name, 0.0) + start.seconds_until(stop)
        return dict(self._seconds)

    def clock(self) -> Spent:
        """Starts to count what is spent on a segment."""
        return Spent(self.seconds(), Moment.now(self.originals.device), self.originals.device)

    # The course of a walk

    def begin(self) -> None:
        """Ask the transforms of every task what they do to the whole model."""
        for task in [task for task in self.alive() if task.transforms]:
            self.work(task, partial(self.transforming.begin, task))

    def enter(self, segment: Segment) -> None:
        """Put into a loaded segment what the tasks' transforms make of the whole model, where the passes see it."""
        for task in self.alive()[:1] if self.transforming.mixed else []:
            self.transforming.apply(task, segment)
            for layer in segment.layers:
                if task.rounding_of(layer.name) is not None:
                    put_rounder(layer.module, None)

    def finish(self, segment: Segment, spent: Spent) -> None:
        """Tell every task that solved a segment that all its layers were given.

        Args:
            segment: it.
            spent: since the walk came to it.
        """
        for task in [task for task in self.at_work(segment) if task.transforms]:
            self.work(task, partial(self.transforming.hand_over, task, segment))
        for task in [task for task in self.at_work(segment) if task.name in self.tuned]:
            self.work(task, partial(self._hand_over_tuned, task, segment))
        tasks = self.at_work(segment)
        taken = self.seconds()
        own = {task.name: taken.get(task.name, 0.0) - spent.own.get(task.name, 0.0) for task in tasks}
        shared = max(0.0, spent.elapsed() - sum(own.values()))
        for task in tasks:
            if task.memory is not None:
                task.memory.remember_seconds(own[task.name], shared)
            self.work(task, partial(task.sink.segment_done, segment.prefix))

    def put_back_changes(self, segment: Segment) -> None:
        """Put what its task's transforms made of a segment in an earlier walk, where inputs are quantized."""
        for task in self.alive():
            self.transforming.put_back(task, segment)

    def tuning(self, segment: Segment) -> list[VariantTask]:
        """The tasks that tune a segment, which they still have to solve."""
        return [task for task in self.at_work(segment) if task.tune is not None]

    def tune(self, segment: Segment, examples: Sequence[Example], *, replace: bool) -> None:
        """Tune a segment all of whose layers are solved, for each task that wants it.

        Args:
            segment: it is loaded.
            examples: what batches bring to it and should leave it with.
            replace: put the result in its place, as with quantized inputs.
        """
        for task in self.tuning(segment):
            done = self.work(task, partial(self._tune, task, segment, examples))
            if done is None:
                continue
            self.tuned[task.name] = done
            for layer in segment.layers if replace else ():
                if layer.name in done.weights:
                    layer.put(done.weights[layer.name].dequantize(torch.float32))
            for name, value in done.floats.items() if replace else ():
                parameter = self.originals.skeleton.model.get_parameter(name)
                parameter.data = value.to(parameter.dtype)

    def _tune(self, task: VariantTask, segment: Segment, examples: Sequence[Example]) -> Tuned | None:
        """What tuning makes of a segment of a task; None where it trains nothing of it."""
        solved, options = self._solved.pop(task.name, {}), task.tune
        if options is None or not solved:
            return None
        if len(examples) < 2:
            return Tuned(0.0, 0.0, 0, note="fewer than two batches of calibration rows came to it: it was not tuned")
        start = f"{segment.prefix}."
        places = {f"{layer.path.removeprefix(start)}.weight": layer.name for layer in segment.layers}
        weights = {place: solved[name] for place, name in places.items() if name in solved}
        changes = self.transforming.of(task)
        paths = {f"{layer.path.removeprefix(start)}.weight": layer.path for layer in segment.layers}
        origins = {
            place: changes.apply(paths[place], "weight", self.originals.weight(paths[place])) for place in weights
        }
        others: dict[str, torch.Tensor] = {}
        unseen = self.transforming.unseen(task)
        if unseen.parts:
            for name, value in segment.module.named_parameters():
                path, _, leaf = f"{start}{name}".rpartition(".")
                others |= {} if name in weights else {name: unseen.apply(path, leaf, value.data)}
        trained = tunable_floats(self.originals.skeleton, segment, options.train)
        floats = {name.removeprefix(start): each.data for name, each in trained.items()}
        floats |= {name: others.pop(name) for name in list(others) if name in floats}
        done = Polish(segment.module, weights, floats, options, examples, origins, others).run()
        if done is None:
            return None
        return replace(
            done,
            weights={places[place]: _with_scale_of(weights[place], weight) for place, weight in done.weights.items()},
            floats={f"{start}{name}": value for name, value in done.floats.items()},
        )

    def _hand_over_tuned(self, task: VariantTask, segment: Segment) -> None:
        """Give a task's sink what tuning made of a segment, in the place of what transforms made of its floats."""
        done, skeleton = self.tuned.pop(task.name), self.originals.skeleton
        task.sink.tuned(segment.prefix, done)
        for parameter, value in done.floats.items():
            dtype = self.originals.reader.dtype(skeleton.stored_name(parameter))
            task.sink.replace(*skeleton.names.as_written(parameter, value.to(dtype).cpu()))

    def put_back(self, segment: Segment) -> None:
        """Put what its task made of a segment in an earlier walk into it, where inputs are quantized."""
        for task in self.alive():
            if task.memory is None:
                continue
            for layer in segment.layers:
                if layer.name in task.schemes:
                    _put(task, layer, task.memory.weight(layer.name).to(self.originals.device))
            for name, value in task.memory.floats(segment.prefix).items():
                parameter = self.originals.skeleton.model.get_parameter(name)
                parameter.data = value.to(parameter.device, parameter.dtype)

    def solve(
        self,
        segment: Segment,
        groups: Sequence[tuple[Mapping[str, Layer], InputStatistics]],
        experts: str = "",
        *,
        replace: bool,
    ) -> None:
        """Solve groups of layers for every task that still has to.

        In a crew others solve others: what is solved waits for :meth:`share`.

        Args:
            segment: they are of.
            groups: layers that share an input, by their names, the one that is called first at the head, and the
                statistics of the input as they were gathered; several if they are alike, as those of experts are.
            experts: what the names of experts begin with; empty for layers that are no experts'.
            replace: put the result in their place, as with quantized inputs.
        """
        layers = {name: layer for members, _ in groups for name, layer in members.items()}
        originals = {name: self.originals.weight(layer.path) for name, layer in layers.items()}
        for task in self.at_work(segment):
            changes = self.transforming.of(task)
            given = []
            for members, found in groups:
                weights = {
                    name: changes.apply(layer.path, "weight", originals[name])
                    for name, layer in members.items()
                    if name in task.schemes
                }
                leader = next(iter(members.values())).path
                told = members.items() if self.sensitivity is not None and task.transforms else ()
                mixed = frozenset(name for name, layer in told if changes.mixes_outputs(layer.path))
                factors = {name: _factors(changes, layer) for name, layer in told if name not in mixed}
                known = self.transforming.statistics(task, leader, found)
                given.append(InputGroup(weights, known, experts, factors, mixed))
            with no_garbage_collection():  # a view of every column and no cycles: it would cost a tenth
                solved = self.work(task, partial(solve_groups, task, given, sensitivity=self.sensitivity)) or []
            if self.crew.is_alone:
                self._give(task, solved, layers, replace=replace)
            else:
                self._waiting.setdefault(task.name, {}).update({result.name: result for result in solved})
        for _, found in groups:
            found.derived.clear()  # factors of a wide layer are as large as its Gram matrix

    def share(self, segment: Segment, layers: Sequence[Layer], *, replace: bool) -> None:
        """Tell the crew what was solved here, and take what the others solved: all that is solved of some layers.

        Args:
            segment: they are of.
            layers: in the order in which one process would solve them.
            replace: put the results in their places.

        Raises:
            Exception: that of a task's failure, where no other task is left.
        """
        if self.crew.is_alone:
            return
        tasks = self.at_work(segment)
        waiting, self._waiting = self._waiting, {}
        told = self.crew.gathered(waiting)
        self.agree()
        by_name = {layer.name: layer for layer in layers}
        for task in [task for task in tasks if task.name not in self.failures]:
            found = {name: result for solved in told for name, result in solved.get(task.name, {}).items()}
            self._give(task, [found[name] for name in by_name if name in found], by_name, replace=replace)
        self.agree()

    def agree(self) -> None:
        """Have the crew drop the same tasks: those that failed anywhere.

        Raises:
            Exception: that of a failure, where no task is left.
        """
        if self.crew.is_alone:
            return
        for failures in self.crew.gathered(self.failures):
            for name, error in failures.items():
                self.failures.setdefault(name, error)
        if not self.alive():
            raise next(iter(self.failures.values()))

    def _give(
        self, task: VariantTask, solved: Sequence[LayerResult], layers: Mapping[str, Layer], *, replace: bool
    ) -> None:
        """Give a task's sink what was solved for it, and put that into the places of the layers."""

        def take() -> None:
            for result in solved:
                task.sink.take(result)

        self.work(task, take)
        for result in solved if task.name not in self.failures else ():
            if replace:
                _put(task, layers[result.name], result.weight)
            if task.tune is not None:
                self._solved.setdefault(task.name, {})[result.name] = result.weight

    def solve_embedding(self, segment: Segment, *, replace: bool) -> None:
        """Solve the input embedding, from its weight alone, for each task that wants it."""
        (layer,) = segment.layers
        original = self.originals.weight(layer.path)
        for task in [task for task in self.alive() if layer.name in task.schemes]:
            started = self.clock()
            weight = self.transforming.of(task).apply(layer.path, "weight", original)
            solved = self._solve_embedding(task, {layer.name: weight}, segment)
            if solved is not None and replace:
                layer.put(solved.dequantize(torch.float32))
            if solved is not None and task.lacks(segment.prefix, segment.linears):
                if task.memory is not None:
                    task.memory.remember_seconds(started.elapsed(), 0.0)
                self.work(task, partial(task.sink.segment_done, segment.prefix))

    def _solve_embedding(
        self, task: VariantTask, weights: Mapping[str, torch.Tensor], segment: Segment
    ) -> QuantizedWeight | None:
        """The quantized embedding of a task, from memory where an earlier walk solved it; None where it fails."""
        (name,) = segment.linears
        if task.memory is not None and task.memory.has(segment.prefix):
            return task.memory.weight(name).to(self.originals.device)
        solve: Callable[[], list[LayerResult]]
        solve = partial(solve_groups, task, [InputGroup(weights, InputStatistics())], embedding=True)
        with no_garbage_collection():
            solved = self.work(task, solve)
        if solved is None:
            return None
        self.work(task, partial(task.sink.take, solved[0]))
        return None if task.name in self.failures else solved[0].weight


def _put(task: VariantTask, layer: Layer, weight: QuantizedWeight) -> None:
    """Let the passes compute with a solved weight, and round the layer's inputs where its scheme does."""
    layer.put(weight.dequantize(torch.float32))
    rounding = task.rounding_of(layer.name)
    if rounding is not None:
        put_rounder(layer.module, Rounder(rounding, weight.parts.get(INPUT_SCALE)))


def _with_scale_of(solved: QuantizedWeight, tuned: QuantizedWeight) -> QuantizedWeight:
    """A tuned weight with the static scale of inputs that it had before."""
    kept = {name: part for name, part in solved.parts.items() if name == INPUT_SCALE}
    return replace(tuned, parts={**tuned.parts, **kept}) if kept else tuned


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Layers that share an input.

    Attributes:
        weights: float32 ``[out_features, in_features]`` of each, as the transforms left them.
        statistics: of the input, likewise.
        experts: what the names of the experts begin with whose layers they are; else empty.
        factors: by which transforms multiply each output of a layer, float32 ``[out_features]``; nothing for 1.
        mixed: layers whose outputs transforms mix: what the model's loss minds of each is then alike.
        input_scales: static ones, as far as they were asked for; they follow from the weights, too, so that they are
            not among what is derived of the statistics for all tasks.
    """

    weights: Mapping[str, torch.Tensor]
    statistics: InputStatistics
    experts: str = ""
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    input_scales: dict[InputRounding, torch.Tensor] = field(default_factory=dict)


def _factors(changes: Change, layer: Layer) -> torch.Tensor:
    """By which transforms multiply each output of a layer."""
    return changes.apply(layer.path, "bias", torch.ones(layer.shape[0], device=layer.weight.device))


def solve_groups(
    task: VariantTask,
    groups: Sequence[InputGroup],
    *,
    embedding: bool = False,
    sensitivity: Sensitivity | None = None,
) -> list[LayerResult]:
    """Solve the layers of groups that a task wants; those of one group and scheme are stacked and solved as one.

    Where a scheme does not stack, each layer is solved by itself. The method sees the statistics that it asks for and
    no others, whatever was gathered for other variants. What is alike in several groups is handed to it at once.

    Args:
        task: the variant.
        groups: several if they are alike.
        embedding: the group is the input embedding, which no calibration token is expected to reach.
        sensitivity: predicts what errors cost.

    Raises:
        QuantizationError: naming the layer.
    """
    method = task.method.for_embeddings() if embedding else task.method
    is_calibrated = bool(task.needs) and not embedding
    alike: dict[tuple[Scheme, torch.Size], list[_Stack]] = {}
    for group in groups:
        asked = group.statistics.only(method.needs)
        for names, scheme in _stacks(task, group.weights):
            stack = _corrected(_Stack(names, _stacked(group, names), asked, group), method)
            alike.setdefault((scheme, stack.weight.shape), []).append(stack)
        group.statistics.mismatch = None  # with the tokens that were held out it may be as large as a Gram matrix
    solved: list[LayerResult] = []
    for (scheme, _), stacks in alike.items():
        for stack, solution in zip(stacks, _solved(task, method, stacks, scheme), strict=True):
            start = 0
            for name in stack.names:
                stop = start + stack.group.weights[name].shape[0]
                result = _layer(name, solution, start, stop, stack, is_calibrated)
                if sensitivity is not None:
                    result = _judged(result, solution.error[start:stop], stack, sensitivity)
                solved.append(result)
                start = stop
    return solved


@dataclass(frozen=True, slots=True)
class _Stack:
    """Layers of a group that are solved as one matrix, with the statistics that the method asks for.

    ``shares`` has of each that was corrected for what its input lost, by how much; see
    :mod:`quantkit.numerics.mismatch`.
    """

    names: Sequence[str]
    weight: torch.Tensor
    statistics: InputStatistics
    group: InputGroup
    shares: Mapping[str, float] = field(default_factory=dict)


def _stacked(group: InputGroup, names: Sequence[str]) -> torch.Tensor:
    weights = [group.weights[name] for name in names]
    return torch.cat(weights) if len(names) > 1 else weights[0]


def _corrected(stack: _Stack, method: Method) -> _Stack:
    """The stack as it makes up for what its input lost, where that is known and the method asks for it."""
    found = stack.group.statistics
    if not method.corrects or found.mismatch is None or found.gram is None:
        return stack
    sizes = [len(stack.group.weights[name]) for name in stack.names]
    # beside its own tokens an expert has others' in its Gram matrix, for which it has nothing to make up
    gram = found.gram if found.own == 1 else found.gram / found.own
    weight, shares = corrected(stack.weight, sizes, gram, found.mismatch)
    return replace(stack, weight=weight, shares=dict(zip(stack.names, shares, strict=True)))


def _solved(task: VariantTask, method: Method, stacks: Sequence[_Stack], scheme: Scheme) -> list[Solution]:
    """The solutions of stacks that are alike; where one cannot be solved they are solved one by one, to name it."""
    dtype = task.scale_dtype
    together = _fits(stacks[0].weight, sum(each.weight.numel() for each in stacks))
    if len(stacks) > 1 and not scheme.orders_columns and together:
        with suppress(QuantizationError):
            return method.quantize_alike([(each.weight, each.statistics) for each in stacks], scheme, dtype)
    solve = quantize_in_order(method) if scheme.orders_columns else method.quantize
    return [_named(task, each, partial(solve, each.weight, each.statistics, scheme, dtype)) for each in stacks]


def _named(task: VariantTask, stack: _Stack, solve: Callable[[], Solution]) -> Solution:
    """A solution; its error names the layer."""
    try:
        return solve()
    except QuantizationError as error:
        raise QuantizationError(f"{task.name}: {stack.names[0]}: {error.problem}", error.remedy) from error


def _stacks(task: VariantTask, weights: Mapping[str, torch.Tensor]) -> list[tuple[list[str], Scheme]]:
    """The layers that a task wants, those that can be solved as one together, as long as they are not too large."""
    stacks: dict[Scheme, list[list[str]]] = {}
    alone = []
    for name, weight in weights.items():
        scheme = task.schemes.get(name)
        if scheme is not None and scheme.stacks:
            parts = stacks.setdefault(scheme, [[]])
            if parts[-1] and not _fits(weight, sum(weights[each].numel() for each in [*parts[-1], name])):
                parts.append([])
            parts[-1].append(name)
        elif scheme is not None:
            alone.append(([name], scheme))
    return [*((members, scheme) for scheme, parts in stacks.items() for members in parts), *alone]


def _fits(weight: torch.Tensor, together: int) -> bool:
    """Whether so many weights are solved as one, on the device of one of them."""
    return weight.device.type != "cpu" or together <= STACKED


def _layer(name: str, solution: Solution, start: int, stop: int, stack: _Stack, is_calibrated: bool) -> LayerResult:
    """The part of a solution that is a layer's."""
    group = stack.group
    energy = solution.energy[start:stop].sum().clamp_(min=torch.finfo(torch.float32).tiny)
    error = solution.error[start:stop].sum() / energy
    before = error if solution.error_before is None else solution.error_before[start:stop].sum() / energy
    notes = solution.notes
    if is_calibrated and group.statistics.is_empty():
        notes = (*notes, "no calibration token reached this layer: its inputs were taken as uncorrelated")
    tokens = group.statistics.tokens if is_calibrated else 0
    weight = with_input_scale(solution.weight.rows(start, stop), group, name)
    experts = group.experts if is_calibrated else ""
    return LayerResult(name, weight, error, before, tokens, notes, experts, stack.shares.get(name))


def with_input_scale(weight: QuantizedWeight, group: InputGroup, name: str) -> QuantizedWeight:
    """A weight with the static scale of its layer's inputs, where its scheme has one.

    Layers that share an input get the same, as servers need it of those that they load as one matrix.

    Raises:
        QuantizationError: nothing is known of the inputs.
    """
    rounding, known = weight.scheme.input_rounding, group.statistics
    if rounding is None or not rounding.static:
        return weight
    if known.abs_max is None:
        raise QuantizationError(
            f"{name}: no calibration token reached it, so that the static scale of its inputs is not known",
            "give more or other calibration records, keep the layer float with 'ignore', or round inputs as they come: "
            "activations: dynamic",
        )
    if rounding not in group.input_scales:
        largest, scale = known.abs_max.amax(), None
        if rounding.numbers == "int8" and known.sample is not None:
            scale = searched_scale(largest, known.sample, list(group.weights.values()), rounding)
        group.input_scales[rounding] = static_scale(largest, rounding) if scale is None else scale
    return replace(weight, parts={**weight.parts, INPUT_SCALE: group.input_scales[rounding]})


def _judged(result: LayerResult, errors: torch.Tensor, stack: _Stack, sensitivity: Sensitivity) -> LayerResult:
    """A result with what is known of the model's loss; of errors only where they are those of its own outputs.

    Where batches are held out, errors are those of the layer as it is stored on their tokens, each of which counts as
    much as the model minds errors there.
    """
    group, name = stack.group, result.name
    known = group.statistics
    if known.held_out:
        gram = known.held_out[name].gram
        missing = group.weights[name] - result.weight.dequantize(torch.float32)
        told = None if gram is None else row_errors(missing.T, gram)
        effective = None
    elif stack.statistics.is_empty():
        return result
    else:
        told = None if stack.statistics.gram is None else errors
        effective = None if known.evenness == 1 else known.effective_tokens
    if told is not None and name in group.factors:
        told = told / group.factors[name].square()
    if told is not None and name in group.mixed:
        told = told.mean().expand_as(told)
    nats = None if told is None else sensitivity.nats(name, told)
    return replace(result, nats=nats, effective_tokens=effective)
