"""What the history knows of a run, and how that is made of the run's report or of what stopped it.

The user's folders stay out of it: paths are written relative to where quantkit runs, or to the home folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.gates.record import VariantRecord, variant_record
from quantkit.recipe import Recipe
from quantkit.system.distribution import own_version

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run.

    Attributes:
        name: of the recipe.
        kind: ``run`` or ``check``.
        started, finished: UTC, ISO 8601.
        status: ``ok``; ``failed`` if a variant or a gate did; ``error`` if nothing could run; ``interrupted``.
        error: why, for the last two.
        verdict: of a check.
        quantkit: version.
        recipe: resolved; paths are shortened by :func:`private`.
        source: what the recipe calls the model.
        source_fingerprint: of its content.
        calibration_fingerprint: of the calibration tokens; None where no method needs any.
        device, cpu, cores, driver: of the machine.
        packages: name to version, with ``python`` and ``cuda`` among them.
        folder: where the run's results lay.
        baseline: the float model.
        variants: in the order of the report.
        id: number in the file; None until it is there.
        accepted: names of the variants for which this run is the reference now.
    """

    name: str
    kind: str
    started: str
    finished: str
    status: str
    error: str | None = None
    verdict: str | None = None
    quantkit: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    source_fingerprint: str | None = None
    calibration_fingerprint: str | None = None
    device: str = ""
    cpu: str = ""
    cores: int = 0
    driver: str | None = None
    platform: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    baseline: VariantRecord | None = None
    variants: tuple[VariantRecord, ...] = ()
    id: int | None = None
    accepted: tuple[str, ...] = ()

    def variant(self, name: str) -> VariantRecord | None:
        """The variant of that name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)


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
        quantkit=own_version(),
        recipe=private(recipe.resolved()),
        source=place(recipe.model.source),
        folder=place(recipe.folder),
    )


def private(value: Any) -> Any:
    """JSON data with every absolute path in it shortened; what is no path stays as it is."""
    if isinstance(value, Mapping):
        return {key: private(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [private(item) for item in value]
    return place(value) if isinstance(value, str) and Path(value).is_absolute() else value


def place(path: str | Path) -> str:
    """A path relative to the working folder, else to ``~``, else its name alone after ``.../``; relative ones stay."""
    given = Path(path)
    if not given.is_absolute():
        return str(path)
    for root, mark in ((Path.cwd(), ""), (Path.home(), "~/")):
        if given.is_relative_to(root) and root != Path(root.anchor):
            return f"{mark}{given.relative_to(root).as_posix()}"
    return f".../{given.name}"


def without_folders(text: str) -> str:
    """A message without the working folder and the home folder in its paths."""
    for root, mark in ((Path.cwd(), ""), (Path.home(), "~/")):
        if root != Path(root.anchor):
            text = text.replace(f"{root}/", mark)
    return text


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
