"""llama.cpp's quantizer over a GGUF file: its block types, and the mixtures of its presets, without calibration.

The rows of each matrix go through ``ggml_quantize_chunk`` of the package xllamacpp, whose build leaves out
``llama_model_quantize``; which type a layer gets is told by the rules of llama.cpp's ``src/llama-quant.cpp``, as
:mod:`quantkit.schemes.ggml_mixture` has them. With an importance matrix, use quantkit's method of the same name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quantkit.errors import QuantizationError, SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import Library, Offer, Request, Used
from quantkit.system import threads

if TYPE_CHECKING:
    import numpy

    from quantkit.gguf.writer import Entry

LEGACY = {"q8_0": 8, "q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5}
KQUANTS = {"q4_k": 4, "q2_k": 2, "q3_k": 3, "q5_k": 5, "q6_k": 6, "iq4_nl": 4}
MIXTURES = {
    "q4_k_m": 4, "q4_k_s": 4, "q2_k_mix": 2, "q3_k_s": 3, "q3_k_m": 3, "q3_k_l": 3,
    "q5_k_m": 5, "q5_k_s": 5, "q6_k_mix": 6,
}  # fmt: skip
"""By method, its bits: block types from before the K-quants, the others, and presets that mix these by layer."""
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The matrices of a decoder block: names in GGUF files, and in transformers."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
PRESETS = {"q2_k_mix": "Q2_K", "q6_k_mix": "Q6_K"}
"""How llama.cpp's list of file types calls the presets whose names it does not have."""
OPTIONS = {"token_embedding_type": "", "output_tensor_type": ""}
"""Options of ``llama-quantize``; empty leaves the tensor as it is, where that tool has a type for it."""
KEPT_KEYS = re.compile(r"(?!GGUF\.|quantkit\.|general\.(architecture|file_type|quantization_version|quantized_by)$)")


@LIBRARIES.register
class LlamaCpp(Library):
    """One GGUF file in, one out."""

    name = "llama.cpp"
    summary = "llama.cpp's own quantizer, without calibration: its block types and the mixtures of its presets"
    distribution = "xllamacpp"
    requirements = ("xllamacpp==2026.10.11549", "gguf==0.19.0")
    offers = tuple(
        Offer(method, (bits,), "gguf", grouped=False, devices=("cpu",), options=OPTIONS)
        for method, bits in {**KQUANTS, **LEGACY, **MIXTURES}.items()
    )
    takes: ClassVar[Literal["folder", "gguf"]] = "gguf"

    def quantize(self, request: Request) -> Used:
        """Copy the file with new types for its matrices."""
        import gguf

        from quantkit.gguf.writer import write_file

        reader = gguf.GGUFReader(request.model)
        types = types_for(request, {each.name: _shape(each) for each in reader.tensors})
        entries = [
            _entry(each, types.get(each.name), partial(request.progress, "tensor", done, len(reader.tensors)))
            for done, each in enumerate(reader.tensors)
        ]
        write_file(request.out / f"{request.method}.gguf", _metadata(reader, request.method), entries)
        request.progress("tensor", len(reader.tensors), len(reader.tensors))
        return Used(notes=_notes(request.method, types))


