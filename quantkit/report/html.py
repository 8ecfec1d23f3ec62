"""The report as one HTML file that asks nothing of the network: no scripts, no fonts, no images from outside."""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup

from quantkit.report.columns import Record
from quantkit.report.page import context, environment, template_text
from quantkit.report.plot import build_plot


def render_html(report: Record) -> str:
    """The report as a page.

    All text of the report is escaped. The page's own content security policy allows nothing but its one
    style sheet, by hash.
    """
    engine = environment(autoescape=True)
    style = "\n" + template_text(engine, "page.css") + template_text(engine, "plot.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return engine.get_template("report.html.j2").render(
        context(report, build_plot(report)), style=Markup(style), style_hash=Markup(f"sha256-{digest}")
    )
