"""A crew: several processes that walk together, each on a device of its own, or a single one, which needs nobody.

Every process runs the same walk over its own batches, and they meet at the same places. What a batch adds to the sums
of a group goes to the process that owns the group, which adds what all batches gave in the order of the batches; it
solves the group, and hands the result to all. So sums and codes are those of a single device, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quantkit.engine.batches import Batch

if TYPE_CHECKING:
    from quantkit.engine.input_group import Group

T = TypeVar("T")


class Post(Protocol):
    """Carries what processes have to tell each other; see :class:`quantkit.system.post.Post`."""

    rank: int
    size: int

    def exchange(self, outgoing: Mapping[int, Any]) -> dict[int, Any]:
        """Send each other process what is for it, and return what the others had for this one, by their ranks."""


class Crew:
    """One process of a crew; without a post the only one.

    Args:
        post: carries what they tell each other.
    """

    def __init__(self, post: Post | None = None) -> None:
        self._post = post
        self.rank, self.size = (0, 1) if post is None else (post.rank, post.size)
        self._owners: dict[str, int] = {}

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    # Batches: in each turn a process runs one at most.

    def is_mine(self, index: int) -> bool:
        """Whether a batch, by its place among all, is this process's. Who has the first of a turn moves on by one."""
        return self._of(index) == self.rank

    def mine(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of this process."""
        return [batch for index, batch in enumerate(batches) if self.is_mine(index)]

    def turns(self, batches: int) -> int:
        """How many turns so many batches take."""
        return -(-batches // self.size)

    def turn_of(self, index: int) -> int:
        """The turn of a batch."""
        return index // self.size

    def _of(self, index: int) -> int:
        turn, seat = divmod(index, self.size)
        return (seat + turn) % self.size

    # Groups

    def deal(self, batches: Iterable[Sequence[Group]]) -> None:
        """Say who owns which groups, each sum and solution to the one who has least; all processes say the same.

        Args:
            batches: groups that are solved together, in order; those of experts with their like, see :meth:`deal_row`.
        """
        load = [0.0] * self.size
        for groups in batches:
            owner = min(range(self.size), key=lambda rank: load[rank])
            load[owner] += sum(group.weights() * group.columns() for group in groups)
            self._owners |= {group.name: owner for group in groups}

    def deal_row(self, batches: Sequence[Sequence[Group]]) -> None:
        """Say who owns which of many alike, each process a part of the row, so that sums over all can go along it."""
        for place, groups in enumerate(batches):
            self._owners |= {group.name: place * self.size // len(batches) for group in groups}

    def owns(self, group: Group) -> bool:
        """Whether this process sums and solves a group."""
        return self.is_alone or self._owners[group.name] == self.rank

    def hand_over(self, groups: Sequence[Group], turn: int) -> None:
        """Give the owners what the batches of a turn added to groups, in the order of the batches."""
        if self._post is None or not groups:
            return
        outgoing: dict[int, dict[str, Any]] = {rank: {} for rank in range(self.size)}
        for group in groups:
            if parts := group.take_parts():
                outgoing[self._owners[group.name]][group.name] = parts
        own = outgoing.pop(self.rank)
        found = {**self._post.exchange(outgoing), self.rank: own}
        by_name = {group.name: group for group in groups}
        for seat in range(self.size):
            for name, parts in found[self._of(turn * self.size + seat)].items():
                for part in parts:
                    by_name[name].absorb(part)

    # What all have to know

    def gathered(self, value: T) -> list[T]:
        """What every process has, by their ranks."""
        if self._post is None:
            return [value]
        outgoing = dict.fromkeys((rank for rank in range(self.size) if rank != self.rank), value)
        found = {**self._post.exchange(outgoing), self.rank: value}
        return [found[rank] for rank in range(self.size)]

    def agreed(self, value: T | None) -> T | None:
        """What the first process found that found anything."""
        return next((each for each in self.gathered(value) if each is not None), None)

    def in_turn(self, value: T, work: Callable[[T], T]) -> T:
        """Let each process, by rank, make something of what the one before it made; all get the last."""
        for rank in range(self.size):
            value = work(value) if rank == self.rank else value
            value = self._from(rank, value)
        return value

    def _from(self, rank: int, value: T) -> T:
        if self._post is None:
            return value
        others = [each for each in range(self.size) if each != self.rank]
        found = self._post.exchange(dict.fromkeys(others, value) if rank == self.rank else {})
        return value if rank == self.rank else found[rank]


ALONE = Crew()
