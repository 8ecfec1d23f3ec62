"""How long a library may take, and how much memory."""

from __future__ import annotations

import re
from typing import Any

from pydantic import field_validator

from quantkit.errors import RecipeError
from quantkit.recipe.fields import Section
from quantkit.system.units import parse_bytes
from quantkit.system.validation import located

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
DEFAULT_TIME = "12h"


class LimitsSpec(Section):
    """What a worker may take before it is ended.

    Attributes:
        time: such as ``90s``, ``30min``, ``2h``.
        memory: of the worker and the processes that it starts, resident, such as ``12GiB``; None is nine tenths of
            what is free when it starts.
    """

    time: str = DEFAULT_TIME
    memory: str | None = None

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_one(cls, given: Any) -> Any:
        with located():
            parse_seconds(given)
        return given

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_is_some(cls, given: Any) -> Any:
        with located():
            if given is not None and (not isinstance(given, str) or parse_bytes(given) <= 0):
                raise RecipeError(f"'{given}' is no amount of memory", "write 12GiB, for one")
        return given

    @property
    def seconds(self) -> float:
        """The time."""
        return parse_seconds(self.time)

    @property
    def memory_bytes(self) -> int | None:
        """The memory, where it is given."""
        return None if self.memory is None else parse_bytes(self.memory)


def parse_seconds(text: object) -> float:
    """Seconds from ``90s``, ``1.5min``, ``2h`` or ``1d``.

    Raises:
        RecipeError: it is nothing of the kind, or no time at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text) if isinstance(text, str) else None
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise RecipeError(f"'{text}' is no length of time", "write 90s, 30min or 2h, for one")
    return seconds
