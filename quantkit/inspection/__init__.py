"""What a checkpoint is, whoever made it: layers, sizes, outliers, what loads it, and what is wrong with it."""

from __future__ import annotations

from quantkit.inspection.inspect import inspect
from quantkit.inspection.tables import inspect_tables

__all__ = ["inspect", "inspect_tables"]
