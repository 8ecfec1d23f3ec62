"""The section ``webhook``: who else is told how a check ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantkit.recipe.fields import Section

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class WebhookSpec(Section):
    """One JSON POST after a check.

    Attributes:
        url_env: environment variable that holds the address, HTTPS or loopback. Recipes are committed, and whoever
            knows the address of a webhook can post to it.
        secret_env: environment variable of a secret with which the body is signed; none if not given.
        on: after every check, or after those alone that did not pass.
    """

    url_env: Variable
    secret_env: Variable | None = None
    on: Literal["always", "failure"] = "failure"
