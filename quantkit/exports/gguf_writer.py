"""Write a checkpoint as one GGUF file with a Modelfile beside it, and compare it with what it was made of."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
import yaml
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError
from quantkit.exports.companions import LICENCES, copy_companions
from quantkit.exports.content import Content, digest
from quantkit.exports.gguf import BLOCKS, SCHEMES_KEY, VERSION_KEY, GgufExport
from quantkit.gguf.config import head_size, model_metadata, read_model_config
from quantkit.gguf.names import Naming
from quantkit.gguf.rope import FACTORS, rope_divisors
from quantkit.gguf.tensors import FLOATS, float_kind
from quantkit.gguf.tokenizer_writer import end_ids, read_tokenizer, remarks_on, tokenizer_metadata
from quantkit.gguf.types import FILE_TYPES, type_of
from quantkit.gguf.writer import Entry, write_file
from quantkit.system.artifacts import write_text

FAULTY = "the disk or its memory is faulty, or another process writes here: quantize again"
DERIVED = "rotary_emb.inv_freq"
"""Tensors of old checkpoints that follow from the config."""
HEAD = "lm_head.weight"


def check_source(folder: Path, names: Collection[str] | None = None) -> None:
    """Check before any work that a model can be written as GGUF.

    Args:
        folder: of the float model.
        names: of its tensors; by default those that lie in the folder.

    Raises:
        SourceError: config, tokenizer or tensors hold what a GGUF file cannot say, or quantkit does not write.
    """
    config = read_model_config(folder)
    naming = Naming(config.to_dict(), folder)
    for name in _written_floats(CheckpointReader(folder).names() if names is None else names, config):
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


def write_gguf(content: Content, folder: Path) -> Path:
    """Write ``model-TYPE.gguf``, named for the commonest type, and read it back.

    Args:
        content: the model; an importance beside a layer's blocks does not go into the file.
        folder: where to.

    Raises:
        SourceError: see :func:`check_source`; or a float tensor is too large for the dtype in which the file holds it.
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    config, tokenizer = read_model_config(content.origin), read_tokenizer(content.origin)
    kind = _commonest(content)
    config.tie_word_embeddings = content.changes.get("tie_word_embeddings", config.tie_word_embeddings)
    naming = Naming(config.to_dict(), content.origin)
    tensors = sorted(_entries(content, config, naming), key=_place)
    metadata = {
        "general.architecture": naming.architecture,
        **_provenance(content.origin),
        **model_metadata(config, content.origin),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_noted(content),
        **tokenizer_metadata(tokenizer, content.origin, config.vocab_size),
    }
    path = folder / f"model-{kind}.gguf"
    write_file(path, metadata, tensors)
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids(tokenizer, content.origin)]
    write_text(folder / "Modelfile", modelfile(path.name, stops))
    copy_companions(content.origin, folder, patterns=LICENCES)
    _compare(content, path, _written_floats(content.floats, config))
    return path


def modelfile(name: str, stops: Iterable[str]) -> str:
    """The ``Modelfile`` from which Ollama makes a model of a GGUF file beside it.

    There is no TEMPLATE: without one Ollama takes the chat template of the file.

    Args:
        name: of the file.
        stops: the tokens that end a turn.
    """
    quoted = (f'"""{stop}"""' if '"' in stop else f'"{stop}"' for stop in stops)
    return "\n".join([f"FROM ./{name}", *(f"PARAMETER stop {stop}" for stop in quoted)]) + "\n"


def _written_floats(names: Collection[str], config: PreTrainedConfig) -> list[str]:
    """Those of a model's float tensors that go into the file: not those that follow from others."""
    left_out = {HEAD} if config.tie_word_embeddings else set()
    return [name for name in names if name not in left_out and not name.endswith(DERIVED)]


