"""notebooks/first_report.ipynb, run as a reader runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from quantkit.system.artifacts import read_json

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "first_report.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder it ran in, and the notebook with its outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return folder, notebook


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear its outputs"


def test_it_gives_a_report_in_which_gptq_loses_less(ran: tuple[Path, Any]) -> None:
    report = read_json(ran[0] / "reports" / "first" / "report.json")
    assert report["status"] == "ok"
    lost = [variant["metrics"]["kl_divergence"]["toy-data"]["mean"] for variant in report["variants"]]
    assert 0 < lost[1] < lost[0]
    assert (ran[0] / "reports" / "first" / "report.html").is_file()


def test_it_shows_the_figures_and_the_picture(ran: tuple[Path, Any]) -> None:
    outputs = [output for cell in ran[1].cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert "gptq-int3" in printed
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr" and "Error" in output["text"]]
