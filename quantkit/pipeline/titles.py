"""Titles of the stages of a run, as observers are told them and as what is to come is foreseen by them."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.recipe import AutoSpec, LibrarySpec, RecoverSpec, VariantSpec

NAMES_SHOWN = 3
"""Variants of a stage that its progress names."""
SOURCE_TITLE, CALIBRATION_TITLE, SENSITIVITY_TITLE = "source", "calibration", "sensitivity"
"""How the titles of these stages begin, by which what they take is told."""
BASELINE_TITLE = "baseline: the float model"


def walk_title(variants: Sequence[VariantSpec]) -> str:
    """Of a walk."""
    return f"quantize: {_names(variants)}"


def mixing_title(variants: Sequence[AutoSpec]) -> str:
    """Of choosing for variants that share what choices cost."""
    return f"choose bits: {_names(variants)}"


def _names(variants: Sequence[VariantSpec]) -> str:
    names = ", ".join(variant.name for variant in variants[:NAMES_SHOWN])
    rest = len(variants) - NAMES_SHOWN
    return f"{names} and {rest} more" if rest > 0 else names


def library_title(variant: LibrarySpec) -> str:
    """Of a library's work."""
    return f"quantize: {variant.name} ({variant.label})"


def recover_title(variant: RecoverSpec) -> str:
    """Of a training."""
    return f"recover: {variant.name}"


def evaluation_title(name: str) -> str:
    """Of the scoring of a file."""
    return f"evaluate: {name}"


def served_title(name: str, runtime: str) -> str:
    """Of the scoring of a file as a server computes with it."""
    return f"evaluate: {name} as {runtime} serves it"
