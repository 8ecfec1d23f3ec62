"""The float model's pass of every batch, beside the pass through the layers that are already quantized.

A twin runs through each segment as it is before any of its layers is solved, with what the transforms make of it, which
computes the same. So both passes of a batch have the same channels, and what they differ by is what was lost. With
``one-pass`` the twins run through the whole segment first, and leave the inputs of its layers; with ``recompute`` one
twin runs up to one group, with the float weights of what is solved in their places meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

from quantkit.engine.batches import BATCH_TOKENS, Batch
from quantkit.engine.crew import Crew
from quantkit.engine.experts import replayed_layers
from quantkit.engine.gathering import Replay
from quantkit.engine.groups import Enough, hooked
from quantkit.engine.input_group import Group
from quantkit.engine.input_rounding import without_rounding
from quantkit.engine.layers import Layer
from quantkit.engine.mismatch import (
    HeldOut,
    MismatchGatherer,
    StreamPlace,
    stream_hooks,
    stream_places,
    take_streams,
)
from quantkit.engine.parking import Parking
from quantkit.engine.passes import Pass, is_running, output_of, running_pass
from quantkit.engine.routing import Routes
from quantkit.engine.segment import Segment
from quantkit.engine.streams import Streams, standing

EVERY = 3
"""One batch in as many has a twin: what is lost is learned from fewer tokens than the curvature, in less time."""
FEWEST = 4
"""Batches that have one in any case."""
SHORT = 8
"""So many times smaller than the largest is a batch that has one beside these."""


def paired(batches: int) -> int:
    """How many of some batches have a twin."""
    return min(batches, max(FEWEST, -(-batches // EVERY)))


def paired_tokens(tokens: int, device: str) -> int:
    """About how many tokens these hold, on ``cpu`` or ``cuda``; for estimates."""
    batches = max(1, -(-tokens // BATCH_TOKENS[device]))
    return -(-tokens * paired(batches) // batches)


def _short(batches: Sequence[Batch]) -> list[int]:
    """The place of the last batch where it is short: paired, it tells where the residual stream is at little cost."""
    sizes = [batch.token_ids.numel() for batch in batches]
    return [len(sizes) - 1] if sizes and sizes[-1] * SHORT <= max(sizes) else []


@dataclass(slots=True)
class Twins:
    """The float passes of a walk with quantized inputs.

    Args:
        model: what they run.
        batches: the calibration tokens.
        parking: see :class:`Streams`.
        all_paired: every batch has one, as where segments are tuned.
        crew: has the twins of the batches that are not run here.
    """

    model: nn.Module
    batches: Sequence[Batch]
    parking: Parking | None = None
    all_paired: bool = False
    crew: Crew = field(default_factory=Crew)
    _streams: Streams = field(init=False)
    _held: HeldOut = field(init=False)
    _floats: dict[nn.Module, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = len(self.batches)
        count = whole if self.all_paired else paired(whole)
        places = sorted({*(place * whole // count for place in range(count)), *_short(self.batches)})
        here = [self.batches[place] for place in places if self.crew.is_mine(place)]
        self._streams = Streams(self.model, here, self.parking)
        self._held = HeldOut.of([self.batches[place] for place in places])

    def start(self, segments: Sequence[Segment], cleanup: ExitStack) -> None:
        """Run every twin up to its first segment, before anything is quantized."""
        self._streams.start(segments, cleanup)

    def prepare(self, segment: Segment, groups: Iterable[Group]) -> None:
        """Let groups of a segment of which nothing is solved yet sum what their inputs lost."""
        groups, twins = list(groups), self._streams.at(segment)
        alone = {group.name: group.leader for group in groups if len(group.layers) == 1 and _is_linear(group.leader)}
        streams = self._stream_places(segment, list(alone.values()), twins)
        if streams is None:
            return
        for group in groups:
            layer = alone.get(group.name)
            stream = None if layer is None else streams.get(layer)
            known = layer if stream is not None else _narrowing(layer)
            group.mismatch = MismatchGatherer(
                group.name, self._held, known, stream, token_weights=group.gatherer.token_weights
            )

    def _stream_places(
        self, segment: Segment, layers: Sequence[nn.Linear], twins: Sequence[Pass]
    ) -> dict[nn.Linear, StreamPlace] | None:
        """What :func:`stream_places` finds by the smallest twin, here or elsewhere; None where there is none."""
        found = None
        if twins:
            smallest = min(twins, key=lambda each: each.batch.token_ids.numel())
            with self._streams.fetched(smallest):
                found = stream_places(segment.module, layers, standing(smallest, segment))
        if self.crew.is_alone:
            return found
        names = {module: name for name, module in segment.module.named_modules()}
        told = None
        if found is not None:
            told = [
                (names[layer], place.argument, None if place.module is None else names[place.module])
                for layer, place in found.items()
            ]
        agreed = self.crew.agreed(told)
        if agreed is None:
            return None
        inside = segment.module.get_submodule
        places = {
            inside(name): StreamPlace(argument, None if module is None else inside(module))
            for name, argument, module in agreed
        }
        return {layer: places[layer] for layer in layers if layer in places}

    def prepare_experts(self, segment: Segment, experts: Iterable[Group]) -> Replay | None:
        """Let the groups of experts of a segment of which nothing is solved yet sum what their inputs lost.

        Experts of a model's own code, which cannot be sent another way, are left as they are; None where all are.
        """
        inside = replayed_layers(segment.module)
        groups = [group for group in experts if group.leader in inside]
        if not groups or not any(self.crew.gathered(bool(self._streams.at(segment)))):
            return None
        for group in groups:
            layer = group.leader if len(group.layers) == 1 and _is_linear(group.leader) else None
            group.mismatch = MismatchGatherer(
                group.name,
                self._held,
                _narrowing(layer),
                is_expert=True,
                token_weights=group.gatherer.token_weights,
            )
        routes = Routes()
        return Replay(routes, partial(self._see_experts, segment, routes))

    def _see_experts(self, segment: Segment, routes: Routes, groups: Sequence[Group], batch: Batch) -> None:
        """Run the twin of a batch, if it has one, and leave what experts were given; it stays where it is.

        The first run keeps the way that the routers sent its tokens; for no groups there is no other.
        """
        twin = next((each for each in self._streams.at(segment) if each.batch is batch), None)
        if twin is None or (not groups and routes.has(batch)):
            return
        with self._float_weights(), ExitStack() as seeing:
            if not routes.has(batch):
                seeing.enter_context(routes.recording(batch))
            for group in groups:
                seeing.enter_context(_seeing(group, batch, ends=False))
            self._streams.try_alone(segment, twin)

    def run(self, segment: Segment, groups: Sequence[Group]) -> None:
        """Bring every twin through a segment, and leave what each group was given."""
        gatherers = [group.mismatch for group in groups]
        for each in self._streams.at(segment):
            take_streams(gatherers, standing(each, segment), partial(MismatchGatherer.see_stream, batch=each.batch))
        hooks = stream_hooks(gatherers, lambda each, stream: each.see_stream(stream, running_pass().batch))
        with ExitStack() as seeing:
            seeing.enter_context(hooked(hooks))
            for group in groups:
                seeing.enter_context(_seeing(group, None))
            self._streams.advance(segment)

    def see(self, segment: Segment, group: Group, batch: Batch) -> None:
        """Run the twin of a batch, if it has one, up to a group, and leave what that was given; it stays there."""
        twin = next((each for each in self._streams.at(segment) if each.batch is batch), None)
        if twin is None or group.mismatch is None:
            return
        take = partial(MismatchGatherer.see_stream, batch=batch)
        with self._streams.fetched(twin):  # a view stays where it is when the pass is parked
            take_streams([group.mismatch], standing(twin, segment), lambda each, stream: take(each, stream.detach()))
        with self._float_weights(), hooked(stream_hooks([group.mismatch], take)), _seeing(group, batch):
            self._streams.try_alone(segment, twin)

    def prepare_layer(self, segment: Segment, group: Group) -> None:
        """Leave what every twin stands with before a segment that is a single layer."""
        group.mismatch = gatherer = MismatchGatherer(group.name, self._held, token_weights=group.gatherer.token_weights)
        for each in self._streams.at(segment):
            with self._streams.fetched(each):
                gatherer.see(standing(each, segment).args[0].detach(), each.batch)

    def keep(self, segment: Segment, layers: Iterable[Layer]) -> None:
        """Keep the float weights of layers that are about to be solved until the twins are through the segment."""
        for layer in layers if self._streams.at(segment) else ():
            self._floats.setdefault(layer.module, layer.module.weight.data)

    def advance(self, segment: Segment) -> None:
        """Bring the twins through a segment, with the float weights of what is solved in their places."""
        with self._float_weights():
            self._streams.advance(segment)
        self._floats.clear()

    def outputs(self, segment: Segment, *, last: bool) -> Outputs:
        """What every twin makes of a segment; they are brought through it, behind the last one they stay.

        Args:
            segment: before which they stand.
            last: no other comes behind it.
        """
        with self._float_weights(), leaving(segment) as found:
            for each in self._streams.at(segment) if last else ():
                self._streams.try_alone(segment, each)
                found[id(each.batch)] = found.pop(ALONE)
            if not last:
                self._streams.advance(segment)
        self._floats.clear()
        return found

    @contextmanager
    def _float_weights(self) -> Iterator[None]:
        """Inside the block, the float weights that were kept are in the places of what was made of them.

        Their inputs are not rounded meanwhile.
        """
        solved = {module: module.get_parameter("weight").data for module in self._floats}
        for module, weight in self._floats.items():
            module.get_parameter("weight").data = weight
        try:
            with without_rounding(self._floats):
                yield
        finally:
            for module, weight in solved.items():
                module.get_parameter("weight").data = weight


Outputs = dict[int, torch.Tensor]
"""What a segment makes of batches, by the identity of each."""
ALONE = 0
"""In the place of that for a run that is no pass's."""


