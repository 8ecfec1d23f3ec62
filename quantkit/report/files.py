"""The files of a report: written whole or not at all, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, RecipeError, did_you_mean
from quantkit.system.artifacts import write_json, write_text
from quantkit.system.distribution import upgrade_line

SCHEMA = 1
FORMATS = ("html", "json", "md")
REPORT_FILE = "report.json"


def write(report: dict[str, Any], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write a report: ``report.json`` always, ``report.md`` with its plot and ``report.html`` if asked for.

    JSON has no infinity and no NaN: such a figure is written as null, and a note of its variant says so.

    Args:
        report: the content of ``report.json``.
        folder: where the files go; it is made if need be.
        formats: some of ``html``, ``md`` and ``json``.

    Returns:
        The files, ``report.json`` first.

    Raises:
        RecipeError: a format is not known.
        OutputError: the folder cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise RecipeError(f"unknown report format '{name}'", did_you_mean(name, FORMATS))
    report = _checked(_without_infinities(report), "the report")
    files: dict[str, str] = {}
    if "md" in formats:
        from quantkit.report.markdown import render_markdown

        files |= render_markdown(report)
    if "html" in formats:
        from quantkit.report.page import render_html

        files["report.html"] = render_html(report)
    write_json(folder / REPORT_FILE, report)
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in (REPORT_FILE, *files)]


def load(path: Path) -> dict[str, Any]:
    """Read a report again.

    Args:
        path: a ``report.json``, or the folder that holds one.

    Raises:
        QuantkitError: there is no report, it is not one, or a newer quantkit wrote it.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantkitError(
            f"cannot read report {file}: {error.strerror}", "name a folder with a report.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{file} is not a quantkit report: not JSON", "name a report.json") from error
    return _checked(content, str(file))


def render_again(path: Path, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write a report of which there is only the JSON, which anything may have written or cut.

    Args:
        path: a ``report.json``, or the folder that holds one.
        folder: where the files go.
        formats: as of :func:`write`.

    Returns:
        The files, ``report.json`` first.

    Raises:
        QuantkitError: as of :func:`load`, or something in it is not what a report has there; nothing is written then.
        OutputError: the folder cannot be written.
    """
    from jinja2 import TemplateError

    content = load(path)
    try:
        return write(content, folder, formats)
    except (
        AttributeError,
        TypeError,
        LookupError,
        ValueError,
        ArithmeticError,
        RecursionError,
        TemplateError,
    ) as error:
        what = str(error).partition("\n")[0][:200]
        raise QuantkitError(
            f"report {path} cannot be rendered: {type(error).__name__}: {what}", "run the recipe again"
        ) from error


def _checked(content: Any, origin: str) -> dict[str, Any]:
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise QuantkitError(f"{origin} is not a quantkit report: it has no 'schema'", "name a report.json")
    if schema > SCHEMA:
        raise QuantkitError(f"{origin} has schema {schema}, and this quantkit reads up to {SCHEMA}", upgrade_line())
    variants, baseline = content.get("variants"), content.get("baseline")
    if baseline is not None and not isinstance(baseline, dict):
        raise QuantkitError(f"{origin} is not a whole report: its baseline is no object", "run the recipe again")
    named = isinstance(variants, list) and all(isinstance(row, dict) and "name" in row for row in variants)
    if "name" not in content or not named:
        raise QuantkitError(f"{origin} is not a whole report: 'name' or 'variants' is missing", "run the recipe again")
    return dict(content)


def _without_infinities(report: dict[str, Any]) -> dict[str, Any]:
    """The report with null for every figure that is not finite, and a note of each such figure of a variant."""
    clean: dict[str, Any] = _clean(report, "", [])
    for index, variant in enumerate(report.get("variants") or []):
        found: list[str] = []
        clean["variants"][index] = _clean(variant, "", found)
        if found:
            notes = clean["variants"][index].get("notes") or []
            clean["variants"][index]["notes"] = [*notes, *(f"{figure}, shown as missing" for figure in found)]
    return clean


def _clean(value: Any, path: str, found: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found.append(f"{path} is {value}")
        return None
    if isinstance(value, dict):
        return {key: _clean(item, f"{path}.{key}" if path else str(key), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, f"{path}[{index}]", found) for index, item in enumerate(value)]
    return value
