"""Templates of tasks in place of lm-evaluation-harness's own, which run in this process and without a sandbox.

Each text is made by the process of :mod:`quantkit.records.sandbox`, which is ended where a template does not end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.records.sandbox import TemplateFailure, render_task


@dataclass(frozen=True, slots=True)
class Template:
    """A template as the package asks for one.

    Attributes:
        source: of Jinja.
    """

    source: str

    def render(self, /, **document: Any) -> str:
        """The text of a document.

        Raises:
            jinja2.TemplateError: the template is broken, does what it may not, or does not end.
        """
        import jinja2

        try:
            return render_task(self.source, document)
        except TemplateFailure as error:
            raise jinja2.TemplateError(str(error)) from error


class Templates:
    """What stands in for ``lm_eval.utils.env``."""

    def from_string(self, source: str) -> Template:
        """A template; it is first read when it is rendered."""
        return Template(source)
