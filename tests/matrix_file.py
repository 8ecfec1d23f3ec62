"""Writes quantkit/verification/matrix/matrix.json anew: ``python -m tests.matrix_file``, or ``make matrix``.

With ``--vllm-python`` the checkpoints are loaded in vLLM as well, in the interpreter of its environment; without it
those cells are kept as they were.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.quantization import Job
from quantkit.runtimes import RUNTIMES
from quantkit.system.artifacts import read_json, write_json
from quantkit.verification.matrix import matrix_markdown, reasons_markdown
from quantkit.verification.matrix.build import RUNTIMES_HERE, build, load_in
from quantkit.verification.matrix.rows import method_names, rows
from quantkit.verification.matrix.table import MATRIX_FILE, UNTRIED
from tests.tiny import make_model, tiny_rows

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "xllamacpp")


def small_job(folder: Path) -> Job:
    """A Llama of one block whose rows are whole blocks of every scheme."""
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    model = make_model(folder / "model", dtype=torch.bfloat16, **shape)
    return Job(model, {"reference": "small"}, "bfloat16", tiny_rows(), "small", inputs="float")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python")
    given = parser.parse_args()
    kept = {(row["format"], row["name"]): row for row in read_json(MATRIX_FILE)["rows"]} if MATRIX_FILE.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        found = list(build(small_job(Path(scratch)), rows(), Path(scratch) / "out", RUNTIMES_HERE))
        versions = {name: version(name) for name in PACKAGES}
        if MATRIX_FILE.exists() and given.vllm_python is None:
            versions |= {name: v for name, v in read_json(MATRIX_FILE)["versions"].items() if name.startswith("vllm")}
        for row, checkpoint in found:
            cell = kept.get((row["format"], row["name"]), {}).get("runtimes", {}).get("vllm", {"state": UNTRIED})
            if "vllm" in row["runtimes"]:
                tried = given.vllm_python is not None
                row["runtimes"]["vllm"] = load_in("vllm", checkpoint, given.vllm_python) if tried else cell
            states = {name: cell["state"] for name, cell in row["runtimes"].items()}
            sys.stdout.write(f"{row['format']} {row['name']}: {states}\n")
            sys.stdout.flush()
    content: dict[str, Any] = {
        "methods": method_names(),
        "runtimes": [runtime.name for runtime in RUNTIMES],
        "rows": [row for row, _ in found],
        "versions": versions,
    }
    write_json(MATRIX_FILE, content)
    write_page(content)


def write_page(content: dict[str, Any]) -> None:
    """Put the tables into docs/formats.md."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, table in {"matrix": matrix_markdown(content), "reasons": reasons_markdown(content)}.items():
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
