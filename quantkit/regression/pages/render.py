"""A check as HTML, Markdown and JUnit XML, and where these files are written.

The HTML page asks nothing of the network. The Markdown is for a pull request or the summary of a job: the verdict
first, short, without pictures. The XML is what build servers read, in the shape of Jenkins' xUnit plugin
(``junit-10.xsd``): one test case for each gate on each variant, an ``error`` for what cannot be told, and a ``failure``
for a regression, so that both fail a build.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jinja2
from markupsafe import Markup

from quantkit.gates.results import GateResult
from quantkit.regression.document import Check
from quantkit.regression.pages.trend import blocks
from quantkit.regression.pages.view import context
from quantkit.regression.pages.words import VERDICTS, figure
from quantkit.report.markdown import code, escaped, row
from quantkit.report.page import environment, template_text
from quantkit.system.artifacts import translated_os_errors, write_text

HTML, MARKDOWN, JUNIT = "check.html", "check.md", "check.junit.xml"
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file that a step's summary is appended to."""
STYLE_SHEETS = ("page.css", "plot.css", "check.css")
SIGNS = {"passed": "✅", "regressed": "❌", "unknown": "⚠️"}
RUNS_IN_A_LINE = 12
_BELOW_SPACE = "\t\n\r"


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


def engine(*, autoescape: bool) -> jinja2.Environment:
    """The engine for the templates of this package and for the style sheets of reports."""
    found = environment(autoescape=autoescape)
    found.loader = jinja2.ChoiceLoader(
        [jinja2.PackageLoader("quantkit.regression.pages"), jinja2.PackageLoader("quantkit.report")]
    )
    return found


def render_html(check: Check) -> str:
    """The page; all text is escaped, and its content security policy allows nothing but its one style sheet."""
    templates = engine(autoescape=True)
    style = "\n" + "".join(template_text(templates, name) for name in STYLE_SHEETS)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return templates.get_template("check.html.j2").render(
        context(check), style=Markup(style), style_hash=Markup(f"sha256-{digest}")
    )


def render_markdown(check: Check) -> str:
    """The check as GitHub-flavoured Markdown."""
    templates = engine(autoescape=False)
    templates.finalize = escaped
    templates.filters["code"] = code
    templates.filters["row"] = row
    text = templates.get_template("check.md.j2").render(
        context(check), signs={key: Markup(sign) for key, sign in SIGNS.items()}, lines=trend_lines(check)
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def trend_lines(check: Check) -> list[list[str]]:
    """Of each figure that a gate is about: what it is, a line of blocks over the last runs, and the newest figure."""
    gated = {(gate.variant, gate.metric) for gate in check.gates}
    return [
        [
            f"{trend.variant}: {trend.metric}" + (f" on {trend.text}" if trend.text else ""),
            blocks(trend)[-RUNS_IN_A_LINE:],
            figure(trend.points[-1].value, trend.unit),
        ]
        for trend in check.trends
        if (trend.variant, trend.metric) in gated and sum(point.comparable for point in trend.points) > 1
    ]


def render_junit(check: Check) -> str:
    """The check as XML."""
    failures = sum(gate.outcome == "regressed" for gate in check.gates)
    errors = sum(gate.outcome == "unknown" for gate in check.gates)
    broken = [variant for variant in check.variants if variant.status != "ok"]
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", timestamp=check.started[:19])
    for element, name in ((root, "quantkit check"), (suite, check.name)):
        element.set("name", _plain(name))
        element.set("time", f"{check.seconds:.3f}")
        element.set("tests", str(len(check.gates) + len(broken)))
        element.set("failures", str(failures))
        element.set("errors", str(errors + len(broken)))
    for gate in check.gates:
        _add_gate(suite, check, gate)
    for variant in broken:
        case = ET.SubElement(
            suite, "testcase", classname=_plain(f"{check.name}.{variant.name}"), name="made and scored"
        )
        ET.SubElement(case, "error", message=_plain(variant.error or "failed"), type="failed")
    ET.SubElement(suite, "system-out").text = _plain(check.summary)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_gate(suite: ET.Element, check: Check, gate: GateResult) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=_plain(f"{check.name}.{gate.variant}"), name=_plain(gate.gate), time="0"
    )
    if gate.outcome != "passed":
        kind = "failure" if gate.outcome == "regressed" else "error"
        found = ET.SubElement(case, kind, message=_plain(gate.reason), type=VERDICTS[gate.outcome])
        found.text = "\n".join(_plain(each.reason) for each in gate.comparisons if each.reason)


def _plain(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold."""
    return "".join(each if each >= " " or each in _BELOW_SPACE else "\N{REPLACEMENT CHARACTER}" for each in text)
