"""The source stage: from a model reference to a float checkpoint on disk."""

from __future__ import annotations

from quantkit.source.model import SourceModel
from quantkit.source.resolve import KEEPING, resolve

__all__ = ["KEEPING", "SourceModel", "resolve"]
