"""What there is to know of each library before it is used."""

from __future__ import annotations

from quantkit.errors import QuantkitError
from quantkit.isolation.environments import environment_of
from quantkit.isolation.lockfile import read_lock
from quantkit.libraries import Library
from quantkit.libraries.base import CODES, Offer


def library_facts(library: type[Library]) -> dict[str, str]:
    """What it stands on, and the state of its environment."""
    return {"package": _package(library), "environment": _state(library)}


def offer_facts(offer: Offer) -> str:
    """A method in a line: bits, grids, the format that it writes, devices."""
    if offer.scores_only:
        return f"does not quantize here: {offer.scores_only}"
    choices = {
        "symmetric": offer.symmetric == (True,),
        "asymmetric": offer.symmetric == (False,),
        "symmetric or not": len(offer.symmetric) > 1,
    }
    parts = [
        f"{'/'.join(map(str, sorted(offer.bits)))} bits",
        "grouped" if offer.grouped else "",
        next(words for words, holds in choices.items() if holds),
        "calibrated" if offer.calibrated else "no data",
        "any format that stores its grid" if offer.writes == CODES else f"format {offer.writes}",
        f"on {' and '.join(offer.devices)}",
    ]
    return ", ".join(part for part in parts if part)


def _package(library: type[Library]) -> str:
    try:
        return f"{library.distribution} {read_lock(library).packages.get(library.distribution, '')}".strip()
    except QuantkitError:
        return library.distribution


def _state(library: type[Library]) -> str:
    try:
        lock, found = read_lock(library), environment_of(library)
    except QuantkitError:
        return "none of its own: env: current"
    how = f"quantkit env install {library.name}: {lock.describe()}"
    states = {
        "ready": "ready",
        "absent": f"absent ({how})",
        "outdated": f"outdated: its lock has changed ({how})",
        "broken": f"broken: {found.why} ({how})",
    }
    return states[found.state]
