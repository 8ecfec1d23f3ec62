"""A check as pages and files for people and for other tools."""

from __future__ import annotations

from quantkit.regression.pages.render import (
    HTML,
    JUNIT,
    MARKDOWN,
    write_pages,
)

__all__ = ["HTML", "JUNIT", "MARKDOWN", "write_pages"]
