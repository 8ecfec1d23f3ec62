"""What transformers says of a model that it cannot build, in one line, with the way out."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import NamedTuple

LONGEST = 300
"""Characters of a message that are shown."""
UNKNOWN_TYPE = re.compile(r"model type `([^`]+)` but Transformers does not recognize")
NEEDED = re.compile(r"requires the (\S+) library")
OWN_CODE = "trust_remote_code"
CHECK_CONFIG = "check model_type and the values of config.json"


class Said(NamedTuple):
    """A problem and its remedy."""

    problem: str
    remedy: str


def said_by_transformers(error: BaseException) -> Said:
    """What an error of transformers comes to, without its lists of all that it knows and its advice for others."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    unknown = UNKNOWN_TYPE.search(text)
    if unknown is not None:
        problem = f"the installed transformers {version('transformers')} knows no model_type '{unknown[1]}'"
        return Said(problem, "install a newer one if that does; quantkit builds models by its classes")
    if OWN_CODE in text:
        return Said(
            "its code comes with it",
            "read it, and set model.trust_remote_code: true (--trust-remote-code) if you trust it",
        )
    packages = list(dict.fromkeys(NEEDED.findall(text)))
    if packages or isinstance(error, ImportError):
        needed = ", ".join(packages) or _short(text)
        return Said(f"it needs packages that are not installed: {needed}", "install them beside quantkit")
    return Said(_short(text), CHECK_CONFIG)


def _short(text: str) -> str:
    """The first sentence, and no list of classes after it."""
    first = re.split(r"(?<=[a-z`'\"\])])\. (?=[A-Z])|\. ?Model type should be|Should contain one of", text)[0].strip()
    return first if len(first) <= LONGEST else f"{first[:LONGEST].rstrip()} ..."
