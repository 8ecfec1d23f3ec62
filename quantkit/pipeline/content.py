"""The content of ``report.json``."""

from __future__ import annotations

from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import report
from quantkit.calibration import CalibrationSet
from quantkit.checkpoint import CheckpointReader
from quantkit.estimation.measured import beside_measured, beside_server
from quantkit.evaluation.stage import report_figures
from quantkit.merging import MergedModel
from quantkit.pipeline.context import Run
from quantkit.system.artifacts import fingerprint
from quantkit.system.distribution import own_version
from quantkit.system.environment import describe

if TYPE_CHECKING:
    from quantkit.source import SourceModel


def report_content(
    current: Run,
    model: SourceModel,
    calibrated: CalibrationSet | None,
    baseline: dict[str, Any],
    rows: list[dict[str, Any]],
    stages: list[dict[str, Any]],
) -> dict[str, Any]:
    """The report of a run, with the verdicts of its gates; ``status`` is ``failed`` if a variant or a gate failed."""
    recipe = current.recipe
    variants, context = {variant.name for variant in recipe.variants}, recipe.budget.context
    rows = [beside_server(row, Path(row["checkpoint"]), context) if row["status"] == "ok" else row for row in rows]
    figures = beside_measured(report_figures(baseline), baseline, model.folder)
    figures = beside_server(figures, model.folder, context)
    before = {**figures, "seconds": {"evaluate": baseline["seconds"]}}
    rows = [_with_scoring_notes(row) for row in rows]
    gates = report.evaluate_gates(recipe.gates, [row for row in rows if row["name"] in variants], before)
    titles = {variant.name: variant.title for variant in recipe.variants if variant.title}
    rows = [row | {"title": titles[row["name"]]} if row["name"] in titles else row for row in rows]
    failed = any(row["status"] == "failed" for row in rows) or not all(gate["passed"] for gate in gates)
    content = {
        "schema": 1,
        "name": recipe.name,
        "title": recipe.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "failed" if failed else "ok",
        "quantkit_version": own_version(),
        "recipe": recipe.resolved(),
        "recipe_text": recipe.to_yaml(),
        "source": _source_facts(model),
        "calibration": calibrated.audit if calibrated else None,
        "environment": describe(),
        "baseline": before,
        "variants": rows,
        "gates": gates,
        "stages": stages,
    }
    return {**report.noted(content), "recommendation": report.recommend(content).to_json()}


def _with_scoring_notes(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose notes tell how it was scored, too."""
    told = row.get("scoring_notes") or []
    return {**row, "notes": [*(row.get("notes") or []), *(f"scoring: {note}" for note in told)]} if told else row


def _source_facts(model: SourceModel) -> dict[str, Any]:
    reader = CheckpointReader(model.folder)
    return {
        "reference": model.reference,
        "kind": model.kind,
        "decoded": model.decoded,
        "relative_to": model.relative_to,
        "dtype": model.dtype,
        "note": model.note,
        "revision": model.revision,
        "unchecked": list(model.unchecked),
        "fingerprint": fingerprint(model.made_from()),
        "parameters": sum(prod(reader.shape(name)) for name in reader.names()),
        "size_bytes": sum(reader.nbytes(name) for name in reader.names()),
        "merge": model.merge if isinstance(model, MergedModel) else None,
    }
