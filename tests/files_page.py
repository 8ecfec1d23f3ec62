"""Writes docs/files.md anew: ``python -m tests.files_page``. A file's line is the first of its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "files.md"
PACKAGE = ROOT / "quantkit"
DATA = {
    "eval_data": "prose and answers that every report is scored on",
    "regression/pages/templates": "the pages of a check",
    "report/templates": "the pages of a report",
    "estimation/configs": "configurations of well-known models",
}
"""Folders without code, and what lies in them."""
HEAD = """# The files

The flow can be read from the list. A line is the first of the file's docstring; a folder's own line stands for its
`__init__.py` too. `python -m tests.files_page` writes this page.

```text
"""


def page() -> str:
    """The text of the page."""
    return HEAD + "".join(f"{line}\n" for line in _folder(PACKAGE, 0)) + "```\n"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    indent, inside = "    " * depth, "    " * (depth + 1)
    yield _line(f"{indent}{folder.name}/", _about(folder / "__init__.py"))
    for path in sorted(folder.iterdir(), key=lambda each: (each.is_dir(), each.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield _line(f"{inside}{path.name}", _about(path))
        elif path.is_dir() and (path / "__init__.py").is_file():
            yield from _folder(path, depth + 1)
        elif (about := DATA.get(path.relative_to(PACKAGE).as_posix())) is not None:
            yield _line(f"{inside}{path.name}/", about)


def _about(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split()).rstrip(".").replace("``", "`")


def _line(name: str, about: str) -> str:
    return f"{name:<40} {about}".rstrip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
