"""What an earlier walk that was cut short left of a task, and how a walk goes through it again.

A segment that is remembered is not solved again. In a quantized feed the weights that it was given then are put back,
so that the passes see what they saw, bit by bit; in a float feed there is nothing to put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quantkit.schemes import QuantizedWeight

if TYPE_CHECKING:
    from quantkit.engine.scaling import Scaling


class Memory(Protocol):
    """The finished segments of a task, by their prefixes; an input embedding counts as one."""

    def has(self, prefix: str) -> bool:
        """Whether a segment is finished."""

    def weight(self, layer: str) -> QuantizedWeight:
        """A layer of a finished segment as the method returned it, by its full name; on the CPU."""

    def scaling(self, prefix: str) -> Scaling:
        """The factors that were chosen in a finished segment."""

    def remember_scaling(self, prefix: str, scaling: Scaling) -> None:
        """Keep the factors that were chosen in the segment at which the walk stands."""

    def remember_seconds(self, own: float, shared: float) -> None:
        """Keep what the segment at which the walk stands took: the task's own work, and what all tasks share."""
