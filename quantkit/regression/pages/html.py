"""A check as one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib

import jinja2
from markupsafe import Markup

from quantkit.regression.document import Check
from quantkit.regression.pages.view import context
from quantkit.report.page import environment, template_text

STYLE_SHEETS = ("page.css", "plot.css", "check.css")


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