@contextmanager
def leaving(segment: Segment) -> Iterator[Outputs]:
    """Inside the block, runs of a segment leave what it gives."""
    found: Outputs = {}

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        found[id(running_pass().batch) if is_running() else ALONE] = output_of(output).detach()

    hook = segment.module.register_forward_hook(
        leave, prepend=True
    )  # before the one at which the last block ends passes
    try:
        yield found
    finally:
        hook.remove()


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer gives what its weight makes of its input; some routers of this class give what they choose."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _narrowing(layer: nn.Linear | None) -> nn.Linear | None:
    """The layer if it has fewer outputs than inputs."""
    return layer if layer is not None and layer.weight.shape[0] < layer.weight.shape[1] else None


@contextmanager
def _seeing(group: Group, batch: Batch | None, *, ends: bool = True) -> Iterator[None]:
    """Inside the block, a run of the group shows its gatherer what it needs; one of a single batch ends there.

    Args:
        group: whose.
        batch: the single one; None for those of the passes that run.
        ends: the run has nothing more to show; of a single batch.
    """
    gatherer = group.mismatch
    if gatherer is None:
        yield
        return

    def see(values: torch.Tensor) -> None:
        gatherer.see(values, running_pass().batch if batch is None else batch)
        if batch is not None and ends:
            raise Enough

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])

    def after(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        see(output)

    leader = group.leader
    hook = leader.register_forward_pre_hook(before) if gatherer.layer is None else leader.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()
