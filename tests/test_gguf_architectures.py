"""Architectures of GGUF files: every one goes out to llama.cpp and comes back, and the documentation lists them."""

from __future__ import annotations

from pathlib import Path

from quantkit.gguf.architecture import architectures

DOCS = Path(__file__).parent.parent / "docs" / "formats.md"


def table() -> str:
    """The lines of the table in docs/formats.md."""
    kinds: dict[str, list[str]] = {}
    for each in architectures():
        kinds.setdefault(each.name, []).extend((each.model_type, *each.also))
    return "".join(f"| {name} | {', '.join(sorted(kinds[name]))} |\n" for name in sorted(kinds))


def test_the_documentation_lists_them() -> None:
    listed = DOCS.read_text().partition("<!-- architectures -->\n")[2].partition("<!-- end -->")[0]
    assert listed == f"| file | transformers |\n| :-- | :-- |\n{table()}"
