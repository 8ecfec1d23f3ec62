"""Gathering: the statistics of a segment's inputs, as the forward passes of all batches go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.experts import showing_all
from quantkit.engine.groups import Enough, PreHook, call_order, hooked, shared_inputs
from quantkit.engine.input_group import Group
from quantkit.engine.layers import Layer
from quantkit.engine.mismatch import MismatchGatherer, stream_hooks, take_streams
from quantkit.engine.passes import AtGroup, Pass, pause, running_pass, states
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
from quantkit.engine.statistics import Gatherer, Pool
from quantkit.engine.steps import Solvable, Step, batch_of
from quantkit.engine.streams import Streams, standing
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Statistic


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
class Gathering(Streams):
    """Passes that add to the statistics of groups.

    Args:
        needs: what is gathered of inputs.
        experts: how experts are calibrated.
        room: bytes that statistics of experts may take at a time; None for no limit.
        sensitivity: says how much tokens count in the statistics of each layer; None if all alike.
    """

    needs: frozenset[Statistic] = frozenset()
    experts: ExpertSettings = ROUTED
    room: int | None = None
    sensitivity: Sensitivity | None = None

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
