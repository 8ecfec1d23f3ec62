"""The section ``report``: where results go and as what."""

from __future__ import annotations

from typing import Literal

from quantkit.recipe.fields import Section


class ReportSpec(Section):
    """Where results go and as what.

    Attributes:
        folder: everything of the run lies here; ``reports/NAME`` if not given. Relative to where quantkit is run.
        formats: which files are written; the JSON always is.
    """

    folder: str | None = None
    formats: tuple[Literal["html", "md", "json"], ...] = ("html", "md", "json")
