"""The estimate that stands beside a measurement in a report, by how the runtime that scored holds a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import LLAMA_CPP_TOKENS, activations_line, cache_lines, served, weights_line
from quantkit.estimation.lines import Line, Part, written
from quantkit.estimation.models import anatomy_by
from quantkit.estimation.streaming import How, streamed_weights
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.formats import FORMATS
from quantkit.formats.base import BYTES
from quantkit.recipe import VariantSpec
from quantkit.recipe.evaluation import STREAMED
from quantkit.system.validation import parse_section

ESTIMATED = "weights_estimated_bytes"
ESTIMATES = "estimates"
SERVERS = ("vllm",)
"""Runtimes that take memory for a cache of many rows before they are given one."""


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint in a runtime.

    Attributes:
        how: its packed layers are held.
        dtype: in which the runtime computes, and holds float tensors; None is that of the file.
        llama_cpp: llama.cpp computes, which reads 512 tokens at a time and keeps a float16 cache of the whole context.
    """

    how: How
    dtype: str | None
    llama_cpp: bool = False


def held_by(runtime: str | None, store: str, dtype: str | None) -> Held:
    """How a runtime holds checkpoints of a format.

    Args:
        runtime: its name.
        store: name of the format.
        dtype: in which it computes, as its facts say; what is not a dtype is taken as that of the file.
    """
    dtype = dtype if dtype in BYTES else None
    if runtime == "llama.cpp":
        return Held("packed", None, llama_cpp=True)
    if runtime == STREAMED:
        return Held("a block at a time", dtype)
    if store == "float":
        return Held("packed", dtype)
    if runtime == "reference":
        return Held("decoded", dtype)
    if store in FORMATS and FORMATS.get(store).decoded_at_first_use:
        return Held("decoded at first use", dtype)
    return Held("packed, a layer decoded at a time", dtype)


def loaded_line(anatomy: Anatomy, file: Stored, held: Held) -> Line:
    """The weights as they are loaded."""
    if held.how == "a block at a time":
        return streamed_weights(anatomy, held.dtype or file.dtype)
    if held.how == "decoded":
        return weights_line(anatomy, file, held.dtype or file.dtype)
    if held.llama_cpp or held.dtype in (None, file.dtype):
        return weights_line(anatomy, file)
    size, packed = BYTES[held.dtype or file.dtype], sum(each.nbytes for each in file.packed.values())
    values = sum(count for count, _ in file.floats.values())
    return Line("weights", packed + values * size, f"{written(packed)} packed + {written(values)} float x {size} bytes")


def running_part(anatomy: Anatomy, file: Stored, held: Held, use: Use, prompt: int) -> Part:
    """Memory while it reads a prompt at once and goes on up to ``use.context`` tokens, with logits of the last alone.

    Args:
        anatomy: the model.
        file: the checkpoint.
        held: how it is held.
        use: batch, context and overhead.
        prompt: tokens that are read at once.
    """
    dtype = "float32" if held.llama_cpp else held.dtype or file.dtype
    if held.how == "decoded at first use":
        lines = [weights_line(anatomy, file, dtype)]
    else:
        lines = [loaded_line(anatomy, file, held)]
    if held.how == "packed, a layer decoded at a time":
        shapes = [shape for name, (shape, _) in anatomy.linears().items() if name in file.packed]
        rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
        size = BYTES[dtype]
        lines.append(Line("decoded layer", rows * columns * size, f"{rows:,} x {columns:,} x {size} bytes"))
    tokens = use.batch * (min(prompt, LLAMA_CPP_TOKENS) if held.llama_cpp else prompt)
    lines += cache_lines(anatomy, use, "float16" if held.llama_cpp else dtype)
    lines.append(activations_line(anatomy, use.batch, tokens, dtype))
    if use.overhead:
        what = f"{written(use.overhead / 2**20)} MiB for context, kernels and allocator"
        lines.append(Line("device", use.overhead, what))
    return Part("running", f"reading {prompt:,} tokens, {use.context:,} in all", tuple(lines), anatomy.notes)


def without_device(part: Part) -> Part:
    """What a tensor library's own allocator sees of it."""
    return replace(part, lines=tuple(line for line in part.lines if line.name != "device"))


def beside_measured(
    figures: dict[str, Any], result: dict[str, Any], folder: Path, variant: VariantSpec | None = None
) -> dict[str, Any]:
    """Figures of a variant with estimates beside those of memory.

    Args:
        figures: as the report has them.
        result: of the evaluation, which tells what loaded the checkpoint and in which dtype.
        folder: of the checkpoint, of which only the config is read.
        variant: what was done to the model; None for a float model.

    Returns:
        The figures; their ``memory`` with :data:`ESTIMATED` and :data:`ESTIMATES`, see :func:`estimates`, both None for
        a model that transformers does not build; without them where one of :data:`SERVERS` scored.
    """
    memory = figures.get("memory")
    if not memory or result.get("loaded_by") in SERVERS:
        return figures
    anatomy = known_anatomy(folder)
    found = None if anatomy is None else estimates(anatomy, variant or _float(anatomy), memory, result)
    weights = found["weights"]["estimated_bytes"] if found else None
    return {**figures, "memory": {**memory, ESTIMATED: weights, ESTIMATES: found}}


