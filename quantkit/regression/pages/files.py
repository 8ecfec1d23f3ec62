"""The files of a check beside ``check.json``, and the summary of a GitHub job."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.regression.document import Check
from quantkit.regression.pages.html import render_html
from quantkit.regression.pages.junit import render_junit
from quantkit.regression.pages.markdown import render_markdown
from quantkit.system.artifacts import translated_os_errors, write_text

HTML, MARKDOWN, JUNIT = "check.html", "check.md", "check.junit.xml"
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file that a step's summary is appended to."""


def write_pages(check: Check, folder: Path) -> list[Path]:
    """Write a check as HTML, Markdown and JUnit XML; whole or not at all, each.

    Returns:
        The files, the HTML page first.

    Raises:
        OutputError: the folder cannot be written.
    """
    files = {HTML: render_html(check), MARKDOWN: render_markdown(check), JUNIT: render_junit(check)}
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def append_step_summary(check: Check) -> Path | None:
    """Append the check to the summary of the GitHub job that it runs in; None where it does not run in one.

    Raises:
        OutputError: the file cannot be written.
    """
    named = os.environ.get(STEP_SUMMARY)
    if not named:
        return None
    file = Path(named)
    with translated_os_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(render_markdown(check))
    return file
