"""Find out which cells of the matrix work, by quantizing, exporting, loading and comparing a small model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._choice import is_installed
from quantkit.runtimes.base import LoadOptions, Runtime
from quantkit.schemes import Scheme
from quantkit.verification import verify
from quantkit.verification.comparison import Figures, compare, tolerance
from quantkit.verification.matrix.rows import Row, method_names
from quantkit.verification.matrix.table import FAILS, UNTRIED, WORKS

PROMPT = tuple(range(5, 53))
"""Token ids that every small model of a byte-level vocabulary has."""
RUNTIMES_HERE = ("llama.cpp", "reference", "transformers")
"""Those that live in this interpreter, for which cells are done anew by a test."""


def build(
    job: Job, wanted: Iterable[Row], folder: Path, runtimes: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Do every cell of some rows.

    All methods of a row are exported and read back; one of the checkpoints is loaded by the runtimes, which cannot
    tell which method chose the codes.

    Args:
        job: the model and its calibration rows.
        wanted: which rows.
        folder: where the checkpoints go.
        runtimes: names of the runtimes to load them with; cells of others are not tried.

    Yields:
        Each row with its cells, and its checkpoint.

    Raises:
        QuantkitError: a method and a format that go together by what they say fail.
    """
    found = list(wanted)
    checkpoints = _export(job, found, folder)
    for row, done in zip(found, checkpoints, strict=True):
        checkpoint = next(iter(done.values()))
        facts = {"format": row.format, "name": row.name(), "keys": row.keys, "methods": list(done)}
        yield {**facts, "runtimes": _load(checkpoint, row.format, runtimes)}, checkpoint


def load_in(runtime: str, checkpoint: Path, python: str | None) -> dict[str, Any]:
    """The cell of a runtime that lives in an interpreter of its own."""
    verdict = verify(checkpoint, runtime, python=python)
    if not verdict["passed"]:
        return {"state": FAILS, "reason": _anonymous(verdict["reason"], checkpoint)}
    return {"state": WORKS, "dtype": verdict["dtype"], "kl": _short(verdict["figures"]["kl"])}


def _export(job: Job, rows: Sequence[Row], folder: Path) -> list[dict[str, Path]]:
    """The checkpoints of each row by method, all from one walk."""
    cells = [
        (place, method, variant)
        for place, row in enumerate(rows)
        for method in method_names()
        if (variant := row.variant(method)) is not None
    ]
    wanted = [Wanted(variant, folder / variant.name) for _, _, variant in cells]
    checkpoints: list[dict[str, Path]] = [{} for _ in rows]
    for (place, method, _), outcome in zip(cells, quantize_together(job, wanted), strict=True):
        if not isinstance(outcome, Quantized):
            raise outcome
        checkpoints[place][method] = outcome.folder
    return checkpoints


def _load(checkpoint: Path, form: str, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each runtime that is meant to load a format makes of a checkpoint."""
    schemes = set() if form == "float" else set(open_export(checkpoint).schemes.values())
    meant = [runtime for runtime in RUNTIMES if runtime.loads(FORMATS.get(form))]
    expected = _logits(RUNTIMES.get("reference"), checkpoint, "float32")
    return {
        runtime.name: _cell(runtime, checkpoint, form, schemes, expected)
        if runtime.name in wanted
        else {"state": UNTRIED}
        for runtime in meant
    }


def _cell(
    runtime: type[Runtime], checkpoint: Path, form: str, schemes: set[Scheme], expected: torch.Tensor
) -> dict[str, Any]:
    store = FORMATS.get(form)
    able = runtime.computes_in(store, schemes, "cpu")
    if not able:
        return {"state": FAILS, "reason": f"{runtime.name} does not load {form} files with these schemes"}
    if not all(map(is_installed, runtime.requires(store))):
        return {"state": UNTRIED}
    dtype = able[0]
    try:
        figures = _compared(expected, _logits(runtime, checkpoint, dtype))
    except QuantkitError as error:
        return {"state": FAILS, "reason": _anonymous(error.problem, checkpoint)}
    limit = tolerance(runtime.name, dtype, schemes).kl
    if not figures.kl <= limit:
        return {"state": FAILS, "reason": f"KL {figures.kl:.2g} from the reference decoder, and {limit:.2g} is allowed"}
    return {"state": WORKS, "dtype": dtype, "kl": _short(figures.kl)}


def _compared(expected: torch.Tensor, found: torch.Tensor) -> Figures:
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "expected.npy", Path(scratch) / "found.npy"
        for file, logits in zip(files, (expected, found), strict=True):
            np.save(file, logits.numpy())
        return compare(*files, [len(expected)])


def _logits(runtime: type[Runtime], checkpoint: Path, dtype: str) -> torch.Tensor:
    model = runtime.load(checkpoint, LoadOptions(dtype=dtype, context_length=len(PROMPT)))
    return model.logits(torch.tensor(PROMPT)).float().cpu()


def _anonymous(reason: str, checkpoint: Path) -> str:
    return heart(reason.replace(str(checkpoint), "the checkpoint"))


def heart(reason: str) -> str:
    """What a runtime in a process of its own raised, without what stands around it in its log."""
    found = re.sub(
        r"^.*\(exit code \d+\): (\[rank0\]: )?(\S*Error: )?(\d+ validation error.*?Value error, )?", "", reason
    )
    return re.split(r" \[type=|\. Reasons:| \(for group_size| \(the whole log", found)[0].strip()


def _short(value: float) -> float:
    return float(f"{value:.2g}")
