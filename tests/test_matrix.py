"""The matrix says what is so: every cell that can be done here is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantkit.runtimes import RUNTIMES
from quantkit.verification.matrix import matrix_markdown, matrix_table, read_matrix, reasons_markdown
from quantkit.verification.matrix.build import RUNTIMES_HERE, build
from quantkit.verification.matrix.rows import method_names, rows
from quantkit.verification.matrix.table import FAILS, UNTRIED, WORKS
from tests.matrix_file import PAGE, small_job


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("matrix")
    found = build(small_job(folder), rows(), folder / "out", RUNTIMES_HERE)
    return {(row["format"], row["name"]): row for row, _ in found}


def test_every_cell_is_as_it_is_when_it_is_done_again(done: dict[tuple[str, str], dict[str, Any]]) -> None:
    told = {(row["format"], row["name"]): row for row in read_matrix()["rows"]}
    assert list(told) == list(done), "run make matrix"
    for place, row in done.items():
        assert told[place]["methods"] == row["methods"], place
        for name in set(RUNTIMES_HERE) & set(row["runtimes"]):
            cell = row["runtimes"][name]
            assert told[place]["runtimes"][name]["state"] == cell["state"], (place, name, cell)


def test_every_format_method_and_runtime_has_its_place() -> None:
    found = read_matrix()
    assert found["methods"] == method_names()
    assert found["runtimes"] == [runtime.name for runtime in RUNTIMES]
    for row in found["rows"]:
        assert row["methods"], row["name"]
        assert row["runtimes"]["reference"]["state"] == WORKS
        for cell in row["runtimes"].values():
            assert cell["state"] in (WORKS, FAILS, UNTRIED)
            assert ("reason" in cell) == (cell["state"] == FAILS)


def test_the_table_has_a_row_for_each_and_a_word_for_each_state() -> None:
    found = read_matrix()
    console = Console(width=240, record=True)
    console.print(matrix_table(found))
    text = console.export_text()
    page = matrix_markdown(found)
    for row in found["rows"]:
        assert row["name"] in text
        assert f"| {row['format']} | {row['name']} |" in page
    assert page.count("\n") == len(found["rows"]) + 1


def test_the_page_on_formats_shows_the_matrix() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert matrix_markdown(read_matrix()) in page
    assert reasons_markdown(read_matrix()) in page


def test_a_broken_cell_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that decodes to other values than its runtime must not pass."""
    from quantkit.formats.gguf import Gguf

    unpack = Gguf.unpack

    def shifted(self: Gguf, *given: Any) -> Any:
        weight = unpack(self, *given)
        return type(weight)(weight.scheme, weight.codes, weight.scales * 1.3, weight.zeros, weight.parts)

    wanted = [row for row in rows() if row.format == "gguf"][:1]
    monkeypatch.setattr("quantkit.verification.matrix.rows.COMPOSED", ())
    found = build(small_job(tmp_path), wanted, tmp_path / "out", RUNTIMES_HERE)
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.verification.matrix.build._logits", _after_export(patch, Gguf, shifted))
        ((row, _),) = found
    assert row["runtimes"]["llama.cpp"]["state"] == FAILS
    assert "KL" in row["runtimes"]["llama.cpp"]["reason"]


def _after_export(patch: pytest.MonkeyPatch, cls: type, changed: Any) -> Any:
    from quantkit.verification.matrix import build as module

    logits = module._logits

    def broken(*given: Any) -> Any:
        patch.setattr(cls, "unpack", changed)
        return logits(*given)

    return broken
