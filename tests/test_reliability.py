"""Every fault that the documentation lists has the test that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| [^|]+ \| `(?P<file>tests/\w+\.py)::(?P<test>\w+)` \|$", re.MULTILINE)


def test_every_row_of_the_fault_table_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = list(ROW.finditer(text))
    assert len(rows) == sum(line.startswith("| ") and "::" in line for line in text.splitlines())
    assert len(rows) >= 25
    for row in rows:
        tree = ast.parse((ROOT / row["file"]).read_text(encoding="utf-8"))
        assert row["test"] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row["fault"]
