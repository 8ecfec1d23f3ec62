"""The sections ``history`` and ``retention``: what is kept of a run after it has ended."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quantkit.recipe.fields import Flag, Section, Whole


class HistorySpec(Section):
    """The file in which every run leaves a record.

    Attributes:
        enabled: whether runs are recorded; a check needs its history.
        file: SQLite file; ``history.sqlite`` beside the run's folder if not given, so ``reports/history.sqlite``.
            Relative to where quantkit is run. Recipes may share one.
    """

    enabled: Flag = True
    file: Annotated[str, Field(min_length=1)] | None = None


class RetentionSpec(Section):
    """How long checks keep the checkpoints of their runs; those of accepted runs are kept until another is accepted.

    Attributes:
        runs: of so many last checks.
        days: of those not older than so many days besides; none if not given.
    """

    runs: Annotated[Whole, Field(ge=1)] = 3
    days: Annotated[Whole, Field(ge=1)] | None = None