def _entries(content: Content, config: PreTrainedConfig, naming: Naming) -> Iterator[Entry]:
    """Every tensor of the file."""
    for layer, scheme in content.schemes.items():
        stored, kind = content.packed[layer][BLOCKS], gguf.GGMLQuantizationType[type_of(scheme)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows, row_bytes = stored.shape
        name, shape = f"{layer}.weight", (rows, row_bytes // block_bytes * block)
        yield Entry(naming.name(name), int(kind), shape, rows * row_bytes, _reader(name, stored.read, naming))
    for name in _written_floats(content.floats, config):
        kind = float_kind(content.floats[name].dtype, content.floats[name].shape)
        stored = content.floats[name].cast(FLOATS[kind], name)
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        yield Entry(naming.name(name), int(kind), stored.shape, nbytes, _reader(name, stored.read, naming))
    divisors = rope_divisors(config, head_size(config))
    if divisors is not None:
        kind = gguf.GGMLQuantizationType.F32
        yield Entry(FACTORS, int(kind), tuple(divisors.shape), divisors.nbytes, divisors.numpy)


def _reader(name: str, read: Callable[[], torch.Tensor], naming: Naming) -> Callable[[], NDArray[Any]]:
    """Gives a tensor's bytes, its rows in the file's order."""
    return lambda: naming.in_gguf_order(name, read()).contiguous().reshape(-1).view(torch.uint8).numpy()


def _place(entry: Entry) -> tuple[int, str]:
    """The embedding, the blocks in their order, then the rest."""
    block = re.match(r"blk\.(\d+)\.", entry.name)
    if block:
        return int(block[1]), entry.name
    return (-1 if entry.name.startswith("token_embd") else 1 << 30), entry.name


def _commonest(content: Content) -> str:
    """The type that holds most bytes; of a model without quantized layers that of most matrices."""
    held: Counter[str] = Counter()
    for layer, scheme in content.schemes.items():
        held[type_of(scheme)] += math.prod(content.packed[layer][BLOCKS].shape)
    if not held:
        matrices = (each for each in content.floats.values() if len(each.shape) > 1)
        held.update(float_kind(stored.dtype, stored.shape).name for stored in matrices)
    return max(held, key=lambda kind: held[kind])


def _noted(content: Content) -> dict[str, Any]:
    """Who wrote the file, and the schemes of its layers, which their types do not tell whole."""
    schemes = {layer: scheme.to_json() for layer, scheme in content.schemes.items()}
    maker = f"quantkit {version('quantkit')}"
    found = {"general.quantized_by": maker, VERSION_KEY: version("quantkit")}
    return found | ({SCHEMES_KEY: json.dumps(schemes, separators=(",", ":"))} if schemes else {})


def _provenance(folder: Path) -> dict[str, Any]:
    """The name of a model, which is its folder's or in the hub's cache its own, and the licence of its card."""
    place = folder.resolve()
    name = place.parent.parent.name.rpartition("--")[2] if place.parent.name == "snapshots" else place.name
    licence = _licence(folder)
    return {"general.type": "model", "general.name": name, **({"general.license": licence} if licence else {})}


def _licence(folder: Path) -> str | None:
    """The licence that the model card states."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    opening, _, rest = text.partition("---\n")
    if opening or "\n---" not in rest:
        return None
    try:
        card = yaml.safe_load(rest[: rest.index("\n---")])
    except yaml.YAMLError:
        return None
    stated = card.get("license") if isinstance(card, dict) else None
    return stated if isinstance(stated, str) else None


def _compare(content: Content, path: Path, floats: list[str]) -> None:
    written = GgufExport(path)
    for name in floats:
        wanted = content.floats[name].cast(written.float_dtype(name), name)
        if not torch.equal(wanted.read(), written.float_tensor(name)):
            raise CheckpointError(f"tensor {name} in {path} differs from the source after writing", FAULTY)
    for layer in content.schemes:
        if digest([written.blocks(layer)]) != content.digests[layer]:
            raise CheckpointError(f"layer {layer} in {path} does not decode to what the method returned", FAULTY)
