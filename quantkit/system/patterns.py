"""Regular expressions that come with a file: matched only if they cannot run for ever.

Python's ``re`` tries every way of matching. A group that is repeated, such as ``(a|b)*``, or many repetitions in one
pattern can take longer than the age of the universe on a name of forty letters. Patterns of names need neither.
"""

from __future__ import annotations

import re

MAX_LENGTH = 1 << 14
MAX_REPEATS = 5
"""``*``, ``+`` and ``{``: a name of ``n`` letters is matched in at most about ``n ** MAX_REPEATS / 120`` steps."""
MAX_OPTIONAL = 16
_ESCAPED = re.compile(r"\\.")
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def why_refused(pattern: str) -> str | None:
    """Why a pattern is not matched; None if it may be.

    Args:
        pattern: of a foreign file.
    """
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern)} characters"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or type(error).__name__
    plain = _CLASS.sub("x", _ESCAPED.sub("x", pattern))
    if _REPEATED_GROUP.search(plain):
        return "it repeats a group, which can take for ever"
    if sum(plain.count(sign) for sign in "*+{") > MAX_REPEATS:
        return f"it has more than {MAX_REPEATS} repetitions, which can take for ever"
    if plain.replace("(?", "").count("?") > MAX_OPTIONAL:
        return f"it has more than {MAX_OPTIONAL} optional parts, which can take for ever"
    return None
