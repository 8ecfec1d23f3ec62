"""vLLM, in an interpreter of its own: its builds pin versions of torch and transformers that quantkit does not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.base import Format
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.schemes import Scheme

VARIABLE = "QUANTKIT_VLLM_PYTHON"
"""Environment variable that names the interpreter."""
SCRIPT = Path(__file__).with_name("_vllm_script.py")
INPUTS = "VLLM_CPU_INT4_W4A8"
"""Environment variable by which vLLM rounds the inputs of 4-bit layers to 8 bits on a CPU, as it does by default."""
GPUS = "CUDA_VISIBLE_DEVICES"
PATIENCE = 120.0
"""Seconds in which an interpreter has begun."""
VERSION = (
    "from importlib.metadata import distributions as all;"
    "print(next((each.version for each in all() if each.name in ('vllm', 'vllm-cpu')), 'unknown'))"
)
"""Prints the version of whatever brings the package ``vllm``, without its import."""
NO_MEMORY = (
    "free some memory, lower evaluation.context_length, take smaller evaluation.batch_sizes, or, on a CPU, set "
    "VLLM_CPU_KVCACHE_SPACE to fewer GiB"
)
HOW = (
    "python -m venv vllm-env, then vllm-env/bin/pip install vllm on a machine with CUDA, or vllm-cpu without (and no "
    f"torchvision or torchaudio, whose builds for CUDA stop its import); then set {VARIABLE}=vllm-env/bin/python"
)


@RUNTIMES.register
class Vllm(Runtime):
    """Has a script load the checkpoint in vLLM's interpreter, and asks it."""

    name = "vllm"
    summary = "vLLM, the server; in a Python environment of its own"
    install = HOW
    separate = True
    own_allocator = True
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
    def check(cls, python: str | None = None) -> None:
        """Look for the interpreter, and for vLLM in it."""
        interpreter(python)

    @classmethod
    def computes_by(cls, python: str | None = None) -> dict[str, str]:
        """VLLM's version, and how it computes on a CPU with 4-bit layers."""
        return {"vllm": _said(interpreter(python), VERSION), INPUTS: os.environ.get(INPUTS, "0")}

    @classmethod
    def refusal(cls, store: type[Format], schemes: Collection[Scheme], *, embedding: bool) -> str | None:
        """Why vLLM does not load a checkpoint; see :meth:`Runtime.refusal`."""
        if cls.name not in store.runtimes:
            return f"vLLM does not load {store.name} files, or not so that quantkit would vouch for it."
        if embedding:
            return "vLLM does not load a quantized input embedding."
        return store.refusal(cls.name, schemes)

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Load a checkpoint in the interpreter that is named, or the variable names, or this one.

        The dtype None is the one that vLLM takes by itself: the checkpoint's own, if it has 16 bits.

        Raises:
            QuantkitError: there is no such interpreter, or it has no vLLM.
            EvaluationError: vLLM cannot load it.
        """
        from quantkit.runtimes._distant import DistantModel, Server

        server = Server(cls.name, [interpreter(options.python), str(SCRIPT)], _environment(options), NO_MEMORY)
        job = {
            "checkpoint": str(path.absolute()),
            "dtype": options.dtype or "auto",
            "context_length": options.context_length + 1,  # it draws a token after each prompt
            "batch": options.batch,
            "trust_remote_code": options.trust_remote_code,
        }
        return DistantModel(server, job)


def _environment(options: LoadOptions) -> dict[str, str]:
    """The variables of vLLM's process, which takes the first of the GPUs that it sees."""
    kind, _, place = options.device.partition(":")
    if kind != "cuda" or not place:
        return dict(os.environ)
    seen = [each for each in os.environ.get(GPUS, "").split(",") if each]
    return {**os.environ, GPUS: seen[int(place)] if int(place) < len(seen) else place}


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
    if _said(found, "import importlib.util; print(importlib.util.find_spec('vllm') is not None)") != "True":
        raise QuantkitError(f"{named} has no vLLM", HOW)
    return str(Path.cwd() / found)  # it is called from another folder, and a link into an environment is left one


def _said(python: str, code: str) -> str:
    """What an interpreter prints for some code.

    Raises:
        QuantkitError: it cannot run it.
    """
    command = [python, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QuantkitError(f"{python} is no interpreter that can be run: {error}", HOW) from error
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[::-1]), f"it ended with {done.returncode}")
        raise QuantkitError(f"{python} is no interpreter that can be run: {last}", HOW)
    return done.stdout.strip()