def beside_server(figures: dict[str, Any], folder: Path, context: int) -> dict[str, Any]:
    """Figures of a checkpoint with ``server``, what a server on a GPU would hold of it, beside what was measured here.

    Args:
        figures: as the report has them.
        folder: of the checkpoint, of which only the config is read.
        context: tokens of its one sequence.

    Returns:
        The figures; ``server`` has ``bytes``, ``bytes_with_device`` (with what a GPU's runtime takes for itself),
        ``context`` (in tokens) and ``lines``, or is None for a model that transformers does not build.
    """
    anatomy = known_anatomy(folder)
    if anatomy is None or not figures.get("size_bytes"):
        return {**figures, "server": None}
    use = Use(context=min(context, anatomy.context or context))
    llama_cpp = not (folder / "config.json").is_file()
    part = served(anatomy, int(figures["size_bytes"]), use, llama_cpp=llama_cpp)
    lines = [line.to_json() for line in part.lines]
    own = sum(line.nbytes for line in without_device(part).lines)
    told = {"bytes": own, "bytes_with_device": part.nbytes, "context": use.context, "lines": lines}
    return {**figures, "server": told}


def estimates(
    anatomy: Anatomy, variant: VariantSpec, memory: dict[str, Any], result: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What was to be expected of each measured figure, by its name.

    ``weights`` are those that were loaded. ``prefill`` and ``decode`` are peaks over what was there before the model:
    of the resident set on a CPU, of torch's allocator on CUDA. ``process_prefill`` and ``process_decode`` are what the
    whole process held on a CUDA device.

    Args:
        anatomy: the model.
        variant: what was done to it.
        memory: as it was measured.
        result: of the evaluation.

    Returns:
        For each ``estimated_bytes``, ``measured_bytes``, ``ratio`` (estimated by measured) and ``lines``; what was not
        measured is not there.
    """
    own = str(result["environment"].get("dtype"))
    file, held = stored(anatomy, variant), held_by(result.get("loaded_by"), variant.format, own)
    found = {"weights": _beside([loaded_line(anatomy, file, held)], memory.get("weights_bytes"))}
    for name, phase in (memory.get("phases") or {}).items():
        if name != "load" and "tokens" in phase:
            found |= _of_phase(anatomy, file, held, memory, name)
    return {name: each for name, each in found.items() if each is not None}


def _of_phase(
    anatomy: Anatomy, file: Stored, held: Held, memory: dict[str, Any], name: str
) -> dict[str, dict[str, Any] | None]:
    phase, on_cpu = memory["phases"][name], memory.get("peak_kind") == "RSS"
    prompt = phase.get("prompt_tokens", phase["tokens"])
    context = phase["tokens"] + phase.get("prompt_tokens", 0)
    part = running_part(anatomy, file, held, Use(context=context, device="cpu" if on_cpu else "cuda"), prompt)
    whole = list(part.lines)
    if on_cpu or phase.get("peak_bytes") is not None:
        grown = phase["peak_bytes"] - memory["baseline_bytes"]
        found = {name: _beside(list(without_device(part).lines), grown)}
    else:
        found = {}
    return found if on_cpu else found | {f"process_{name}": _beside(whole, phase.get("process_bytes"))}


def _beside(lines: list[Line], measured: int | None) -> dict[str, Any] | None:
    if not measured or measured < 0:
        return None
    estimated = sum(line.nbytes for line in lines)
    return {
        "estimated_bytes": estimated,
        "measured_bytes": measured,
        "ratio": estimated / measured,
        "lines": [line.to_json() for line in lines],
    }


def known_anatomy(folder: Path) -> Anatomy | None:
    """The anatomy of a checkpoint; None for a model that transformers does not build."""
    try:
        return _anatomy(folder)
    except SourceError:
        return None


def _anatomy(folder: Path) -> Anatomy:
    file = folder / "config.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    else:
        from quantkit.exports import open_export

        data = open_export(folder).config()
    return anatomy_by(data, "the checkpoint")


def _float(anatomy: Anatomy) -> VariantSpec:
    """A float model as a variant in its own dtype."""
    kind = {"float16": "float16"}.get(anatomy.dtype, "bfloat16")
    keys = {"name": "float", "method": "none", "format": "float", "scheme": kind}
    return parse_section(VariantSpec, keys, "estimate")
