"""Carries out one part of the proof in this process: ``python -m gpu_proof.parts NAME SETTING``.

The setting is JSON: ``device``, ``sizes``, ``work``, a folder that the parts share, ``known``, the figures of the parts
before, ``told``, the file for what this one finds, and ``gptqmodel_python``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from gpu_proof.checks import equal_bytes, tests
from gpu_proof.facts import facts
from gpu_proof.found import Found
from gpu_proof.models import blocks, smollm2, solver
from gpu_proof.other import gptqmodel

PARTS: dict[str, Callable[[Found], None]] = {
    "facts": facts,
    "tests": tests,
    "bytes": equal_bytes,
    "blocks": blocks,
    "solver": solver,
    "smollm2": smollm2,
    "gptqmodel": gptqmodel,
}


def main() -> None:
    name, setting = sys.argv[1], json.loads(sys.argv[2])
    found = Found(setting)
    if found.device == "cuda" and not torch.cuda.is_available():
        found.say("torch finds no CUDA device here: nothing was measured", failed=True)
        sys.exit(1)
    PARTS[name](found)


if __name__ == "__main__":
    main()
