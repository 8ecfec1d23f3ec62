"""What running a model takes: weights, KV cache, activations of a prefill, and what the device takes for itself."""

from __future__ import annotations

from collections import Counter

from quantkit.estimation.anatomy import Anatomy, Cache
from quantkit.estimation.lines import Line, Part, written
from quantkit.estimation.use import KV_BYTES, Use
from quantkit.estimation.weights import Stored
from quantkit.formats.base import BYTES

LLAMA_CPP_TOKENS = 512
"""Tokens of a sequence that llama.cpp reads at a time, as it does by default."""


def running(anatomy: Anatomy, file: Stored, use: Use, *, decoded: str | None = None) -> Part:
    """Memory while a prompt is read and logits of its last token alone are asked for.

    Args:
        anatomy: the model.
        file: what it is loaded from.
        use: how it is used.
        decoded: the runtime decodes packed weights to this dtype, as the reference does; None keeps them packed.
    """
    llama_cpp = file.container == "gguf" and decoded is None
    dtype = computing_dtype(file) if decoded is None else decoded
    tokens = use.batch * min(use.context, LLAMA_CPP_TOKENS) if llama_cpp else use.tokens
    lines = (
        weights_line(anatomy, file, decoded),
        *cache_lines(anatomy, use, "float16" if llama_cpp else dtype),
        activations_line(anatomy, use.batch, tokens, dtype),
        Line("device", use.overhead, f"{written(use.overhead / 2**20)} MiB for context, kernels and allocator"),
    )
    return Part("inference", f"running, batch {use.batch}, {use.context:,} tokens", lines, _notes(anatomy, use))


def served(anatomy: Anatomy, size: int, use: Use, *, llama_cpp: bool) -> Part:
    """What a server holds of a checkpoint that it keeps as it lies on disk, in 16 bits whatever is not packed.

    Args:
        anatomy: the model.
        size: bytes of the checkpoint's weight files.
        use: how it is used; of a context that is longer than the model's, the model's counts.
        llama_cpp: it is llama.cpp, which reads 512 tokens at a time and computes in float32.
    """
    context = min(use.context, anatomy.context or use.context)
    use = use.model_copy(update={"context": context})
    tokens = use.batch * min(context, LLAMA_CPP_TOKENS) if llama_cpp else use.tokens
    lines = (
        Line("weights", size, "the files as they lie on disk"),
        *cache_lines(anatomy, use, "float16"),
        activations_line(anatomy, use.batch, tokens, "float32" if llama_cpp else "float16"),
        Line("device", use.overhead, f"{written(use.overhead / 2**20)} MiB for context, kernels and allocator"),
    )
    return Part("server", f"served, batch {use.batch}, {context:,} tokens", lines, anatomy.notes)


def with_all_logits(anatomy: Anatomy, file: Stored, use: Use, *, decoded: str | None = None) -> Part:
    """The same where logits of all positions are asked for, as for perplexity."""
    plain, dtype = running(anatomy, file, use, decoded=decoded), decoded or computing_dtype(file)
    kept = tuple(line for line in plain.lines if line.name != "activations")
    logits = (logits_line(anatomy, use, dtype), plain.line("activations"))
    found = (*kept[:-1], max(logits, key=lambda line: line.nbytes), kept[-1])
    return Part("inference_all_logits", f"{plain.title}, logits of all positions", found, plain.notes)


def computing_dtype(file: Stored) -> str:
    """The dtype of activations: that of the file's float tensors; llama.cpp computes in float32."""
    return "float32" if file.container == "gguf" else file.dtype


def weights_line(anatomy: Anatomy, file: Stored, decoded: str | None = None) -> Line:
    """The weights as they lie in memory."""
    if decoded is not None:
        nbytes = anatomy.parameters * BYTES[decoded]
        return Line("weights", nbytes, f"{written(anatomy.parameters)} values x {BYTES[decoded]} bytes, decoded")
    packed = sum(each.nbytes for each in file.packed.values())
    kept = file.nbytes - packed
    return Line("weights", file.nbytes, f"{written(packed)} packed + {written(kept)} float, as in the file")


def cache_lines(anatomy: Anatomy, use: Use, dtype: str) -> tuple[Line, ...]:
    """The KV cache, blocks of one kind together, and the state of recurrent blocks."""
    size = KV_BYTES[use.kv_dtype or dtype]
    kinds = Counter((each.values, each.words, each.window) for each in anatomy.caches if each.values)
    found = []
    for (values, words, window), blocks in kinds.items():
        tokens = Cache(values, words, window).tokens(use.context)
        nbytes = round(blocks * use.batch * tokens * values * size)
        looks = f" (window {window:,})" if window is not None else ""
        what = f"{blocks} blocks x {use.batch} x {tokens:,} tokens{looks} x {values:,} {words}"
        kind = "" if len(kinds) == 1 else ", all tokens" if window is None else ", window"
        found.append(Line(f"KV cache{kind}", nbytes, f"{what} x {size:g} bytes"))
    for state, blocks in Counter(each.state for each in anatomy.caches if each.state).items():
        what = f"{blocks} blocks x {use.batch} x {state:,} numbers of a sequence x {BYTES[dtype]} bytes"
        found.append(Line("recurrent state", blocks * use.batch * state * BYTES[dtype], what))
    return tuple(found)


def activations_line(anatomy: Anatomy, batch: int, tokens: int, dtype: str) -> Line:
    """The widest moment of a block: the MLP's gate, its product, and the residual stream twice; or the attention.

    Attention is taken to be computed in tiles, so that no matrix of tokens by tokens is ever there.
    """
    wide = 3 * anatomy.wide + 2 * anatomy.hidden
    attending = 2 * anatomy.hidden + 3 * anatomy.queries + 2 * anatomy.keys
    size, last = BYTES[dtype], batch * anatomy.vocabulary * BYTES[dtype]
    if wide >= attending:
        what = f"(3 x {anatomy.wide:,} + 2 x {anatomy.hidden:,})"
    else:
        what = f"(3 x {anatomy.queries:,} + 2 x {anatomy.keys:,} + 2 x {anatomy.hidden:,})"
    nbytes = tokens * max(wide, attending) * size
    formula = f"{tokens:,} tokens x {what} x {size} bytes"
    if last > nbytes:
        return Line("activations", last, f"logits: {batch} x {anatomy.vocabulary:,} x {size} bytes")
    return Line("activations", nbytes, formula)


def logits_line(anatomy: Anatomy, use: Use, dtype: str) -> Line:
    """Logits of all positions beside the last hidden states."""
    size = BYTES[dtype]
    nbytes = use.tokens * (anatomy.vocabulary + 2 * anatomy.hidden) * size
    what = f"({anatomy.vocabulary:,} logits + 2 x {anatomy.hidden:,})"
    return Line("logits", nbytes, f"{use.tokens:,} tokens x {what} x {size} bytes")


def _notes(anatomy: Anatomy, use: Use) -> tuple[str, ...]:
    notes = list(anatomy.notes)
    if anatomy.context is not None and use.context > anatomy.context:
        notes.append(f"{anatomy.name} was made for {anatomy.context:,} tokens, and {use.context:,} were asked for")
    if anatomy.caches and "latent" in anatomy.caches[0].words:
        notes.append(
            "the cache of latent attention is counted as vLLM keeps it; transformers keeps whole keys and values"
        )
    return tuple(notes)
