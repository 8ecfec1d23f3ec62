"""Streamed logits beside those of the model loaded whole, for checkpoints of your choice.

    python benchmarks/streamed.py FOLDER...

Each is a folder of a float or quantized checkpoint. A line says by how much logits of a few random rows differ, what
one block of it takes beside the whole, or why it cannot be read a block at a time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from quantkit.errors import QuantkitError
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._streamed import load_streamed
from quantkit.runtimes.base import LoadOptions

LENGTHS = (48, 48, 32, 48)
LARGEST_TOKEN = 250


def compared(folder: Path) -> dict[str, Any]:
    """``difference`` (the largest, of log-probabilities in nats), ``streamed_bytes`` and ``whole_bytes`` of weights."""
    options = LoadOptions(dtype="float32")
    try:
        streamed = load_streamed(folder, options, None)
        draw = torch.Generator().manual_seed(0)
        most = min(streamed.vocabulary, LARGEST_TOKEN)
        rows = [torch.randint(5, most, (length,), generator=draw) for length in LENGTHS]
        streamed.read_ahead(rows, lambda _done, _total: None)
        found = [streamed.logits(row).log_softmax(-1) for row in rows]
    except QuantkitError as error:
        return {"refused": error.problem}
    whole = RUNTIMES.get("reference").load(folder, options)
    expected = [whole.logits(row).log_softmax(-1) for row in rows]
    return {
        "difference": max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)),
        "streamed_bytes": streamed.weights_bytes(),
        "whole_bytes": whole.weights_bytes(),
    }


def main() -> None:
    """Compare all that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Any] = {}
    for folder in parser.parse_args().folders:
        try:
            found[folder.name] = compared(folder)
        except Exception as error:  # the code of any model; the others are compared all the same
            found[folder.name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        each = found[folder.name]
        said = each.get("refused") or each.get("failed") or f"{each['difference']:.1e} nats"
        print(f"{folder.name:28} {said}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
