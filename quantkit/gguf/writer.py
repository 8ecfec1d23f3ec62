"""Write a checkpoint as one GGUF file with a Modelfile beside it, and compare it with what it was made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError
from quantkit.exports.companions import LICENCES, copy_companions
from quantkit.exports.content import Content, digest
from quantkit.exports.gguf import SCHEMES_KEY, VERSION_KEY, GgufExport
from quantkit.exports.gguf_files import write_file
from quantkit.formats.base import Format
from quantkit.gguf.blocks import type_of
from quantkit.gguf.metadata import model_metadata, read_model_config
from quantkit.gguf.modelfile import modelfile
from quantkit.gguf.tensors_out import BLOCKS, Naming, entries, float_kind, written_floats
from quantkit.gguf.tokenizer_out import end_ids, read_tokenizer, remarks_on, tokenizer_metadata
from quantkit.system.artifacts import write_text

FAULTY = "the disk or its memory is faulty, or another process writes here: quantize again"
FILE_TYPES = {
    **{kind: f"MOSTLY_{kind}" for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")},
    "Q2_K": "MOSTLY_Q2_K",
    "Q6_K": "MOSTLY_Q6_K",
    "MXFP4": "MOSTLY_MXFP4_MOE",
    **{kind: f"MOSTLY_{kind}_S" for kind in ("Q3_K", "Q4_K", "Q5_K")},
}
"""By the commonest type of a file, llama.cpp's name for the whole."""


def check_source(folder: Path, names: Collection[str] | None = None) -> None:
    """Check before any work that a model can be written as GGUF.

    Args:
        folder: of the float model.
        names: of its tensors; by default those that lie in the folder.

    Raises:
        SourceError: config, tokenizer or tensors hold what a GGUF file cannot say, or quantkit does not write.
    """
    config = read_model_config(folder)
    naming = Naming(config, folder)
    for name in written_floats(CheckpointReader(folder).names() if names is None else names, config):
        naming.name(name)
    tokenizer_metadata(read_tokenizer(folder), folder, config.vocab_size)


def source_remarks(folder: Path, dtype: str) -> tuple[str, ...]:
    """What llama.cpp does with a model otherwise than transformers, on one line each.

    Args:
        folder: of the float model, see :func:`check_source`.
        dtype: of the float model.
    """
    found = remarks_on(read_tokenizer(folder))
    if dtype == "float32":
        return (
            *found,
            "gguf: matrices that stay float are stored in float16, as llama.cpp expects; vectors in float32",
        )
    return found


def write_gguf(content: Content, store: Format, folder: Path) -> Path:
    """Write ``model-TYPE.gguf``, named for the commonest type, and read it back.

    Args:
        content: the model; an importance beside a layer's blocks does not go into the file.
        store: what packed its layers.
        folder: where to.

    Raises:
        SourceError: see :func:`check_source`; or a float tensor is too large for the dtype in which the file holds it.
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    config, tokenizer = read_model_config(content.origin), read_tokenizer(content.origin)
    kind = _commonest(content)
    config.tie_word_embeddings = content.changes.get("tie_word_embeddings", config.tie_word_embeddings)
    tensors = entries(content, config)
    metadata = {
        **model_metadata(config, content.origin),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_provenance(content),
        **tokenizer_metadata(tokenizer, content.origin, config.vocab_size),
    }
    path = folder / f"model-{kind}.gguf"
    write_file(path, metadata, tensors)
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids(tokenizer, content.origin)]
    write_text(folder / "Modelfile", modelfile(path.name, stops))
    copy_companions(content.origin, folder, patterns=LICENCES)
    _compare(content, store, path, written_floats(content.floats, config))
    return path


def _commonest(content: Content) -> str:
    """The type that holds most bytes; of a model without quantized layers that of most matrices."""
    held: Counter[str] = Counter()
    for layer, scheme in content.schemes.items():
        held[type_of(scheme)] += math.prod(content.packed[layer][BLOCKS].shape)
    if not held:
        held.update(float_kind(stored).name for stored in content.floats.values() if len(stored.shape) > 1)
    return max(held, key=lambda kind: held[kind])


def _provenance(content: Content) -> dict[str, Any]:
    """Who wrote the file, and the schemes of its layers, which their types do not tell whole."""
    schemes = {layer: scheme.to_json() for layer, scheme in content.schemes.items()}
    maker = f"quantkit {version('quantkit')}"
    found = {"general.quantized_by": maker, VERSION_KEY: version("quantkit")}
    return found | ({SCHEMES_KEY: json.dumps(schemes, separators=(",", ":"))} if schemes else {})


def _compare(content: Content, store: Format, path: Path, floats: list[str]) -> None:
    written = GgufExport(path)
    for name in floats:
        wanted = content.floats[name].cast(written.float_dtype(name), name)
        if not torch.equal(wanted.read(), written.float_tensor(name)):
            raise CheckpointError(f"tensor {name} in {path} differs from the source after writing", FAULTY)
    for layer, scheme in content.schemes.items():
        if digest(store.unpack({BLOCKS: written.blocks(layer)}, scheme)) != content.digests[layer]:
            raise CheckpointError(f"layer {layer} in {path} does not decode to what the method returned", FAULTY)
