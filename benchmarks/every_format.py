"""A model in every format, loaded by every runtime that takes it, logits against the reference decoder's.

All checkpoints come from one walk with round-to-nearest codes; llama.cpp's own types from its quantizer. Each is
verified as `quantkit verify` does it, in fresh processes. Prints a table and, last, one line of JSON.

    python benchmarks/every_format.py --model FOLDER [--vllm-python /path/to/venv/bin/python] [--only gguf ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from scoring import machine

import quantkit
from quantkit.errors import QuantkitError
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import ModelSpec, VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.source import resolve

VARIANTS: dict[str, dict[str, Any]] = {
    "int4": {"format": "compressed-tensors"},
    "int4-asym": {"format": "compressed-tensors", "symmetric": False},
    "int8": {"format": "compressed-tensors", "bits": 8},
    "w8a8": {"format": "compressed-tensors", "bits": 8, "group_size": -1, "activations": "dynamic"},
    "fp8": {"format": "compressed-tensors", "scheme": "fp8"},
    "fp8-a8": {"format": "compressed-tensors", "scheme": "fp8", "activations": "dynamic"},
    "nvfp4": {"format": "compressed-tensors", "scheme": "nvfp4"},
    "gptq": {"format": "gptq"},
    "awq": {"format": "awq", "symmetric": False},
    "nf4": {"format": "bitsandbytes", "scheme": "nf4"},
    "llm-int8": {"format": "bitsandbytes", "bits": 8, "group_size": -1, "activations": "dynamic"},
    "q4_0": {"format": "gguf", "group_size": 32},
    "q8_0": {"format": "gguf", "bits": 8, "group_size": 32},
    "q4_k_m": {"format": "gguf", "scheme": "q4_k_m", "method": "llama.cpp", "imatrix": False},
    "bfloat16": {"format": "float", "scheme": "bfloat16", "method": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm-python")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkpoint in exported(given.model, given.only, Path(scratch)).items():
            for runtime in RUNTIMES:
                if VARIANTS[name]["format"] not in runtime.formats() or runtime.name == "reference":
                    continue
                if runtime.name == "vllm" and given.vllm_python is None:
                    continue
                row = {"variant": name, "runtime": runtime.name} | told(checkpoint, runtime.name, given.vllm_python)
                found.append(row)
                print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    print(json.dumps({"rows": found, **machine()}))


def exported(model: str, names: list[str], work: Path) -> dict[str, Path]:
    """The checkpoints by name, all from one walk."""
    source = resolve(ModelSpec(source=model), work)
    job = Job(source.folder, {"reference": "benchmark"}, source.dtype, inputs="float")
    wanted = [
        Wanted(VariantSpec.model_validate({"name": name, "method": "rtn", **VARIANTS[name]}), work / name)
        for name in names
    ]
    done = {}
    for each, outcome in zip(wanted, quantize_together(job, wanted), strict=True):
        if not isinstance(outcome, Quantized):
            raise outcome
        done[each.variant.name] = outcome.folder
    return done


def told(checkpoint: Path, runtime: str, python: str | None) -> dict[str, Any]:
    """What the verdict says, or why there is none."""
    try:
        verdict = quantkit.verify(checkpoint, runtime=runtime, python=python)
    except QuantkitError as error:
        return {"dtype": "-", "passed": "not run", "reason": error.problem}
    figures = verdict["figures"] or {"kl": None, "max_abs": None, "top1": None}
    return {
        "dtype": verdict["dtype"],
        "passed": verdict["passed"],
        "kl": figures["kl"],
        "max_abs": figures["max_abs"],
        "top1": figures["top1"],
        "reason": verdict["reason"],
    }


if __name__ == "__main__":
    main()
