"""Which layers of a segment share an input, and in which order their inputs are called.

Both are found by running batches and comparing the input tensors, not from a table of model names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from quantkit.engine.layers import Layer

PreHook = Callable[[nn.Module, tuple[Any, ...]], None]


class Enough(Exception):  # noqa: N818 - not an error: it ends a trial run
    """A trial run of a segment has shown what it was run for."""


def shared_inputs(
    layers: Mapping[str, Layer], run: Callable[[], None], positions: MutableMapping[str, int] | None = None
) -> list[list[str]]:
    """The layers of each input that one run shows, in the order of their calls; a layer counts once.

    Args:
        layers: by their names.
        run: calls some of them.
        positions: takes the number of positions that each of these was given.
    """
    shown: dict[int, list[str]] = {}
    kept: list[torch.Tensor] = []  # an input that is let go could give its identity to another
    seen: set[str] = set()

    def record(name: str) -> PreHook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in seen:
                seen.add(name)
                kept.append(args[0])
                if positions is not None:
                    positions[name] = args[0].numel() // args[0].shape[-1]
                shown.setdefault(id(args[0]), []).append(name)

        return hook

    with hooked([(layer.module, record(name)) for name, layer in layers.items()]):
        run()
    return list(shown.values())


def call_order(names: Sequence[str], runs: Iterable[list[list[str]]]) -> list[list[str]]:
    """The groups of all layers in an order that fits every run, though a run may leave some out.

    An expert is called by some batches only, and what a batch leaves out does not show where it would have
    come. Such a group goes behind the one that was called before it, and there to the place that the order of
    definition gives it. A layer that no run shows goes by itself, behind its neighbour in the order of definition.

    Args:
        names: all layers in the order of their definition.
        runs: what :func:`shared_inputs` gives; no more are taken than are needed to see all layers.
    """
    order: list[list[str]] = []
    missing = set(names)
    rank = {name: index for index, name in enumerate(names)}
    for run in runs:
        place = 0
        called = {name for members in run for name in members}
        for members in run:
            fresh = [name for name in members if name in missing]
            if not fresh:
                place = max(place, 1 + next(index for index, group in enumerate(order) if members[0] in group))
                continue
            while place < len(order) and order[place][0] not in called and rank[order[place][0]] < rank[fresh[0]]:
                place += 1
            order.insert(place, fresh)
            place += 1
            missing.difference_update(fresh)
        if not missing:
            break
    for name in (name for name in names if name in missing):
        before = [group for group in order if rank[group[0]] < rank[name]]
        nearest = max(before, key=lambda group: rank[group[0]], default=None)
        order.insert(0 if nearest is None else 1 + order.index(nearest), [name])
    return order


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, PreHook]]) -> Iterator[None]:
    """Modules with hooks before their forwards, which are gone when the block ends."""
    with ExitStack() as removal:
        for module, hook in hooks:
            removal.callback(module.register_forward_pre_hook(hook).remove)
        yield
