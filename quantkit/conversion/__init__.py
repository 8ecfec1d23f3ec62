"""Move the codes of a checkpoint from one format to another, without quantizing again."""

from __future__ import annotations

from quantkit.conversion.stage import convert

__all__ = ["convert"]
