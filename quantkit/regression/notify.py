"""Notices of how a check ended: a GitHub job's summary, and a webhook.

The webhook is one JSON POST, tried again where that may help. Its address and secret come from the environment, since
both let whoever has them speak in the team's name; neither is written anywhere. With a secret, the header
``X-Quantkit-Signature: sha256=HEX`` carries the HMAC-SHA256 of the body (RFC 2104), as GitHub signs its own webhooks.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from quantkit.errors import QuantkitError, RecipeError
from quantkit.recipe import Recipe, WebhookSpec
from quantkit.regression.document import Check
from quantkit.regression.pages.render import append_step_summary
from quantkit.system.progress import Observer

SIGNATURE = "X-Quantkit-Signature"
TRIES = 4
PAUSE = 1.0
"""Seconds, twice as many for each later try; see urllib3's ``Retry``."""
TIMEOUT = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which another try may do better (RFC 9110, section 15)."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and with which secret."""

    url: str
    secret: str | None = None

    @property
    def shown(self) -> str:
        """The address without what may be secret in it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}"


def tell(recipe: Recipe, check: Check, observer: Observer) -> Check:
    """Tell whom the recipe and the environment name.

    A message that does not arrive changes no verdict: it is a note of the check that is returned.
    """
    notes = [
        note
        for note in (
            _attempted(observer, lambda: append_step_summary(check)),
            _attempted(observer, lambda: _post(recipe, check)),
        )
        if note is not None
    ]
    return replace(check, notes=(*check.notes, *notes)) if notes else check


def _post(recipe: Recipe, check: Check) -> None:
    if recipe.webhook is not None and wanted(recipe.webhook, check):
        post(target(recipe.webhook), payload(check))


def _attempted(observer: Observer, work: Callable[[], object]) -> str | None:
    try:
        work()
    except QuantkitError as error:
        observer.note(f"warning: {error}")
        return str(error)
    return None


def target(spec: WebhookSpec) -> Target:
    """The address and the secret, from the environment.

    Raises:
        RecipeError: a variable is not set, or its address is not one of HTTPS.
    """
    url = _variable(spec.url_env)
    parts = urlsplit(url)
    local = parts.hostname in LOOPBACK
    if parts.hostname is None or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise RecipeError(
            f"the webhook's address in {spec.url_env} is not an HTTPS address", "set it to https://..., or to loopback"
        )
    return Target(url, None if spec.secret_env is None else _variable(spec.secret_env))


def wanted(spec: WebhookSpec, check: Check) -> bool:
    """Whether a check is one to tell of."""
    return spec.on == "always" or check.verdict != "passed"


def payload(check: Check) -> dict[str, Any]:
    """What is posted: the verdict and the gates, without texts and paths."""
    return {
        "schema": 1,
        "event": "quantkit.check",
        "name": check.name,
        "run": check.run,
        "verdict": check.verdict,
        "exit_code": check.exit_code,
        "summary": check.summary,
        "started": check.started,
        "seconds": check.seconds,
        "gates": [
            {"gate": gate.gate, "variant": gate.variant, "outcome": gate.outcome, "reason": gate.reason}
            for gate in check.gates
        ],
    }


def post(to: Target, content: dict[str, Any]) -> None:
    """Post a document; redirects are not followed, since they would carry the signed body elsewhere.

    Raises:
        QuantkitError: it was refused, or could not be delivered in :data:`TRIES` tries.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    body = json.dumps(content, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "quantkit"}
    if to.secret is not None:
        headers[SIGNATURE] = f"sha256={hmac.new(to.secret.encode(), body, hashlib.sha256).hexdigest()}"
    again = Retry(
        TRIES - 1, redirect=0, status_forcelist=PASSING, allowed_methods=["POST"], backoff_factor=PAUSE, backoff_max=60
    )
    with requests.Session() as session:
        session.mount("https://", HTTPAdapter(max_retries=again))
        session.mount("http://", HTTPAdapter(max_retries=again))
        try:
            answer = session.post(to.url, data=body, headers=headers, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:
            # its text may hold the address, and so it is no cause either
            raise _refused(to, type(error).__name__) from None
    if not 200 <= answer.status_code < 300:
        raise _refused(to, f"HTTP {answer.status_code}")


def _refused(to: Target, problem: str) -> QuantkitError:
    return QuantkitError(f"the webhook at {to.shown} was not told: {problem}", "the verdict stands all the same")


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RecipeError(f"the environment variable {name}, which the recipe's webhook needs, is not set", "set it")
    return value
