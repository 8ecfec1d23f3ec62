"""A verdict in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LONGEST_TEXT = 100


def verdict_lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Whether a runtime passed, how far it was from the reference decoder, what it wrote, and the traps found."""
    state = "passed" if verdict["passed"] else "FAILED"
    yield f"{state}: {verdict['runtime']} in {verdict['dtype']} on {verdict['device']}"
    if verdict["reason"]:
        yield f"    reason     {verdict['reason']}"
    figures, allowed = verdict["figures"], verdict["tolerance"]
    if figures:
        limit = f"{allowed['kl']:.2g} is allowed ({allowed['because']})"
        yield f"    KL         {figures['kl']:.2g} nats from the reference decoder on the worst prompt; {limit}"
        yield f"    top token  the same at {figures['top1']:.1%} of positions; {allowed['top1']:.0%} is asked for"
    if verdict["generated"]:
        yield f"    it wrote   {verdict['generated']!r}"[: LONGEST_TEXT + 15]
    for trap in verdict["traps"]:
        yield f"    trap       {trap['name']}: {trap['found']}"
    if verdict["settings"]:
        yield f"    settings   {', '.join(f'{name}={value}' for name, value in verdict['settings'].items())}"
