"""Titles of the stages of a run, as observers are told them and as what is to come is foreseen by them."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.recipe import LibrarySpec, RecoverSpec, VariantSpec

NAMES_SHOWN = 3
"""Variants of a walk that its progress names."""
BASELINE_TITLE = "baseline: the float model"


def walk_title(variants: Sequence[VariantSpec]) -> str:
    """Of a walk."""
    names = ", ".join(variant.name for variant in variants[:NAMES_SHOWN])
    rest = len(variants) - NAMES_SHOWN
    return f"quantize: {names} and {rest} more" if rest > 0 else f"quantize: {names}"


def library_title(variant: LibrarySpec) -> str:
    """Of a library's work."""
    return f"quantize: {variant.name} ({variant.label})"


def recover_title(variant: RecoverSpec) -> str:
    """Of a training."""
    return f"recover: {variant.name}"


def evaluation_title(name: str) -> str:
    """Of the scoring of a file."""
    return f"evaluate: {name}"
