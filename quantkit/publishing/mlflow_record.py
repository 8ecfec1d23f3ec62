"""What a tracking server is told of a run, from the content of its report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FIGURES = ("metrics", "size_bytes", "bits_per_weight", "memory", "speed", "seconds")
"""What of a row of a report are figures."""
_FACTS = ("method", "format", "scheme", "loaded_by", "checkpoint")
_LEFT_OUT = ("prompts_checksum", "seconds_per_token")
LONGEST_KEY, LONGEST_VALUE = 250, 6000
"""Characters that MLflow takes of a parameter's or metric's name, and of a parameter's value."""
_NOT_IN_KEYS = re.compile(r"[^\w.\- ]")
"""What is put out of names: MLflow takes letters, digits, ``_``, ``-``, ``.``, spaces, and slashes as in a path."""
REPORT = "quantkit.report"
"""The tag by which the runs of one report are found again."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """One run as a tracking server lists it.

    Attributes:
        name: of the recipe, or of a variant.
        failed: whether it, or a gate on it, failed.
        params: what was asked for.
        metrics: figures, by dotted name.
        tags: versions, fingerprints, states.
        nested: the variants of a recipe.
    """

    name: str
    failed: bool
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    nested: tuple[Tracked, ...] = ()


def tracked(report: Mapping[str, Any]) -> Tracked:
    """The record of a run: the recipe with the float model's figures, and a nested one per variant.

    Args:
        report: the content of ``report.json``.
    """
    recipe = dict(report.get("recipe") or {})
    mark = {REPORT: hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()}
    asked = {str(each.get("name")): each for each in recipe.pop("variants", [])}
    gates = report.get("gates") or []
    return Tracked(
        name=str(report["name"]),
        failed=report.get("status") != "ok",
        params=_params(recipe),
        metrics={f"baseline.{name}": value for name, value in figures(report.get("baseline") or {}).items()},
        tags=_tags(report) | mark,
        nested=tuple(_variant(row, asked.get(str(row["name"]), {}), gates, mark) for row in report["variants"]),
    )


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Every finite figure of a row of a report, by its dotted name without ``metrics.`` and ``.value``."""
    found = {}
    for name, value in _leaves({key: row.get(key) for key in FIGURES}):
        if any(part in _LEFT_OUT for part in name.split(".")) or isinstance(value, bool):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            short = name.removeprefix("metrics.").removesuffix(".value")
            found[_key(short)] = float(value)
    return found


def _variant(
    row: Mapping[str, Any], asked: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], mark: Mapping[str, str]
) -> Tracked:
    verdicts = {str(gate["gate"]): bool(gate["passed"]) for gate in gates if gate.get("variant") == row["name"]}
    tags = {f"quantkit.{key}": str(row[key]) for key in _FACTS if row.get(key)}
    tags |= {"quantkit.error": str(row["error"])[:LONGEST_VALUE]} if row.get("error") else {}
    missed = [gate for gate, passed in verdicts.items() if not passed]
    tags |= {"quantkit.gates_missed": "; ".join(missed)[:LONGEST_VALUE]} if missed else {}
    return Tracked(
        name=str(row["name"]),
        failed=row.get("status") != "ok" or bool(missed),
        params=_params({**asked, "overrides": _listed(asked.get("overrides"))}),
        metrics=figures(row),
        tags={**tags, **mark},
    )


def _tags(report: Mapping[str, Any]) -> dict[str, str]:
    environment = report.get("environment") or {}
    source, audit = report.get("source") or {}, report.get("calibration") or {}
    given = {
        "quantkit.version": report.get("quantkit_version"),
        "quantkit.status": report.get("status"),
        "quantkit.created": report.get("created"),
        "quantkit.source": source.get("reference"),
        "quantkit.source_revision": source.get("revision"),
        "quantkit.source_fingerprint": source.get("fingerprint"),
        "quantkit.calibration_fingerprint": audit.get("token_ids_sha256"),
        **{f"quantkit.{key}": value for key, value in environment.items() if key != "packages"},
        **{f"package.{name}": version for name, version in (environment.get("packages") or {}).items()},
    }
    return {key: str(value)[:LONGEST_VALUE] for key, value in given.items() if value is not None}


def _listed(overrides: object) -> list[dict[str, Any]]:
    """Overrides as a list, as a regular expression can be no part of a parameter's name."""
    patches = overrides if isinstance(overrides, Mapping) else {}
    return [{"pattern": pattern, **patch} for pattern, patch in patches.items()]


def _key(name: str) -> str:
    """A name as MLflow takes it."""
    return _NOT_IN_KEYS.sub("_", name)[:LONGEST_KEY]


def _params(given: Mapping[str, Any]) -> dict[str, str]:
    return {_key(name): str(value)[:LONGEST_VALUE] for name, value in _leaves(given) if value not in (None, [], {})}


def _leaves(given: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each with its dotted path; empty ones are values themselves."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(given, Mapping) and given:
        items = iter(given.items())
    elif isinstance(given, list | tuple) and given:
        items = iter(enumerate(given))
    else:
        yield path, given
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
