"""Gathering: the forward passes of all batches as they stand in a segment, and the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.groups import Enough, PreHook, call_order, hooked, shared_inputs
from quantkit.engine.layers import Layer
from quantkit.engine.passes import CPU, AtEnd, AtGroup, AtSegment, Pass, move, pause, running_batch, states
from quantkit.engine.skeleton import Segment
from quantkit.engine.smoothing import Trial
from quantkit.engine.statistics import Gatherer
from quantkit.methods.base import InputStatistics, Statistic


@dataclass(slots=True)
class Group:
    """Layers of a segment that share an input, the one that is called first at the head."""

    layers: dict[str, Layer]
    gatherer: Gatherer
    solved: bool = False

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


@dataclass(slots=True)
class Streams:
    """One pass a batch, which all move together.

    Args:
        model: what they run.
        batches: the calibration tokens.
        needs: what is gathered of inputs.
        offload: passes that stand before a segment leave their activations in the memory of the CPU meanwhile.
    """

    model: nn.Module
    batches: Sequence[Batch]
    needs: frozenset[Statistic]
    offload: bool = False
    _passes: list[Pass] = field(default_factory=list)
    _states: set[tuple[nn.Module, str]] = field(default_factory=set)

    def start(self, segments: Sequence[Segment], cleanup: ExitStack) -> None:
        """Run every pass up to the first segment; ``cleanup`` ends them."""
        cleanup.callback(self.stop)
        for index, segment in enumerate(segments):
            hook = segment.module.register_forward_pre_hook(_pause_before(index), with_kwargs=True)
            cleanup.callback(hook.remove)
        end = segments[-1].module.register_forward_hook(lambda *_: pause(AtEnd()))
        cleanup.callback(end.remove)
        self._passes = [Pass(self.model, batch) for batch in self.batches]
        self.advance()

    def stop(self) -> None:
        """End every pass where it stands."""
        for each in self._passes:
            each.stop()

    def advance(self) -> None:
        """Run every pass to where it pauses next."""
        for each in self._passes:
            self._fetch(each)
            each.resume(self._states)
            self._park(each)

    def _fetch(self, each: Pass) -> None:
        """Bring back what a pass left in the memory of the CPU."""
        if self.offload:
            move(each.place, each.batch.token_ids.device)

    def _park(self, each: Pass) -> None:
        """Leave the activations of a pass in the memory of the CPU, if it stands before a segment."""
        if self.offload:
            move(each.place, CPU)

    def advance_from(self, index: int) -> None:
        """Run the passes that stand at a group to where they pause next."""
        for each in self._passes:
            if each.place == AtGroup(index):
                each.resume(self._states)
                self._park(each)

    def groups(self, segment: Segment, wanted: dict[str, Layer]) -> list[Group]:
        """The groups of a segment in the order of their calls, found by trying batches until all layers were seen."""
        smallest_first = sorted(self._passes, key=lambda each: each.batch.token_ids.numel())
        runs = (shared_inputs(wanted, partial(self._try, segment, each)) for each in smallest_first)
        with states(segment.module) as self._states:
            order = call_order(list(wanted), runs) if wanted else []
        return [Group({name: wanted[name] for name in names}, Gatherer(self.needs, names[0])) for names in order]

    def trial(self, segment: Segment) -> Trial:
        """A segment to be run with the smallest batch."""
        smallest = min(self._passes, key=lambda each: each.batch.token_ids.numel())
        inputs = shared_inputs({layer.path: layer for layer in segment.layers}, partial(self._try, segment, smallest))
        self._fetch(smallest)
        place, prefix = _standing(smallest, segment), f"{segment.prefix}."
        return Trial(
            segment.module,
            [[name.removeprefix(prefix) for name in names] for names in inputs],
            lambda: segment.module(*place.args, **place.kwargs),
            [each for each in (*place.args, *place.kwargs.values()) if isinstance(each, torch.Tensor)],
            segment.shared,
        )

    def observe(self, segment: Segment, groups: Sequence[Group]) -> dict[str, InputStatistics]:
        """The statistics of all inputs of a segment as it is, from one more run of it."""
        seen = [Group(group.layers, Gatherer(self.needs, group.name)) for group in groups]
        for each in self._passes:

            def gather(_: nn.Module, args: tuple[Any, ...], group: Group, each: Pass = each) -> None:
                group.gatherer.add(args[0], each.batch)

            with hooked([(group.leader, partial(gather, group=group)) for group in seen]):
                self._try(segment, each)
        return by_layer(seen)

    def read_before(self, segment: Segment) -> InputStatistics:
        """The statistics of what the passes stand before a segment with, for one that is a single layer."""
        gatherer = Gatherer(self.needs, segment.prefix)
        for each in self._passes:
            self._fetch(each)
            gatherer.add(_standing(each, segment).args[0], each.batch)
            self._park(each)
        return gatherer.result()

    def gather_alone(self, segment: Segment, group: Group) -> InputStatistics:
        """Run a segment up to a group, one batch at a time; the passes stay where they are."""
        for each in self._passes:

            def gather(_: nn.Module, args: tuple[Any, ...], each: Pass = each) -> None:
                group.gatherer.add(args[0], each.batch)
                raise Enough

            with hooked([(group.leader, gather)]):
                self._try(segment, each)
        return group.gatherer.result()

    @contextmanager
    def gathering(self, groups: Sequence[Group], pausing: bool) -> Iterator[None]:
        """Inside the block, passes that come to a group add to its statistics, and pause there on request."""

        def gather(index: int, group: Group) -> PreHook:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not group.solved:
                    group.gatherer.add(args[0], running_batch())
                    if pausing:
                        pause(AtGroup(index))

            return hook

        with hooked([(group.leader, gather(index, group)) for index, group in enumerate(groups)]):
            yield

    def _try(self, segment: Segment, each: Pass) -> None:
        """Run a segment with the arguments of a pass that stands before it, which stays where it is."""
        self._fetch(each)
        place = _standing(each, segment)
        with suppress(Enough):
            segment.module(*place.args, **place.kwargs)
        self._park(each)


def by_layer(groups: Sequence[Group]) -> dict[str, InputStatistics]:
    """The finished statistics of each group by the names of its layers."""
    found = [(group, group.gatherer.result()) for group in groups]
    return {name: statistics for group, statistics in found for name in group.layers}


def _standing(each: Pass, segment: Segment) -> AtSegment:
    """Where a pass stands, with the arguments that it would call the segment with."""
    if not isinstance(each.place, AtSegment):
        raise RuntimeError(f"a pass stands at {each.place}, not before {segment.prefix}")
    return each.place


def _pause_before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pause(AtSegment(index, args, kwargs))

    return hook
