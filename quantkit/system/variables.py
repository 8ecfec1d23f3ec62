"""Variables of the environment in a recipe's values: ``${NAME}`` and ``${NAME:-default}``; ``$${`` is a plain ``${``.

What a recipe says is recorded, in reports, histories and model cards. So a secret does not go through a variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantkit.errors import RecipeError
from quantkit.system.redaction import redacted

_REFERENCE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?:(:?-)((?:[^{}])*))?\}|(\$\{)")
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY)(_|$)|(API|ACCESS|PRIVATE|SECRET|SIGNING)_KEY"
)
REMEDY = "write ${NAME} or ${NAME:-default}, and $${ for a plain ${"


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text with what its variables stand for.

    Raises:
        RecipeError: a variable is not set and has no default, or what it holds is a secret.
    """

    def value(found: re.Match[str]) -> str:
        escaped, name, joint, default, broken = found.groups()
        if escaped:
            return str(escaped)
        if broken:
            raise RecipeError(f"'{text}' has a variable that cannot be read", REMEDY)
        there = variables.get(name)
        if there is None or (joint == ":-" and not there):
            if joint is None:
                raise RecipeError(f"the variable {name} is not set", f"set it, or write ${{{name}:-default}}")
            return str(default)
        if _SECRET.search(name.upper()) or redacted(there) != there:
            raise RecipeError(
                f"the variable {name} holds a secret, and what a recipe says is recorded",
                "leave it out: tokens are read from the environment where they are needed, such as HF_TOKEN",
            )
        return there

    return _REFERENCE.sub(value, text)


def escaped(text: str) -> str:
    """A text in which nothing is a variable to :func:`expanded`."""
    return text.replace("${", "$${")
