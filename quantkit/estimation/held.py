"""How a runtime that scores holds a checkpoint, and so what is expected of it while it does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import LLAMA_CPP_TOKENS, activations_line, cache_lines, weights_line
from quantkit.estimation.lines import Line, Part, written
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored
from quantkit.formats import FORMATS
from quantkit.formats.base import BYTES

How = Literal["decoded", "decoded at first use", "packed", "packed, a layer decoded at a time"]


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
    if store == "float":
        return Held("packed", dtype)
    if runtime == "reference":
        return Held("decoded", dtype)
    if store in FORMATS and FORMATS.get(store).decoded_at_first_use:
        return Held("decoded at first use", dtype)
    return Held("packed, a layer decoded at a time", dtype)


def loaded_line(anatomy: Anatomy, file: Stored, held: Held) -> Line:
    """The weights as they are loaded."""
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
