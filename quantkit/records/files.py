"""Data sets from files: JSON, JSON lines, Parquet and plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.records.dataset import Convert, RecordSet, collect
from quantkit.system.artifacts import file_sha256


def read_file(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    convert: Convert | None = None,
    base: Path | None = None,
) -> RecordSet:
    """Read a data set from a file, by its suffix.

    ``.json`` is a list of objects or ``{"data": [...]}``; ``.jsonl`` an object a line, blank lines aside;
    ``.parquet`` a row a record; ``.txt`` one plain text, whole.

    Args:
        path: the file.
        columns: see :func:`quantkit.records.formats.parse`.
        convert: see :func:`quantkit.records.dataset.collect`.
        base: the folder in which paths of images start; by default that of the file.

    Raises:
        CalibrationError: the file is missing, of another suffix, broken, or has no usable record.
    """
    path = Path(path)
    rows = _reader(path)
    origin = identify_file(path, columns=columns)
    try:
        records, skipped = collect(str(path), rows(path), columns, convert, base or path.parent)
    except OSError as error:
        raise _unreadable(path, error) from error
    if identify_file(path, columns=columns) != origin:
        raise CalibrationError(f"{path} changed while it was read", "run the same command when nobody writes to it")
    return RecordSet(path.stem, origin, origin["sha256"], records, skipped)


def identify_file(path: Path, *, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The origin of a data set in a file: its name without folders, and its content's SHA-256.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise CalibrationError(f"{path} is not a plain file", "give a file of records")
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    renamed = {"columns": dict(columns)} if columns else {}
    return {"kind": "file", "file": path.name, "sha256": sha256, **renamed}


def _reader(path: Path) -> Callable[[Path], list[Any]]:
    readers = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"{path} has the suffix '{path.suffix}', which is no data set's", f"known: {', '.join(sorted(readers))}"
        )
    return reader


def _json(path: Path) -> list[Any]:
    content = _parsed(path, _decoded(path))
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else "a single value"
        raise CalibrationError(f"{path} holds {found}", 'write a list of objects, or {"data": [...]}')
    return content


def _json_lines(path: Path) -> list[Any]:
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [_parsed(path, line, number) for number, line in lines if line.strip()]


def _parsed(path: Path, text: str, line: int | None = None) -> Any:
    remedy = (
        "one JSON object a line"
        if line
        else "write a list of JSON objects; a file of one object a line is named .jsonl"
    )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno}"
        raise CalibrationError(f"{path} is not valid JSON at {where}: {error.msg}", remedy) from error
    except (RecursionError, ValueError) as error:
        where = f" at line {line}" if line else ""
        raise CalibrationError(f"{path} cannot be read as JSON{where}: {error}", remedy) from error


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {error}", "write it again") from error
    return rows


def _text(path: Path) -> list[Any]:
    return [{"text": _decoded(path)}]


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: byte {error.start}", "convert it to UTF-8") from error


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    remedy = "check the path; a hub data set is written hub:org/name"
    return CalibrationError(f"cannot read {path}: {error.strerror or error}", remedy)
