"""What will load a checkpoint, in lines for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from quantkit.formats.base import Format
from quantkit.schemes import Scheme

SERVERS = {"vllm": "vLLM", "ollama": "Ollama"}
REFERENCE = "quantkit's reference decoder"


def loads(
    store: type[Format],
    schemes: Collection[Scheme],
    config: Mapping[str, Any],
    *,
    whole: bool = True,
    turned: bool = False,
) -> list[str]:
    """Who loads a quantized checkpoint: the runtimes of its format, and the reference decoder always.

    Args:
        store: its format.
        schemes: of its layers.
        config: ``config.json``.
        whole: transformers has a place for all of its tensors.
        turned: runtimes have to turn the inputs of layers.
    """
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    able = [name for name in store.runtimes if name != "transformers" or store.computes_in(schemes)]
    able = [name for name in able if not turned or store.turn_refusal(name) is None]
    lines = [_runtime(name, store, schemes, dtype) for name in able]
    if not whole:
        lines = [f"{line}, not whole: see the problems" if line.startswith("transformers") else line for line in lines]
    return [*lines, f"{REFERENCE}: as a float model"]


def loads_float() -> list[str]:
    """Who loads a float checkpoint."""
    return ["transformers", SERVERS["vllm"]]


def _runtime(name: str, store: type[Format], schemes: Collection[Scheme], dtype: str) -> str:
    if not name.startswith("transformers"):
        return SERVERS.get(name, name)
    needs = f" with {' and '.join(store.requires)}" if store.requires else ""
    if name != "transformers":  # an older release
        return f"{name}{needs}"
    dtypes = store.computes_in(schemes)
    if dtype in dtypes:
        return f"{name}{needs}"
    return f"{name}{needs}, in {' or '.join(dtypes)} (the checkpoint is {dtype})"
