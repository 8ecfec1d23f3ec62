"""The page of environment variables names those of the code, and no others."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "variables.md").read_text(encoding="utf-8")
OURS = re.compile(r"\bQUANTKIT_[A-Z][A-Z_]*[A-Z]\b")
READ = re.compile(r"""environ(?:\.get\(|\[)["']([A-Z_]+)["']""")
NAMED_BY_THE_USER = {"QUANTKIT_WEBHOOK", "QUANTKIT_WEBHOOK_SECRET"}
"""Names in examples of recipes."""


def texts(*folders: str) -> str:
    """All that runs: modules, and what describes containers, actions and builds."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".yml", ".sh"}]
    files += [path for path in (ROOT / "Makefile", ROOT / "Dockerfile", *ROOT.glob("*.yml")) if path.is_file()]
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))


def test_every_variable_of_the_code_is_on_the_page_and_no_other() -> None:
    used = set(OURS.findall(texts("quantkit", "tests", "benchmarks", "docs", ".github"))) - NAMED_BY_THE_USER
    assert set(OURS.findall(PAGE)) == used


def test_every_variable_of_others_that_the_package_reads_is_on_the_page() -> None:
    read = set(READ.findall(texts("quantkit")))
    assert read
    assert {name for name in read if f"`{name}`" not in PAGE} == set()
