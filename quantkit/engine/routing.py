"""Routing: layers that are alike and are each given some of a block's tokens, as the experts of a mixture are.

Which layers do is found by running a batch. What computes with experts tells which positions of the batch it gives to
an expert, so that whoever looks at the expert's input knows its tokens; the code of some models does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from quantkit.engine.batches import Batch
    from quantkit.engine.layers import Layer

ExpertTokens = Literal["routed", "all"]
PRIOR = 0.5
"""As many tokens as this times the width of their input is the statistics of all experts worth to each of them."""
Kind = tuple[str, tuple[int, int]]
"""What layers that are alike have in common: their path but for one number, and their shape."""


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """How experts are calibrated.

    Attributes:
        tokens: ``routed`` are those that the router sends to an expert; ``all`` shows it the others too, for its
            statistics alone.
        prior: what the statistics of all experts of a layer count beside an expert's own, see
            :func:`quantkit.engine.statistics.blended`.
    """

    tokens: ExpertTokens = "routed"
    prior: float = PRIOR


ROUTED = ExpertSettings()
"""What is usual."""


@dataclass(frozen=True, slots=True)
class Given:
    """What an expert is given in the call that runs.

    Attributes:
        positions: int64 ``[tokens]``, which positions of the whole it is given.
        total: positions of the whole.
        is_routed: the router sent them; otherwise they are shown to the expert for its statistics alone.
        is_replayed: they are those that it was given in an earlier run, see :class:`Routes`.
    """

    positions: torch.Tensor
    total: int
    is_routed: bool = True
    is_replayed: bool = False


_GIVEN: ContextVar[Given | None] = ContextVar("given", default=None)


@contextmanager
def giving(given: Given) -> Iterator[None]:
    """Inside the block, layers that run belong to an expert that is given this."""
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def now_given(total: int) -> Given | None:
    """What the expert that runs is given of a batch of ``total`` positions; None where nobody tells."""
    found = _GIVEN.get()
    return found if found is not None and found.total == total else None


# Tokens that are sent the way of an earlier run


Way = tuple[torch.Tensor, torch.Tensor]
"""What a stack of experts is given beside its tokens: int64 ``[tokens, k]``, the experts of each, and their weights."""


@dataclass(slots=True)
class _Run:
    """A run that keeps the ways of its tokens, or takes those that were kept, by stacks and their calls."""

    ways: dict[object, list[Way]]
    replays: bool
    calls: Counter[object] = field(default_factory=Counter)

    def way(self, stack: object, own: Way) -> tuple[Way, bool]:
        if not self.replays:
            self.ways.setdefault(stack, []).append(own)
            return own, False
        known, call = self.ways.get(stack, []), self.calls[stack]
        self.calls[stack] += 1
        if call >= len(known) or known[call][0].shape != own[0].shape:
            return own, False
        return known[call], True


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)


@dataclass(slots=True)
class Routes:
    """The ways that a router sent batches, so that another run of the same batches can be sent the same.

    The weights are replayed with the experts: a stack is not told what its router would give an expert that it did not
    choose.
    """

    _ways: dict[int, dict[object, list[Way]]] = field(default_factory=dict)

    def has(self, batch: Batch) -> bool:
        """Whether the way of a batch was kept."""
        return id(batch) in self._ways

    def recording(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside the block, what stacks of experts are given is kept."""
        self._ways[id(batch)] = {}
        return _running(_Run(self._ways[id(batch)], replays=False))

    def replaying(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside the block, stacks of experts are given what was kept of the batch, if it was."""
        ways = self._ways.get(id(batch))
        return nullcontext() if ways is None else _running(_Run(ways, replays=True))


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def way_of(stack: object, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> tuple[Way, bool]:
    """The way that the tokens of a stack of experts go in the run that is on, and whether it is that of an earlier one.

    Args:
        stack: any object that is the same in both runs.
        top_k_index: int64 ``[tokens, k]``, what its router chose.
        top_k_weights: ``[tokens, k]``.
    """
    run, own = _RUN.get(), (top_k_index, top_k_weights)
    return (own, False) if run is None else run.way(stack, own)


# Which layers are experts


@dataclass(frozen=True, slots=True)
class Numbered:
    """A layer among those that are alike: what they have in common, and its number among them."""

    kind: Kind
    number: int


def alike(layers: Iterable[Layer]) -> dict[str, Numbered]:
    """The layers that have like ones: same shape, same path but for one number. By their names.

    Where several numbers of a path would do, as in ``experts.3.layers.0``, the one that most share counts.
    """
    possible = {layer.name: list(_numbered(layer)) for layer in layers}
    counts = Counter(each.kind for found in possible.values() for each in found)
    best = {name: max(found, key=lambda each: counts[each.kind]) for name, found in possible.items() if found}
    return {name: each for name, each in best.items() if counts[each.kind] > 1}


def _numbered(layer: Layer) -> Iterator[Numbered]:
    parts = layer.path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            yield Numbered((".".join([*parts[:place], "*", *parts[place + 1 :]]), layer.shape), int(part))


def routed_kinds(
    numbered: Mapping[str, Numbered], shown: Sequence[Sequence[str]], positions: Mapping[str, int], total: int
) -> set[Kind]:
    """The kinds whose layers are each given some of the positions, as one run shows it.

    Some is fewer than there are, or those of a run that leaves some of the layers out. A single one that is given all
    is one of a list of which a block takes its own, as the adapters of blocks that share a layer.

    Args:
        numbered: the layers that have like ones.
        shown: the layers of each input, in the order of their calls.
        positions: how many each was given.
        total: how many there are.
    """
    sizes = Counter(each.kind for each in numbered.values())
    called: dict[Kind, list[str]] = {}
    shared: set[Kind] = set()
    for members in shown:
        kinds = Counter(numbered[name].kind for name in members if name in numbered)
        shared |= {kind for kind, count in kinds.items() if count > 1}
        for name in members:
            if name in numbered:
                called.setdefault(numbered[name].kind, []).append(name)
    return {
        kind
        for kind, names in called.items()
        if kind not in shared and (1 < len(names) < sizes[kind] or any(positions[name] < total for name in names))
    }


def completed(
    shown: Sequence[Sequence[str]], numbered: Mapping[str, Numbered], routed: Collection[Kind]
) -> list[list[str]]:
    """What a run shows, with the routed layers that it left out behind the first of their kind, one list a number."""
    there = {name for members in shown for name in members}
    missing: dict[Kind, dict[int, str]] = {}
    for name, each in numbered.items():
        if each.kind in routed and name not in there:
            missing.setdefault(each.kind, {})[each.number] = name
    found = []
    for members in shown:
        found.append(list(members))
        left = [missing.pop(numbered[name].kind, {}) for name in members if name in numbered]
        numbers = sorted({number for names in left for number in names})
        found += [[names[number] for names in left if number in names] for number in numbers]
    return found


def steps(
    order: Sequence[Sequence[str]], numbered: Mapping[str, Numbered], routed: Collection[Kind]
) -> list[list[list[str]]]:
    """The groups of a block by the steps in which they are solved: routed ones of a kind are one step, by number."""
    found: list[list[list[str]]] = []
    places: dict[Kind, int] = {}
    for members in order:
        kinds = [numbered[name].kind for name in members if name in numbered and numbered[name].kind in routed]
        place = next((places[kind] for kind in kinds if kind in places), len(found))
        if place == len(found):
            found.append([])
        found[place].append(list(members))
        places |= dict.fromkeys(kinds, place)
    return [sorted(step, key=lambda each: numbered[each[0]].number) if len(step) > 1 else step for step in found]


def common_name(names: Sequence[str]) -> str:
    """What the names of layers that are alike begin with: of ``experts.0.up`` and ``experts.1.up`` ``experts``."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts))
