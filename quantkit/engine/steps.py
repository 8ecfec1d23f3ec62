"""What of a segment is solved at a time: a group of layers, or the groups of a layer's experts, in parts that fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.engine.input_group import Group
from quantkit.methods.base import InputStatistics

BATCH_WEIGHTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Weights of like groups that are solved together: enough to keep a GPU busy, no more than a CPU's caches hold."""


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
