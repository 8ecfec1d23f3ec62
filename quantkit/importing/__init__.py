"""Recipes from the configurations of other tools."""

from __future__ import annotations

from quantkit.importing.llamafactory import import_recipe

__all__ = ["import_recipe"]
