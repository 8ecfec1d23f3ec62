"""A check as Markdown, for a pull request or the summary of a job: the verdict first, short, without pictures."""

from __future__ import annotations

import re

from markupsafe import Markup

from quantkit.regression.document import Check
from quantkit.regression.pages.html import engine
from quantkit.regression.pages.trend import blocks
from quantkit.regression.pages.view import context
from quantkit.regression.pages.words import figure
from quantkit.report.markdown import code, escaped, row

SIGNS = {"passed": "✅", "regressed": "❌", "unknown": "⚠️"}
RUNS_IN_A_LINE = 12


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
