"""Gathering: the forward passes of all batches as they stand in a segment, and the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.experts import showing_all
from quantkit.engine.groups import Enough, PreHook, call_order, hooked, shared_inputs
from quantkit.engine.layers import Layer
from quantkit.engine.mismatch import Lost, MismatchGatherer, stream_hooks, take_streams
from quantkit.engine.parking import Parking
from quantkit.engine.passes import AtEnd, AtGroup, AtSegment, Pass, pause, running_pass, states, told
from quantkit.engine.routing import (
    ROUTED,
    ExpertSettings,
    Kind,
    Routes,
    alike,
    common_name,
    completed,
    routed_kinds,
    steps,
)
from quantkit.engine.segment import Segment
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.smoothing import Trial
from quantkit.engine.statistics import Gatherer, Pool, Sums
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Statistic

BATCH_WEIGHTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Weights of like groups that are solved together: enough to keep a GPU busy, no more than a CPU's caches hold."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a batch adds to a group, for the process that owns it.

    Attributes:
        gathered: to its statistics.
        judged: to those of what is held out, by layer.
        lost: to what its input lost.
    """

    gathered: Sums | None = None
    judged: Mapping[str, Sums] = field(default_factory=dict)
    lost: Lost | None = None


@dataclass(slots=True)
class Group:
    """Layers of a segment that share an input, the one that is called first at the head.

    Attributes:
        layers: by their names.
        gatherer: of the statistics of the input.
        solved: whether they are.
        mismatch: gathers what the input lost, where that is wanted.
        judges: gather that of the batches that are held out, where there are some, by the layers whose errors it
            tells.
        is_dealt: what batches add is kept for the process that owns the group, see :meth:`take_parts`.
    """

    layers: dict[str, Layer]
    gatherer: Gatherer
    solved: bool = False
    mismatch: MismatchGatherer | None = None
    judges: Mapping[str, Gatherer] = field(default_factory=dict)
    is_dealt: bool = False
    _parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, layers: dict[str, Layer]) -> Group:
        """Layers of which nothing is gathered."""
        return cls(layers, Gatherer(frozenset()))

    @property
    def name(self) -> str:
        """Of the layer that is called first."""
        return next(iter(self.layers))

    @property
    def leader(self) -> nn.Module:
        """The module of the layer that is called first."""
        return next(iter(self.layers.values())).module

    def add(self, inputs: torch.Tensor, batch: Batch, *, alone: bool = False) -> None:
        """Take in the inputs of one batch; see :meth:`Gatherer.add`.

        Args:
            inputs: ``[..., in_features]``.
            batch: whose they are.
            alone: for its statistics alone, and not for what its inputs lost.
        """
        if self.is_dealt:
            self._parts.append(Part(self.gatherer.of_batch(inputs, batch)) if alone else self._part(inputs, batch))
            return
        if alone:
            self.gatherer.add(inputs, batch)
            return
        if batch.held_out:
            for judge in self.judges.values():
                judge.add(inputs, batch)
            return
        self.gatherer.add(inputs, batch)
        if self.mismatch is not None:
            self.mismatch.add(inputs, batch)

    def _part(self, inputs: torch.Tensor, batch: Batch) -> Part:
        if batch.held_out:
            return Part(judged={name: judge.of_batch(inputs, batch) for name, judge in self.judges.items()})
        gathered = self.gatherer.of_batch(inputs, batch)
        return Part(gathered, lost=None if self.mismatch is None else self.mismatch.of_batch(inputs, batch))

    def take_parts(self) -> list[Part]:
        """What batches added since this was last asked."""
        parts, self._parts = self._parts, []
        return parts

    def absorb(self, part: Part) -> None:
        """Add what a batch adds, to the statistics that are kept here."""
        if part.gathered is not None:
            self.gatherer.absorb(part.gathered)
        for name, sums in part.judged.items():
            self.judges[name].absorb(sums)
        if part.lost is not None and self.mismatch is not None:
            self.mismatch.absorb(part.lost)

    def result(self) -> InputStatistics:
        """What was gathered, with what the inputs lost where that was, too; see :meth:`Gatherer.result`."""
        found = self.judged(self.gatherer.result())
        if self.mismatch is not None and found.gram is not None:
            found.mismatch = self.mismatch.result()
        return found

    def judged(self, found: InputStatistics) -> InputStatistics:
        """Statistics with those of the batches that are held out."""
        if not self.judges:
            return found
        return replace(found, held_out={name: judge.result() for name, judge in self.judges.items()})

    def weights(self) -> int:
        """Number of weights of its layers."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    def columns(self) -> int:
        """Width of the input."""
        return next(iter(self.layers.values())).shape[1]

    def numbers(self) -> int:
        """How many numbers its statistics are, of an expert: a Gram matrix, and what its input lost."""
        columns, rows = self.columns(), sum(layer.shape[0] for layer in self.layers.values())
        return (1 + len(self.judges)) * columns**2 + (0 if self.mismatch is None else self.mismatch.size(rows, columns))


@dataclass(frozen=True, slots=True)
class Step:
    """What is solved at a time: a group, or of the experts of a layer all groups of one kind, by their numbers.

    Attributes:
        groups: of a segment.
        experts: what the names of experts begin with; empty for a group that is no expert's.
    """

    groups: tuple[Group, ...]
    experts: str = ""

    @property
    def group(self) -> Group:
        """The only one."""
        (group,) = self.groups
        return group

    def parts(self, room: int | None, device: torch.device) -> list[tuple[Group, ...]]:
        """The groups, as many at a time as have their statistics in ``room`` bytes; all at once for None.

        What is solved together is not parted.
        """
        batch = batch_of(self.groups[0], device)
        fitting = len(self.groups) if room is None else room // (4 * self.groups[0].numbers())
        size = max(batch, fitting // batch * batch)
        return [self.groups[start : start + size] for start in range(0, len(self.groups), size)]


def batch_of(group: Group, device: torch.device) -> int:
    """How many groups of experts like this one are solved together."""
    return max(1, BATCH_WEIGHTS[device.type] // max(group.weights(), group.columns() ** 2))


Solvable = list[tuple[Group, InputStatistics]]
"""Groups that can be solved together."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The float passes beside which experts are gathered, with the same tokens for each expert.

    Attributes:
        routes: the way that the float model sends batches.
        see: runs the float pass of a batch, if it has one, for groups of experts to compare theirs with; without groups
            only as long as its way is not known.
    """

    routes: Routes
    see: Callable[[Sequence[Group], Batch], None]


@dataclass(slots=True)
class Streams:
    """One pass a batch, which all move together.

    Args:
        model: what they run.
        batches: the calibration tokens.
        needs: what is gathered of inputs.
        parking: where passes that stand before a segment leave their activations meanwhile; None where they are.
        experts: how experts are calibrated.
        room: bytes that statistics of experts may take at a time; None for no limit.
        sensitivity: says how much tokens count in the statistics of each layer; None if all alike.
        crew: has the batches that are not run here.
    """

    model: nn.Module
    batches: Sequence[Batch]
    needs: frozenset[Statistic]
    parking: Parking | None = None
    experts: ExpertSettings = ROUTED
    room: int | None = None
    sensitivity: Sensitivity | None = None
    crew: Crew = ALONE
    _passes: list[Pass] = field(default_factory=list)
    _gathering: Sequence[Group] = ()
    _states: set[tuple[nn.Module, str]] = field(default_factory=set)
    _index: dict[str, int] = field(default_factory=dict)

    def start(self, segments: Sequence[Segment], cleanup: ExitStack) -> None:
        """Run every pass up to its first segment.

        Args:
            segments: at which passes pause, see :func:`pause_at`.
            cleanup: ends the passes.

        Raises:
            QuantizationError: the model's code fails on the batches.
        """
        cleanup.callback(self.stop)
        self._index = {segment.prefix: index for index, segment in enumerate(segments)}
        self._passes = [Pass(self.model, batch) for batch in self.crew.mine(self.batches)]
        for each in self._passes:
            with told(self.model):
                self._resume(each)

    def at(self, segment: Segment) -> list[Pass]:
        """The passes that stand before a segment.

        Raises:
            QuantizationError: some stand before one that the walk has left, as where a model runs a part of it twice.
        """
        index = self._index[segment.prefix]
        behind = [each.place.index for each in self._passes if isinstance(each.place, AtSegment)]
        if behind and min(behind) < index:
            back = next(prefix for prefix, place in self._index.items() if place == min(behind))
            raise QuantizationError(
                f"{type(self.model).__name__} comes to {back} after blocks that are behind it",
                "leave the layers of that part out of overrides",
            )
        return [each for each in self._passes if isinstance(each.place, AtSegment) and each.place.index == index]

    def comes_to(self, segment: Segment) -> bool:
        """Whether some batch stands before a segment, here or elsewhere."""
        return any(self.crew.gathered(bool(self.at(segment))))

    def _in_turn(self, passes: Sequence[Pass], groups: Sequence[Group] = ()) -> Iterator[Pass]:
        """Some passes, in the turns of their batches; behind each turn what it added to groups goes to the owners."""
        if self.crew.is_alone:
            yield from passes
            return
        places = {id(batch): index for index, batch in enumerate(self.batches)}
        due = {self.crew.turn_of(places[id(each.batch)]): each for each in passes}
        for turn in range(self.crew.turns(len(self.batches))):
            if turn in due:
                yield due[turn]
            self.crew.hand_over(groups, turn)

    def standing(self, segment: Segment) -> list[tuple[Batch, AtSegment]]:
        """The batches that stand before a segment, and with what they would call it."""
        return [(each.batch, standing(each, segment)) for each in self.at(segment)]

    def stop(self) -> None:
        """End every pass where it stands."""
        for each in self._passes:
            each.stop()

    def advance(self, segment: Segment) -> None:
        """Run the passes that stand before a segment to where they pause next."""
        for each in self._in_turn(self.at(segment), self._gathering):
            self._resume(each)

    def _resume(self, each: Pass) -> None:
        self._fetch(each)
        each.resume(self._states)
        self._park(each)

    def _fetch(self, each: Pass) -> None:
        """Bring back what a pass left elsewhere."""
        if self.parking is not None:
            self.parking.fetch(each, each.batch.token_ids.device)

    def _park(self, each: Pass) -> None:
        """Leave the activations of a pass elsewhere, if it stands before a segment."""
        if self.parking is not None:
            self.parking.park(each)

    def advance_from(self, index: int) -> None:
        """Run the passes that stand at a group to where they pause next."""
        standing_there = [each for each in self._passes if each.place == AtGroup(index)]
        for each in self._in_turn(standing_there, self._gathering):
            each.resume(self._states)
            self._park(each)

    def steps(self, segment: Segment, wanted: dict[str, Layer]) -> list[Step]:
        """The groups of a segment in the order in which they are solved.

        Found by trying batches until all layers were seen. Of experts a batch need not call each.
        """
        numbered = alike(wanted.values())
        routed: set[Kind] = set()

        def shown(each: Pass) -> list[list[str]]:
            positions: dict[str, int] = {}
            found = shared_inputs(wanted, partial(self.try_alone, segment, each), positions)
            routed.update(routed_kinds(numbered, found, positions, each.batch.token_ids.numel()))
            return completed(found, numbered, routed)

        smallest_first = sorted(self.at(segment), key=lambda each: each.batch.token_ids.numel())
        with states(segment.module) as self._states:
            order = call_order(list(wanted), map(shown, smallest_first)) if wanted and smallest_first else []
        told = self.crew.agreed((order, routed) if smallest_first else None)
        order, routed = told if told is not None else (order, routed)
        found = []
        for members in steps(order, numbered, routed):
            groups = tuple(self.group({name: wanted[name] for name in names}) for names in members)
            is_routed = any(each in numbered and numbered[each].kind in routed for each in groups[0].layers)
            found.append(Step(groups, common_name([group.name for group in groups]) if is_routed else ""))
        return found

    def group(self, layers: dict[str, Layer]) -> Group:
        """Layers that share an input, of which nothing is gathered yet."""
        weights = None if self.sensitivity is None else self.sensitivity.weights(layers)
        group, gram = Group(layers, Gatherer(self.needs, next(iter(layers)), weights)), frozenset({Statistic.GRAM})
        if any(each.held_out for each in self.batches):
            moments_of = {name: None if self.sensitivity is None else self.sensitivity.moments(name) for name in layers}
            group.judges = {name: Gatherer(gram, name, moments) for name, moments in moments_of.items()}
        group.is_dealt = not self.crew.is_alone
        return group

    def trial(self, segment: Segment) -> Trial:
        """A segment to be run with the smallest batch."""
        smallest = min(self.at(segment), key=lambda each: each.batch.token_ids.numel())
        inputs = shared_inputs(
            {layer.path: layer for layer in segment.layers}, partial(self.try_alone, segment, smallest)
        )
        self._fetch(smallest)
        place, prefix = standing(smallest, segment), f"{segment.prefix}."
        return Trial(
            segment.module,
            [[name.removeprefix(prefix) for name in names] for names in inputs],
            lambda: segment.module(*place.args, **place.kwargs),
            [each for each in (*place.args, *place.kwargs.values()) if isinstance(each, torch.Tensor)],
            segment.shared,
        )

    def observe(self, segment: Segment, found: Sequence[Step]) -> dict[str, InputStatistics]:
        """The statistics of all inputs of a segment as it is, from one more run of it."""
        seen = [Step(tuple(self.group(group.layers) for group in step.groups), step.experts) for step in found]
        self.deal(seen)
        self._gather(segment, [group for step in seen for group in step.groups])
        return self.results(seen, everywhere=True)

    def deal(self, found: Sequence[Step], *, whole: bool = True) -> None:
        """Say which process owns which groups: of experts each a part of their row, of the others as they weigh.

        Args:
            found: the steps.
            whole: the statistics of all experts of a step are there at once, see :meth:`Step.parts`.
        """
        if self.crew.is_alone:
            return
        self.crew.deal([(group,) for step in found if not step.experts for group in step.groups])
        device = self.batches[0].token_ids.device
        for step in found:
            for part in (step.parts(None if whole else self.room, device)) if step.experts else ():
                size = batch_of(part[0], device)
                self.crew.deal_row([part[start : start + size] for start in range(0, len(part), size)])

    def _gather(
        self, segment: Segment, groups: Sequence[Group], replay: Replay | None = None, *, compares: bool = False
    ) -> None:
        """Run a segment, one batch at a time, and add to the statistics of groups; the passes stay where they are.

        Args:
            segment: before which they stand.
            groups: of it.
            replay: the float passes whose way each batch is sent.
            compares: add what the inputs lost to these, too, and what is held out.
        """
        for each in self._in_turn(self.at(segment), groups):
            if each.batch.held_out and not compares:
                continue
            if replay is not None:
                replay.see(groups if compares else (), each.batch)

            def gather(_: nn.Module, args: tuple[Any, ...], group: Group, each: Pass = each) -> None:
                group.add(args[0], each.batch, alone=not compares)

            hooks = [(group.leader, partial(gather, group=group)) for group in groups]
            way = nullcontext() if replay is None else replay.routes.replaying(each.batch)
            with hooked(hooks), self._showing(segment), way:
                self.try_alone(segment, each)

    def results(self, found: Sequence[Step], *, everywhere: bool = False) -> dict[str, InputStatistics]:
        """The finished statistics of each step by the names of its layers; those of the groups that are owned here.

        Args:
            found: the steps.
            everywhere: those of all groups, at each process.
        """
        known: dict[str, InputStatistics] = {}
        for step in found:
            for group, statistics in self._finished(step, step.groups, None):
                known |= dict.fromkeys(group.layers, statistics)
        if not everywhere or self.crew.is_alone:
            return known
        return {name: each for part in self.crew.gathered(known) for name, each in part.items()}

    def gather_experts(
        self, segment: Segment, step: Step, device: torch.device, replay: Replay | None = None
    ) -> Iterator[tuple[Sequence[Group], Solvable]]:
        """Gather the statistics of experts by runs of the segment by itself, as many at a time as there is room for.

        Where they come in parts each is gathered twice, first for what all have in common.

        Args:
            segment: before which the passes stand.
            step: the experts.
            device: of the walk.
            replay: the float passes with which they are compared.

        Yields:
            The groups, and those that are owned here with their statistics.
        """
        parts, pool = step.parts(self.room, device), None
        if len(parts) > 1 and self.experts.prior:
            pool = Pool()
            for part in parts:
                self._gather(segment, part, replay)
                pool = self._pooled(pool, part)
                for group in part:
                    group.gatherer.forget()
        for part in parts:
            self._gather(segment, part, replay, compares=True)
            yield part, self._finished(step, part, pool)

    def fits(self, step: Step, device: torch.device) -> bool:
        """Whether there is room for the statistics of all its groups at once."""
        return not step.experts or len(step.parts(self.room, device)) == 1

    def _finished(self, step: Step, groups: Sequence[Group], pool: Pool | None) -> Solvable:
        """The groups that are owned here with what was gathered of them; an expert's own together with that of all."""
        own = [group for group in groups if self.crew.owns(group)]
        if not step.experts:
            return [(group, group.result()) for group in own]
        self._check_shown(own)
        if pool is None:
            pool = Pool()
            if self.experts.prior:
                pool = self._pooled(pool, groups)
        found = [(group, group.judged(pool.blended(group.gatherer, self.experts.prior))) for group in own]
        for group, statistics in found:
            if group.mismatch is not None and group.gatherer.seen and statistics.gram is not None:
                statistics.mismatch = group.mismatch.result()
        return found

    def _pooled(self, pool: Pool, groups: Sequence[Group]) -> Pool:
        """A pool with the statistics of further experts, in their order."""

        def add(found: Pool) -> Pool:
            for group in groups:
                if self.crew.owns(group):
                    found.add(group.gatherer)
            return found

        return self.crew.in_turn(pool, add)

    def _check_shown(self, groups: Sequence[Group]) -> None:
        """Refuse to show experts all tokens where it is the model's own code that computes with them."""
        wanted = sum(batch.tokens for batch in self.batches if not batch.held_out)
        for group in groups if self.experts.tokens == "all" else ():
            if group.gatherer.seen != wanted:
                raise QuantizationError(
                    f"{group.name} is computed by the model's own code, which sends it {group.gatherer.seen} of "
                    f"{wanted} calibration tokens",
                    "set calibration.experts: routed",
                )

    @contextmanager
    def _showing(self, segment: Segment) -> Iterator[None]:
        """Inside the block, experts are shown all tokens if that is asked for."""
        if self.experts.tokens == "routed":
            yield
            return
        with showing_all(segment.module):
            yield

    def read_before(self, segment: Segment, group: Group) -> InputStatistics:
        """The statistics of what the passes stand before a segment with, for one that is a single layer."""
        for each in self._in_turn(self.at(segment), [group]):
            with self.fetched(each):
                group.add(standing(each, segment).args[0], each.batch)
        return group.result()

    def gather_alone(
        self, segment: Segment, group: Group, before: Callable[[Batch], None] | None = None
    ) -> InputStatistics:
        """Run a segment up to a group, one batch at a time; the passes stay where they are.

        Args:
            segment: before which they stand.
            group: of it.
            before: called with each batch before it runs.
        """
        for each in self._in_turn(self.at(segment), [group]):
            if before is not None:
                before(each.batch)

            def gather(_: nn.Module, args: tuple[Any, ...], each: Pass = each) -> None:
                group.add(args[0], each.batch)
                raise Enough

            take = partial(MismatchGatherer.now_stream, batch=each.batch)
            with self.fetched(each), hooked([(group.leader, gather), *stream_hooks([group.mismatch], take)]):
                take_streams([group.mismatch], standing(each, segment), take)
                self.try_alone(segment, each)
        return group.result()

    @contextmanager
    def gathering(self, segment: Segment, groups: Sequence[Group], pausing: bool) -> Iterator[None]:
        """Inside the block, passes that come to a group add to its statistics, and pause there on request."""

        def gather(index: int, group: Group) -> PreHook:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                current = running_pass()
                if not group.solved and not current.is_back:
                    group.add(args[0], current.batch)
                    if pausing:
                        pause(AtGroup(index))

            return hook

        mismatches = [group.mismatch for group in groups]
        for each in self.at(segment):
            take_streams(mismatches, standing(each, segment), partial(MismatchGatherer.now_stream, batch=each.batch))
        hooks = [(group.leader, gather(index, group)) for index, group in enumerate(groups)]
        hooks += stream_hooks(mismatches, lambda each, stream: each.now_stream(stream, running_pass().batch))
        self._gathering = groups
        with hooked(hooks), self._showing(segment):
            yield
        self._gathering = ()

    def try_alone(self, segment: Segment, each: Pass) -> None:
        """Run a segment with the arguments of a pass that stands before it, which stays where it is."""
        place = standing(each, segment)
        with self.fetched(each), suppress(Enough):
            segment.module(*place.args, **place.kwargs)

    @contextmanager
    def fetched(self, each: Pass) -> Iterator[None]:
        """Inside the block, what a pass that stands before a segment would give it is on the device of the walk."""
        self._fetch(each)
        yield
        self._park(each)


def standing(each: Pass, segment: Segment) -> AtSegment:
    """Where a pass stands, with the arguments that it would call the segment with."""
    if not isinstance(each.place, AtSegment):
        raise RuntimeError(f"a pass stands at {each.place}, not before {segment.prefix}")
    return each.place


def pause_at(segments: Sequence[Segment], head: nn.Module | None, cleanup: ExitStack) -> None:
    """Let every pass pause before each segment and behind the last.

    Args:
        segments: in their order; a pass may leave some out, as text leaves out layers that look at images.
        head: what no pass goes through, unless it is a segment.
        cleanup: lets them no longer.
    """
    for index, segment in enumerate(segments):
        hook = segment.module.register_forward_pre_hook(_pause_before(index), with_kwargs=True)
        cleanup.callback(hook.remove)
    cleanup.callback(segments[-1].module.register_forward_hook(lambda *_: pause(AtEnd())).remove)
    if head is not None and all(head is not segment.module for segment in segments):
        cleanup.callback(head.register_forward_pre_hook(lambda *_: pause(AtEnd())).remove)


def _pause_before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pause(AtSegment(index, args, kwargs))

    return hook
