"""Calibration tokens that the float model writes itself, beside those of the data set.

A method that solves a layer by the tokens that it was shown, and tuning even more, fits what is chance in them. More
tokens, such as the model itself deems likely, lessen that, on other texts most: it is the self-calibration of Williams,
Chrysostomou and Aletras 2024 (arXiv:2410.17170), and the generated data of LLM-QAT, Liu et al. 2023 (arXiv:2305.17888).

The rows are written once for the variants of a process, in a process of their own, so that no peak of a walk knows of
the whole model. They are kept beside the solved layers, so that a run that goes on is calibrated on what it began with.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError, QuantkitError
from quantkit.methods.tuning import generated_for
from quantkit.quantization.job import Job, Written, made_from
from quantkit.recipe import VariantSpec
from quantkit.runtimes._writing import KEPT_BYTES, Writing, write_rows
from quantkit.system.artifacts import fingerprint, read_json, translated_os_errors, write_json
from quantkit.system.child import run_child
from quantkit.system.devices import resolve_device
from quantkit.system.free_memory import free_bytes
from quantkit.system.units import in_units

SHORTEST, LONGEST = 128, 512
"""Tokens of a row, between which it is as long as calibration rows are on average."""
OnNote = Callable[[str], None]
MEMORY = 0.5
"""Share of the free memory that the float model may take."""
SMALL = 32 << 20
"""Bytes of a float model up to which it is loaded in this process: another would take more by itself."""
FILE = "generated.json"
"""In a layer store: what the rows depend on, and what became of them."""
REMEDY = "leave out calibration.generated (--generated), or set it to 0"

_written: dict[str, Written] = {}
"""What was written in this process, by what it depends on."""


def widest_input(skeleton: Skeleton) -> int:
    """Columns of the layer of the blocks that has most."""
    return max((layer.shape[1] for segment in skeleton.segments for layer in segment.layers), default=0)


def generated_tokens(job: Job, variant: VariantSpec, tokens: int, width: int) -> int:
    """How many tokens the float model is to write for a variant.

    Args:
        job: what is quantized.
        variant: that is calibrated on them.
        tokens: of its calibration set.
        width: of the widest input of a layer of the blocks.
    """
    if not job.generates(variant):
        return 0
    return generated_for(tokens, width) if job.generated is None else job.generated


def written_for(
    job: Job, skeleton: Skeleton, variants: Sequence[VariantSpec], stores: Iterable[Path], on_note: OnNote
) -> Written:
    """The rows that the float model writes for the variants of a walk, which all take the same.

    Args:
        job: what is quantized.
        skeleton: of the model.
        variants: of the walk, those that are calibrated.
        stores: the layer stores of its variants, in which an earlier run may have left rows.
        on_note: called before the model is loaded.

    Returns:
        No rows where none are asked for; nor, with a note, where the float model cannot write them and nobody gave a
        number.

    Raises:
        QuantizationError: the number of tokens was asked for, and the model cannot write them; or the variants do not
            take the same.
    """
    numbers = {generated_tokens(job, variant, job.tokens, widest_input(skeleton)) for variant in variants}
    if len(numbers) > 1:
        names = ", ".join(variant.name for variant in variants)
        raise QuantizationError(f"{names}: not all are calibrated on generated tokens", "quantize them one by one")
    tokens = max(numbers, default=0)
    if not tokens:
        return Written()
    asked = _asked(job, tokens)
    key = fingerprint({"identity": made_from(job, variants[0]) | {"variant": None}, "writing": asked.to_json()})
    found = next(filter(None, (_stored(store, key) for store in stores)), None) or _written.get(key)
    if found is None:
        on_note(f"the float model writes {asked.rows * asked.length:,} tokens to calibrate on")
        found = replace(_write(job, asked), key=key)
    _written[key] = found
    if found.note and job.generated is not None:
        raise QuantizationError(found.note, REMEDY)
    return found


def _asked(job: Job, tokens: int) -> Writing:
    """Rows of one length that come to so many tokens, or a few less."""
    device = resolve_device(job.device)
    real = [row for row in job.rows if len(row)]
    mean = job.tokens // max(len(real), 1)
    rows = -(-tokens // min(max(mean, SHORTEST), LONGEST))
    return Writing(
        model=str(job.source),
        device=str(device),
        dtype=str(pass_dtype(device, FLOATS[job.dtype])).removeprefix("torch."),
        rows=rows,
        length=max(tokens // rows, 2),
        firsts=tuple(row[0] for row in real),
        threads=torch.get_num_threads(),
        trust_remote_code=job.trust_remote_code,
    )


def _write(job: Job, asked: Writing) -> Written:
    """What comes of it; a note where nothing does."""
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    reader = CheckpointReader(job.source)
    size = sum(prod(reader.shape(name)) for name in reader.names()) * dtype.itemsize
    free = free_bytes(device, job.bounds)
    if size + KEPT_BYTES * (size > SMALL) > MEMORY * free:
        told = f"it takes {in_units(size)} in {asked.dtype}, and {in_units(free)} are free"
        return Written(note=f"the float model writes no calibration tokens: {told}")
    try:
        return Written(write_rows(asked) if size <= SMALL else _in_a_process(asked))
    except Exception as error:  # the code of any architecture runs here, and it may fail in any way
        problem = error.problem if isinstance(error, QuantkitError) else f"{type(error).__name__}: {error}"
        return Written(note=f"the float model writes no calibration tokens: {problem.splitlines()[0]}")


def _in_a_process(asked: Writing) -> list[list[int]]:
    """The rows, written in a process that then is gone.

    Raises:
        QuantkitError: the model cannot be loaded, keeps no cache, or the process died.
    """
    command = [sys.executable, "-m", "quantkit.runtimes._writing"]
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="quantkit-generating-") as scratch:
        folder = Path(scratch)
        ending = run_child(command, asked.to_json(), folder, environment=environment, log=folder / "log")
        result = ending.answer()
        if ending.status or "rows" not in result:
            raise QuantizationError(f"its process ended with {ending.how}: {ending.last_error()}")
    rows: list[list[int]] = result["rows"]
    return rows


def keep(store: Path, written: Written) -> None:
    """Leave in a layer store what was written, for a run that goes on.

    Raises:
        OutputError: the store cannot be written.
    """
    if written.key and _stored(store, written.key) is None:
        with translated_os_errors(store):
            write_json(store / FILE, {"key": written.key, "rows": written.rows, "note": written.note})


def _stored(store: Path, key: str) -> Written | None:
    """What an earlier run left in a layer store by the same key; a file that cannot be read counts as none."""
    try:
        found: dict[str, Any] = read_json(store / FILE)
        return Written(found["rows"], found["note"], key) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def generated_notes(written: Written) -> list[str]:
    """What a variant's user should know of it."""
    if written.note:
        return [written.note]
    tokens = sum(map(len, written.rows))
    return [f"calibrated also on {tokens:,} tokens that the float model wrote itself"] if tokens else []
