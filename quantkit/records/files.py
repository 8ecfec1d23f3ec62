"""Data sets from files: JSON, JSON lines, tables and plain text; and from folders of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.records.dataset import Broken, Layout, RecordSet, collect
from quantkit.records.folders import files_of
from quantkit.records.formats import parse
from quantkit.records.record import UnusableError
from quantkit.system.artifacts import file_sha256

BROKEN_LINE = "not valid JSON"
_SPACE = re.compile(r"\s*")
DELIMITERS = ",\t;|"
LONGEST_FIELD = (1 << 31) - 1
COMPRESSED = ".gz"


def read_file(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    base: Path | None = None,
) -> RecordSet:
    """Read a data set from a file, by its suffix, or from a folder that holds one.

    ``.json`` is a list of objects, an object that holds one, or objects one after another; ``.jsonl`` an object a line,
    blank lines aside; ``.parquet``, ``.arrow``, ``.csv`` and ``.tsv`` a row a record; ``.txt`` one plain text, whole.
    Text files may be compressed (``.jsonl.gz``). Of a folder see :func:`quantkit.records.folders.files_of`.

    Args:
        path: the file or folder.
        columns: of a layout with nothing else.
        layout: see :func:`quantkit.records.dataset.collect`.
        base: the folder in which paths of images start; by default that of the file.

    Raises:
        CalibrationError: the file is missing, of another suffix, broken, or has no usable record.
    """
    path = Path(path)
    layout = layout or Layout(columns)
    files = _files(path)
    readers = [_reader(file) for file in files]
    origin = identify_file(path, columns=layout.columns)
    try:
        rows = (row for file, reader in zip(files, readers, strict=True) for row in reader(file))
        records, skipped = collect(str(path), rows, layout, base or files[0].parent)
    except OSError as error:
        raise _unreadable(path, error) from error
    if identify_file(path, columns=layout.columns) != origin:
        raise CalibrationError(f"{path} changed while it was read", "run the same command when nobody writes to it")
    return RecordSet(_stem(path), origin, origin["sha256"], records, skipped)


def identify_file(path: Path, *, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The origin of a data set in a file: its name without folders, and its content's SHA-256.

    Of a folder it is the SHA-256 of a line for each file, ``SHA-256  NAME``, as ``sha256sum`` writes them.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CalibrationError(f"{path} is not a plain file", "give a file of records")
    try:
        if path.is_dir():
            lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in _files(path))
            sha256 = hashlib.sha256(lines.encode()).hexdigest()
        else:
            sha256 = file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    renamed = {"columns": dict(columns)} if columns else {}
    return {"kind": "file", "file": path.name, "sha256": sha256, **renamed}


def _files(path: Path) -> list[Path]:
    """The file, or those of the data set that a folder holds."""
    try:
        return files_of(path, READERS) if path.is_dir() else [path]
    except OSError as error:
        raise _unreadable(path, error) from error


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == COMPRESSED else path.stem


def _reader(path: Path) -> Callable[[Path], list[Any]]:
    suffix = Path(path.stem).suffix if path.suffix.lower() == COMPRESSED else path.suffix
    reader = READERS.get(suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"{path} has the suffix '{path.suffix}', which is no data set's", f"known: {', '.join(sorted(READERS))}"
        )
    return reader


def _json(path: Path) -> list[Any]:
    text = _decoded(path)
    if text.lstrip()[:1] == "{":
        rows = _objects(text)
        if len(rows) > 1:
            return rows
    content = _parsed(path, text)
    found_rows = _rows_of(content)
    if found_rows is None:
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else "a single value"
        raise CalibrationError(f"{path} holds {found}", 'write a list of objects, or {"data": [...]}')
    return found_rows


def _rows_of(content: Any) -> list[Any] | None:
    """The rows in a JSON value: itself, or in an object its columns, the object where it is a row, or its only list."""
    if isinstance(content, list):
        return [content] if content and all(_is_bare_turn(row) for row in content) else content
    if not isinstance(content, dict):
        return None
    columns = _columns_of(content)
    if columns is not None:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    try:
        parse(content)
    except UnusableError:
        pass  # it is no row, and may hold some
    else:
        return [content]
    if isinstance(content.get("data"), list):
        return list(content["data"])
    lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) == 1 and lists[0] and all(isinstance(row, dict) for row in lists[0]):
        return [row["row"] if isinstance(row.get("row"), dict) else row for row in lists[0]]
    return None


def _is_bare_turn(row: Any) -> bool:
    """Whether a row is a turn of a conversation and nothing else, so that the whole file is one."""
    return isinstance(row, dict) and set(row) in ({"role", "content"}, {"from", "value"})


def _columns_of(content: dict[str, Any]) -> dict[str, list[Any]] | None:
    """Columns of one length, of which one is of texts, as lists or as pandas numbers their rows; None for others."""
    columns = {name: list(each.values()) if isinstance(each, dict) else each for name, each in content.items()}
    if not all(isinstance(each, list) for each in columns.values()) or len({*map(len, columns.values())}) != 1:
        return None
    return columns if any(each and all(isinstance(cell, str) for cell in each) for each in columns.values()) else None


def _objects(text: str) -> list[Any]:
    """Objects that follow one another, white space between them; none where anything else does."""
    decoder, found, place = json.JSONDecoder(), [], 0
    try:
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            found.append(value)
            place = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing as well
    except (ValueError, RecursionError):
        return []
    return found


def _json_lines(path: Path) -> list[Any]:
    """Rows of lines, a broken one being no row; where all are broken, objects that are written over several lines."""
    text = _decoded(path)
    if text.lstrip()[:1] == "[":
        return _json(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = [_line(line) for _, line in lines]
    if rows and all(isinstance(row, Broken) for row in rows):
        found = _objects(text.strip())
        if not found:
            _parsed(path, lines[0][1], lines[0][0])
        return found
    return rows


def _line(line: str) -> Any:
    """The row in a line, or that there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return Broken(BROKEN_LINE)


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


def _table(path: Path) -> list[Any]:
    """Rows of a table whose first line names the columns; what separates them is what occurs most in that line."""
    text = _decoded(path)
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise CalibrationError(f"{path} is not a readable table: {error}", "write it again as CSV") from error
    finally:
        csv.field_size_limit(limit)
    return [{name: value for name, value in row.items() if name is not None} for row in rows]


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {error}", "write it again") from error
    return rows


def _arrow(path: Path) -> list[Any]:
    """Rows of a file of Arrow's, as ``datasets`` writes a stream of them and others a file with its index."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as content:
            begins = content.read(6)
            content.seek(0)
            opened = pyarrow.ipc.open_file if begins == b"ARROW1" else pyarrow.ipc.open_stream
            rows: list[Any] = opened(content).read_all().to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not a readable Arrow file: {error}", "write it again") from error
    return rows


def _text(path: Path) -> list[Any]:
    return [{"text": _decoded(path)}]


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix.lower() == COMPRESSED:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise CalibrationError(f"{path} is not a readable gzip file: {error}", "write it again") from error
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: byte {error.start}", "convert it to UTF-8") from error


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    remedy = "check the path; a hub data set is written hub:org/name"
    return CalibrationError(f"cannot read {path}: {error.strerror or error}", remedy)


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _text,
    ".md": _text,
}
"""By the suffix of a file."""
