"""The forward passes of all batches, which move through a model together, segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.groups import Enough
from quantkit.engine.input_group import Group
from quantkit.engine.parking import Parking
from quantkit.engine.passes import AtGroup, AtSegment, Pass, told
from quantkit.engine.segment import Segment
from quantkit.errors import QuantizationError


@dataclass(slots=True)
class Streams:
    """One pass a batch, which all move together.

    Args:
        model: what they run.
        batches: the calibration tokens.
        parking: where passes that stand before a segment leave their activations meanwhile; None where they are.
        crew: has the batches that are not run here.
    """

    model: nn.Module
    batches: Sequence[Batch]
    parking: Parking | None = None
    crew: Crew = ALONE
    _passes: list[Pass] = field(init=False, default_factory=list)
    _gathering: Sequence[Group] = field(init=False, default=())
    _states: set[tuple[nn.Module, str]] = field(init=False, default_factory=set)
    _index: dict[str, int] = field(init=False, default_factory=dict)

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
