"""What the merge gives to the stages after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantkit.source import SourceModel


@dataclass(frozen=True)
class MergedModel(SourceModel):
    """A float model that adapters were merged into.

    Attributes:
        content: what its values and tokens depend on.
        merge: ``base``, ``base_weights``, ``adapters`` (``source``, ``weight``, ``rank``, ``layers``), ``notes`` and
            ``check``, see :func:`quantkit.merging.check.check_merge`.
    """

    content: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)

    def made_from(self) -> dict[str, Any]:
        """The base, the adapters, and how they were merged."""
        return self.content
