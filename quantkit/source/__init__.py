"""The source stage: from a model reference to a float checkpoint on disk."""

from __future__ import annotations

from quantkit.source.model import SourceModel
from quantkit.source.resolve import resolve

__all__ = ["SourceModel", "resolve"]
