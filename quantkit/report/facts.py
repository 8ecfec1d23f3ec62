"""Facts: pairs of a label and its words, without those that say nothing."""

from __future__ import annotations

import json
from typing import Any

from quantkit.report.numbers import ABSENT

Facts = list[tuple[str, str]]


def present(*facts: tuple[str, str]) -> Facts:
    """The facts that say something."""
    return [(label, value) for label, value in facts if value not in (ABSENT, "")]


def words(value: Any) -> str:
    """``value`` as it is shown: text as it stands, anything else as JSON."""
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
