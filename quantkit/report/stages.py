"""The memory that each stage of a run took, beside what was expected of it."""

from __future__ import annotations

from typing import Any

from quantkit.report.columns import Record
from quantkit.report.numbers import ABSENT, duration, figure, fixed, in_bytes

TITLES = ("Stage", "Estimated", "Measured", "Estimated / measured", "Time", "How")
"""Of the columns; those between the first and the last are of numbers."""
LEAD = (
    "What each stage grew by at its peak, beside Python and its packages, and what was expected of it on this machine "
    "before it began. Stages whose result was there are left out."
)


def stage_rows(report: Record) -> list[list[str]]:
    """For each stage that was measured its cells under :data:`TITLES`; none in reports without such figures."""
    stages: list[dict[str, Any]] = report.get("stages") or []
    return [
        [
            str(each.get("stage")),
            in_bytes(figure(each, "estimated_bytes")),
            in_bytes(figure(each, "measured_bytes")),
            fixed(figure(each, "ratio"), 2),
            duration(figure(each, "seconds")),
            str(each.get("how") or ABSENT),
        ]
        for each in stages
        if figure(each, "measured_bytes") is not None
    ]
