"""Grids: the arithmetic of the schemes. One file a family."""

from __future__ import annotations

from quantkit.schemes.grids.base import Grid, Grids, Rounder

__all__ = ["Grid", "Grids", "Rounder"]
