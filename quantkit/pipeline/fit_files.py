"""The folder of a fit: the data in two parts, the file to ship with its report, and the recipe for next week.

DIR/model             the checkpoint that was chosen
DIR/report.html       what it was chosen by; also report.md and report.json
DIR/recipe.yaml       the recipe of the file, for `quantkit check`
DIR/data              the records, those to calibrate on and those that are held out
DIR/history.sqlite    the run, which later checks are compared with
DIR/run               where the candidates are made; gone at the end
DIR/check             where checks work, once there are some
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit import records, report
from quantkit.merging import merged_source
from quantkit.publishing import CARD, CardFacts, card
from quantkit.recipe import CalibrationSpec, Recipe, ReportSpec
from quantkit.recipe.fitting import RUN
from quantkit.records.splitting import split, write_records
from quantkit.system.artifacts import new_folder, read_stage, write_stage, write_text
from quantkit.system.progress import Silent

MODEL, DATA = "model", "data"
RECIPE = "recipe.yaml"
CALIBRATION, HELD_OUT = "calibration.jsonl", "held-out.jsonl"
SPLIT_STAGE = "split"
SPLIT_VERSION = 1
"""Part of the fingerprint: raised when the same data would be split otherwise."""


def split_data(spec: CalibrationSpec, folder: Path) -> tuple[Path, Path]:
    """The records to calibrate on and those to score on, each as a file in ``folder``, written once for one content.

    Raises:
        CalibrationError: the data set cannot be read, or is a single record.
        OutputError: the folder cannot be written.
    """
    identity = records.identify(spec.dataset, spec.columns)
    made_from = {"code": SPLIT_VERSION, "dataset": identity, "tags": dict(spec.tags)}
    files = folder / CALIBRATION, folder / HELD_OUT
    if read_stage(folder, SPLIT_STAGE, made_from) is None or not all(file.is_file() for file in files):
        parts = split(records.load(spec.dataset, spec.columns, spec.tags))
        with new_folder(folder) as place:
            for file, part in zip(files, parts, strict=True):
                write_records(place / file.name, part)
            write_stage(place, SPLIT_STAGE, made_from)
    return files


def ship(recipe: Recipe, content: Mapping[str, Any], chosen: Mapping[str, Any], out: Path) -> None:
    """Put the checkpoint that was chosen, with its card, and the report into the folder of a fit.

    Args:
        recipe: that ran.
        content: of its report.
        chosen: the row of the variant.
        out: the folder.
    """
    source, place = Path(chosen["checkpoint"]), out / MODEL
    facts = _card_facts(recipe, content, chosen, out)
    with new_folder(place, guests=True) as folder:
        for file in sorted(source.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(file, target)
        write_text(folder / CARD, card(folder, facts))
    rows = [{**row, "checkpoint": str(place)} if row is chosen else row for row in content["variants"]]
    report.write({**content, "variants": rows}, out, ReportSpec().formats)


def clear_run(out: Path) -> None:
    """Remove the folder in which the candidates were made, so that no half of it stays under its name."""
    doomed = out / f".{RUN}.partial"
    shutil.rmtree(doomed, ignore_errors=True)
    if (out / RUN).exists():
        os.rename(out / RUN, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _card_facts(recipe: Recipe, content: Mapping[str, Any], chosen: Mapping[str, Any], out: Path) -> CardFacts:
    model = merged_source(recipe.model, recipe.merge, recipe.folder, Silent())
    return CardFacts(
        base_model=model.reference if model.kind == "hub" else None,
        revision=model.revision if model.kind == "hub" else None,
        source=model.folder,
        repository=out.resolve().name,
        scores=chosen,
        baseline=content["baseline"],
        calibration=content["calibration"],
    )


def _link(source: Path, target: Path) -> None:
    """The same file in another place, which takes no room where the file system has links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