def types_for(request: Request, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The GGML type of every tensor that changes, by its name in the file.

    Args:
        request: with patterns that are searched for in a layer's name in transformers.
        shapes: of all tensors of the file, rows first.

    Raises:
        SchemeError: not even blocks of 32 divide the rows of a matrix.
    """
    numbers = (re.match(r"blk\.(\d+)\.", name) for name in shapes)
    blocks = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer is not None and not any(re.search(pattern, layer) for pattern in request.ignore):
            found[name] = type_for(request.method, layer, blocks, shape)
    for name, key in ((EMBEDDING, "token_embedding_type"), (HEAD, "output_tensor_type")):
        if request.options[key] and name in shapes:
            found[name] = str(request.options[key]).upper()
    return found


def layer_of(name: str) -> str | None:
    """The name in transformers of a matrix of a decoder block; None for other tensors."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return f"model.layers.{found[1]}.{PARTS[found[2]]}" if found and found[2] in PARTS else None


def type_for(method: str, layer: str, blocks: int, shape: tuple[int, ...]) -> str:
    """The GGML type of a layer: of the method, of the preset's rule, or what takes its place where it does not fit.

    Raises:
        SchemeError: not even blocks of 32 divide its rows.
    """
    from quantkit.gguf.types import type_of
    from quantkit.schemes import SCHEMES
    from quantkit.schemes.ggml import SUPER_BLOCK
    from quantkit.schemes.ggml_mixture import FALLBACK_BLOCK, FALLBACKS

    rows, columns = shape
    if columns % FALLBACK_BLOCK:
        raise SchemeError(
            f"{layer}: no type of llama.cpp has blocks that divide its rows of {columns}",
            "keep this layer float with 'ignore'",
        )
    if method in LEGACY:
        return method.upper()
    if method in MIXTURES:
        block = int(layer.split(".")[2])
        return type_of(SCHEMES.get(method)().for_layer(layer, block, blocks, (rows, columns)))
    if method in FALLBACKS and columns % SUPER_BLOCK:
        return type_of(FALLBACKS[method])
    return type_of(SCHEMES.get(method)())


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _metadata(reader: Any, method: str) -> dict[str, Any]:
    """All that the file says, but for its types."""
    import gguf

    from quantkit.gguf.types import FILE_TYPES
    from quantkit.gguf.writer import Raw
    from quantkit.llama_cpp.library import library

    kept = [field for field in reader.fields.values() if KEPT_KEYS.match(field.name)]
    file_type = FILE_TYPES.get(method.upper(), f"MOSTLY_{PRESETS.get(method, method.upper())}")
    return {
        "general.architecture": str(reader.get_field("general.architecture").contents()),
        # the first two parts of a field are the length of its key and the key
        **{field.name: Raw(b"".join(part.tobytes() for part in field.parts[2:])) for field in kept},
        "general.quantized_by": library().found.package,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _entry(tensor: Any, kind: str | None, begun: Callable[[], None]) -> Entry:
    """A tensor on its way into the file, as it is or in another type; ``begun`` is called when its turn comes."""
    import gguf
    import numpy

    from quantkit.gguf.writer import Entry

    target = tensor.tensor_type if kind is None else gguf.GGMLQuantizationType[kind]
    shape = _shape(tensor)
    nbytes = int(numpy.prod(gguf.quant_shape_to_byte_shape(shape, target))) if kind else int(tensor.n_bytes)

    def read() -> numpy.ndarray:
        begun()
        return tensor.data if kind is None else _quantized(tensor, kind)

    return Entry(tensor.name, int(target), shape, nbytes, read)


def _quantized(tensor: Any, kind: str) -> numpy.ndarray:
    """The blocks of a matrix, uint8 ``[rows, bytes of a row]``.

    Raises:
        QuantizationError: a weight is not finite.
    """
    import gguf
    import numpy

    from quantkit.llama_cpp.library import library

    source = numpy.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
    if not numpy.isfinite(source).all():
        raise QuantizationError(f"{tensor.name} has weights that are not finite")
    target = gguf.GGMLQuantizationType[kind]
    blocks = numpy.empty(gguf.quant_shape_to_byte_shape(source.shape, target), dtype=numpy.uint8)
    rows, columns = source.shape
    llama = library()

    def rows_between(first: int, last: int) -> None:
        # Rows are counted from the start of both matrices.
        llama.call(
            "ggml_quantize_chunk",
            int(target),
            source.ctypes.data,
            blocks.ctypes.data,
            first * columns,
            last - first,
            columns,
            None,
        )

    count = threads.count(os.environ)
    bounds = [rows * share // count for share in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(rows_between, *zip(*pairwise(bounds), strict=True)))
    return blocks


def _notes(method: str, types: dict[str, str]) -> tuple[str, ...]:
    """Which types the file has, where it has several."""
    counted = {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}
    if len(counted) < 2:
        return ()
    return (f"{method}: {', '.join(f'{count} tensors in {kind}' for kind, count in counted.items())}",)
