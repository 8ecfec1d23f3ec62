"""The page of several runs: how each ended, what to take of it, and the way to its report."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantkit.errors import OutputError
from quantkit.report.columns import Record
from quantkit.report.losses import loss
from quantkit.report.numbers import ABSENT, duration, figure, fixed, in_bytes
from quantkit.report.page import environment, template_text
from quantkit.report.recommendation import recommend
from quantkit.system.artifacts import mapping_or_nothing, translated_os_errors, write_json, write_text

SCHEMA = 1
SUMMARY = ".json"
"""Beside the page, with its name: the same as data."""


def run_entry(name: str, folder: Path, seconds: float, content: Record | None, error: str | None) -> dict[str, Any]:
    """What the page says of one run.

    Args:
        name: of the run.
        folder: of its report.
        seconds: that it took.
        content: of its ``report.json``; None where nothing could run.
        error: why, then.

    Returns:
        ``name``, ``folder``, ``seconds``, ``status`` (``ok``, ``failed``, or ``error`` where nothing could run),
        ``error``, ``variants`` and ``gates_missed``, and of a run with a report ``title``, ``model``, ``report`` and
        ``recommended``, which else are None.
    """
    told: dict[str, Any] = {"name": name, "folder": str(folder), "seconds": round(seconds, 3), "error": error}
    if content is None:
        nothing = dict.fromkeys(("title", "model", "report", "recommended"))
        return {**told, **nothing, "status": "error", "variants": [], "gates_missed": []}
    page = "report.html" if (folder / "report.html").is_file() else "report.json"
    return {
        **told,
        "status": content["status"],
        "title": content.get("title"),
        "model": (content.get("source") or {}).get("reference"),
        "report": str(folder / page),
        "recommended": recommend(content).to_json(),
        "gates_missed": [f"{gate['variant']}: {gate['gate']}" for gate in content["gates"] if not gate["passed"]],
        "variants": [_variant(content, row) for row in content["variants"]],
    }


def _variant(content: Record, row: Record) -> dict[str, Any]:
    lost = loss(content, row)
    return {
        "name": row["name"],
        "status": row["status"],
        "error": row.get("error"),
        "method": row.get("method"),
        "format": row.get("format"),
        "size_bytes": figure(row, "size_bytes"),
        "bits_per_weight": figure(row, "bits_per_weight"),
        "loss": None if lost is None else {"value": lost.value, "text": lost.text, "words": lost.words},
    }


def check_page(page: Path) -> None:
    """Find out before any work whether the page can be written, and leave what is there as it is.

    Raises:
        OutputError: it cannot, or what lies there is no page of several runs.
    """
    summary = page.with_suffix(SUMMARY)
    ours = {"schema", "status", "runs"} <= mapping_or_nothing(summary).keys()
    if not ours and (page.exists() or summary.exists()):
        there = page if page.exists() else summary
        raise OutputError(f"{there} exists and is no page of several runs", "name another one with --page")
    with translated_os_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=page.parent):
            return


def write_runs(entries: Sequence[Mapping[str, Any]], page: Path) -> dict[str, Any]:
    """Write the page, and beside it the same as JSON.

    Args:
        entries: of :func:`run_entry`, in the order of the recipes.
        page: a file whose name ends in ``.html``.

    Returns:
        ``schema``, ``status`` (``failed`` if some run is not ``ok``) and ``runs``.

    Raises:
        OutputError: they cannot be written.
    """
    status = "ok" if all(each["status"] == "ok" for each in entries) else "failed"
    found = {"schema": SCHEMA, "status": status, "runs": [dict(each) for each in entries]}
    write_json(page.with_suffix(SUMMARY), found)
    write_text(page, _render(entries, page.parent))
    return found


def _render(entries: Sequence[Mapping[str, Any]], home: Path) -> str:
    engine = environment(autoescape=True)
    style = "\n" + template_text(engine, "page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return engine.get_template("runs.html.j2").render(
        runs=[_shown(each, home) for each in entries],
        bad=sum(each["status"] != "ok" for each in entries),
        style=Markup(style),
        style_hash=Markup(f"sha256-{digest}"),
    )


def _shown(entry: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """An entry in words, with the way to its report from the page."""
    chosen = entry["recommended"] or {}
    failed = sum(row["status"] != "ok" for row in entry["variants"])
    words = {"ok": "complete", "error": "did not run", "failed": "a gate was missed"}[entry["status"]]
    return {
        **entry,
        "words": f"{failed} of {len(entry['variants'])} variants failed" if failed else words,
        "href": os.path.relpath(entry["report"], home).replace(os.sep, "/") if entry["report"] else None,
        "time": duration(entry["seconds"]),
        "take": chosen.get("variant") or ABSENT,
        "figures": chosen.get("figures") or "",
        "rows": [
            {
                "name": row["name"],
                "tags": " · ".join(filter(None, (row["method"], row["format"]))),
                "bits": fixed(row["bits_per_weight"], 2),
                "size": in_bytes(row["size_bytes"]),
                "loss": row["loss"]["words"] if row["loss"] else ABSENT,
                "error": row["error"] if row["status"] != "ok" else None,
            }
            for row in entry["variants"]
        ],
    }
