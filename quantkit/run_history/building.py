"""From the report of a run, or from what stopped it, to its record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.recipe import Recipe
from quantkit.run_history.location import place, private, without_folders
from quantkit.run_history.record import RunRecord
from quantkit.run_history.rows import variant_record

DRIVER = Path("/proc/driver/nvidia/version")


def now() -> str:
    """The moment, UTC, ISO 8601 with microseconds, so that moments sort as texts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def finished_record(recipe: Recipe, content: Mapping[str, Any], kind: str, started: str) -> RunRecord:
    """The record of a run that came to its report.

    Args:
        recipe: what was run.
        content: of ``report.json``.
        kind: ``run`` or ``check``.
        started: when it began.
    """
    environment, source = content["environment"], content["source"]
    cpu = str(environment.get("cpu") or "")
    wanted = {variant.name for variant in recipe.variants}
    variants = tuple(
        variant_record(_private_row(row), content=_content(row), cpu=cpu)
        for row in content["variants"]
        if row["name"] in wanted
    )
    packages = {**environment["packages"], "python": environment["python"]}
    return RunRecord(
        name=recipe.name,
        kind=kind,
        started=started,
        finished=now(),
        status=str(content["status"]),
        quantkit=str(content["quantkit_version"]),
        recipe=private(recipe.resolved()),
        source=place(recipe.model.source),
        source_fingerprint=source.get("fingerprint"),
        calibration_fingerprint=(content.get("calibration") or {}).get("token_ids_sha256"),
        device=str(environment["device"]),
        cpu=cpu,
        cores=int(environment.get("cores") or 0),
        driver=_driver(),
        platform=str(environment["platform"]),
        packages=packages | ({"cuda": str(environment["cuda"])} if environment.get("cuda") else {}),
        folder=place(recipe.folder),
        baseline=variant_record(content["baseline"], cpu=cpu),
        variants=variants,
    )


def stopped_record(recipe: Recipe, error: BaseException, kind: str, started: str) -> RunRecord:
    """The record of a run that ended without a report: ``error``, or ``interrupted``."""
    interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
    message = "" if interrupted else str(error) or type(error).__name__
    return RunRecord(
        name=recipe.name,
        kind=kind,
        started=started,
        finished=now(),
        status="interrupted" if interrupted else "error",
        error=without_folders(message) or None,
        quantkit=version("quantkit"),
        recipe=private(recipe.resolved()),
        source=place(recipe.model.source),
        folder=place(recipe.folder),
    )


def _private_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "error": row["error"] and without_folders(str(row["error"]))}


def _content(row: Mapping[str, Any]) -> str | None:
    """The fingerprint of a variant's file."""
    from quantkit.exports.manifest import MANIFEST, identity

    folder = row.get("checkpoint")
    return identity(Path(folder)) if folder and (Path(folder) / MANIFEST).is_file() else None


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver, on Linux."""
    if not DRIVER.is_file():
        return None
    words = DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)
