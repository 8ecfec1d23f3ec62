"""``check.json``, written and read again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.errors import QuantkitError
from quantkit.regression.document import SCHEMA, Check
from quantkit.system.artifacts import write_json

CHECK_FILE = "check.json"


def to_json(check: Check) -> dict[str, Any]:
    """A check as JSON data; a figure that is not finite is null."""
    data: dict[str, Any] = _finite(asdict(check))
    return data


def write_check(check: Check, folder: Path) -> Path:
    """Write ``check.json`` into a folder and return its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    file = folder / CHECK_FILE
    write_json(file, to_json(check))
    return file


def read_check(path: Path) -> Check:
    """Read a check again.

    Args:
        path: a ``check.json``, or the folder that holds one.

    Raises:
        QuantkitError: there is none, it is not one, or a newer quantkit wrote it.
    """
    file = path / CHECK_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantkitError(f"cannot read {file}: {error.strerror}", "name a folder with a check.json") from error
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{file} is not the result of a check: not JSON", "name a check.json") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise QuantkitError(
            f"{file} has schema {schema}, and this quantkit reads up to {SCHEMA}", "pip install --upgrade quantkit"
        )
    try:
        return TypeAdapter(Check).validate_python(content)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its content"
        raise QuantkitError(f"{file} is not the result of a check: {place} is wrong", "run the check again") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
