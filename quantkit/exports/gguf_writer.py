"""Write a checkpoint as one GGUF file with a Modelfile beside it, and compare it with what it was made of."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
import yaml
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.companions import copy_companions
from quantkit.checkpoint.extra_tensors import DERIVED, OF_TRAINING
from quantkit.errors import CheckpointError, SourceError
from quantkit.exports.content import Content, Stored, digest
from quantkit.exports.gguf import BLOCKS, SCHEMES_KEY, VERSION_KEY, GgufExport
from quantkit.gguf.architecture import architecture_for
from quantkit.gguf.config import OUTPUT, check_config, is_part, model_metadata, read_model_config, slides
from quantkit.gguf.head import read_head
from quantkit.gguf.names import TOWER, Naming, Place
from quantkit.gguf.rope import rope_tensors
from quantkit.gguf.tensors import FLOATS, MATRICES, dequantized, float_kind
from quantkit.gguf.tokenizer_writer import end_ids, read_tokenizer, remarks_on, tokenizer_metadata, turn_end
from quantkit.gguf.types import FILE_TYPES, type_of
from quantkit.gguf.writer import Entry, file_bytes, write_file
from quantkit.system.artifacts import write_text
from quantkit.system.distribution import own_version

PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
FAULTY = "the disk or its memory is faulty, or another process writes here: quantize again"
BLOCK = re.compile(r"^(model\.)?layers\.\d")


HALVED = "gguf: matrices that stay float are stored in float16, as llama.cpp expects; vectors in float32"
WINDOWLESS = "gguf: llama.cpp lets tokens of this model see all before them, and not the last {} alone"
ROUNDED = "gguf: llama.cpp rounds the bounds between which yarn blends its frequencies, which this model does not"
NEXT_ALONE = "gguf: the layers that guess at tokens after the next are left out"
TOWERLESS = "gguf: the file holds the language model alone; llama.cpp reads what sees or hears from a file of its own"


def check_source(folder: Path, names: Collection[str] | None = None) -> None:
    """Check before any work that a model can be written as GGUF.

    Args:
        folder: of the float model.
        names: of its tensors; by default those that lie in the folder.

    Raises:
        SourceError: config, tokenizer or tensors hold what a GGUF file cannot say, or quantkit does not write.
    """
    config = read_model_config(folder)
    naming, known = Naming.of(config), CheckpointReader(folder).names() if names is None else names
    places = [place.name for name in written_names(known, config, naming) for place in naming.places(name)]
    check_config(config, places, folder)
    tokenizer_metadata(read_tokenizer(folder), folder, config.vocab_size)


def source_remarks(folder: Path, dtype: str, names: Collection[str] | None = None) -> tuple[str, ...]:
    """What llama.cpp does with a model otherwise than transformers, on one line each.

    Args:
        folder: of the float model, see :func:`check_source`.
        dtype: of the float model.
        names: of its tensors; by default those that lie in the folder.
    """
    config, names = read_model_config(folder), CheckpointReader(folder).names() if names is None else names
    architecture = architecture_for(config.model_type)
    remarks = {
        HALVED: dtype == "float32",
        WINDOWLESS.format(getattr(config, "sliding_window", None)): slides(config) and architecture.ignores_window,
        TOWERLESS: is_part(config),
        ROUNDED: architecture.untruncated and config.rope_parameters.get("rope_type") == "yarn",
        NEXT_ALONE: any(guesses_further(name, config) for name in names),
    }
    return (*remarks_on(read_tokenizer(folder)), *(remark for remark, holds in remarks.items() if holds))


def write_gguf(content: Content, folder: Path) -> Path:
    """Write ``model-TYPE.gguf``, named for its preset or its commonest type, and read it back.

    Args:
        content: the model; an importance beside a layer's blocks does not go into the file.
        folder: where to.

    Raises:
        SourceError: see :func:`check_source`; or a float tensor is too large for the dtype in which the file holds it.
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    config, tokenizer = _config(content), read_tokenizer(content.origin)
    kind, naming = content.preset or _commonest(content), Naming.of(config)
    path = folder / f"model-{kind}.gguf"
    write_file(path, _metadata(content, config, tokenizer), _tensors(content, config, naming))
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids(tokenizer, content.origin)]
    mark = turn_end(tokenizer)  # of a model without that token it is text, at which Ollama stops as well
    stops += [mark] if mark is not None and mark not in stops else []
    write_text(folder / "Modelfile", modelfile(path.name, stops))
    copy_companions(content.origin, folder, licences_only=True)
    _compare(content, path, written_names(content.floats, config, naming), naming)
    return path


def bytes_of_gguf(content: Content) -> int:
    """Bytes of the file that :func:`write_gguf` would write, told without reading a tensor."""
    config = _config(content)
    metadata = _metadata(content, config, read_tokenizer(content.origin))
    return file_bytes(metadata, _tensors(content, config, Naming.of(config)))


def _config(content: Content) -> PreTrainedConfig:
    """Of the model, as the file has it."""
    config = read_model_config(content.origin)
    config.tie_word_embeddings = config.tie_word_embeddings and not content.unties
    return config


def _tensors(content: Content, config: PreTrainedConfig, naming: Naming) -> list[Entry]:
    """Every tensor in its order in the file."""
    return sorted(_entries(content, config, naming), key=_place)


def _metadata(content: Content, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the file says of itself, of the model and of its tokenizer."""
    naming, kind = Naming.of(config), content.preset or _commonest(content)
    return {
        "general.architecture": naming.architecture.name,
        **_provenance(content.origin, tokenizer, content.name),
        **model_metadata(config, content.origin),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_noted(content),
        **tokenizer_metadata(tokenizer, content.origin, config.vocab_size),
    }


def modelfile(name: str, stops: Iterable[str]) -> str:
    """The ``Modelfile`` from which Ollama makes a model of a GGUF file beside it.

    There is no TEMPLATE: without one Ollama takes the chat template of the file.

    Args:
        name: of the file.
        stops: the tokens that end a turn.
    """
    quoted = (f'"""{stop}"""' if '"' in stop else f'"{stop}"' for stop in stops)
    return "\n".join([f"FROM ./{name}", *(f"PARAMETER stop {stop}" for stop in quoted)]) + "\n"


def written_names(names: Collection[str], config: PreTrainedConfig, naming: Naming) -> list[str]:
    """Those of a model's tensors that go into the file: of its language model, and none that follow from others."""
    found, prefixed = [], any(TOWER.search(name) for name in names)
    for name in names:
        place = naming.find(name)
        head = place is not None and place.name == OUTPUT
        own = TOWER.search(name) if prefixed else place is not None or BLOCK.search(name)
        beside = (is_part(config) and not own and not head) or guesses_further(name, config)
        if not ((head and config.tie_word_embeddings) or beside or DERIVED.search(name) or OF_TRAINING.match(name)):
            found.append(name)
    return found


def guesses_further(name: str, config: PreTrainedConfig) -> bool:
    """Whether a tensor is of the blocks that guess at tokens after the next, which the model's class does not have."""
    block = re.match(r"(?:model\.)?(?:(?:language|text)_model\.)?(?:model\.)?layers\.(\d+)\.", name)
    return bool(re.match(r"(?:model\.)?mtp\.", name) or (block and int(block[1]) >= config.num_hidden_layers))


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a checkpoint on its way into the file, see :class:`Entry`."""

    place: Place
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], torch.Tensor]


def _entries(content: Content, config: PreTrainedConfig, naming: Naming) -> Iterator[Entry]:
    """Every tensor of the file."""
    members: dict[str, list[_Part]] = {}
    for part in _parts(content, config, naming):
        members.setdefault(part.place.name, []).append(part)
    for name, parts in members.items():
        yield _stack(name, parts)
    for name, divisors in rope_tensors(config, naming.architecture).items():
        kind = gguf.GGMLQuantizationType.F32
        yield Entry(name, int(kind), tuple(divisors.shape), divisors.nbytes, divisors.numpy)


def _parts(content: Content, config: PreTrainedConfig, naming: Naming) -> Iterator[_Part]:
    for layer, scheme in content.schemes.items():
        stored, kind = content.packed[layer][BLOCKS], gguf.GGMLQuantizationType[type_of(scheme)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = stored.shape[1]
        for place in naming.places(f"{layer}.weight"):
            rows = stored.shape[0] if place.pieces is None else place.shape_in_file(stored.shape)[0]
            columns, read = row_bytes // block_bytes * block, partial(_packed_in_order, place, stored)
            yield _Part(place, kind, (rows, columns), rows * row_bytes, read)
    for name in written_names(content.floats, config, naming):
        for place in naming.places(name):
            stored = content.floats[name]
            size = place.shape_in_file(stored.shape)
            kind = float_kind(place.name, stored.dtype, size)
            cast = stored.cast(FLOATS[kind], name)
            nbytes = math.prod(size) * cast.dtype.itemsize
            yield _Part(place, kind, size, nbytes, partial(_float_in_order, place, cast))


def _stack(name: str, parts: list[_Part]) -> Entry:
    """One tensor of the file, which may be made of many.

    Raises:
        SourceError: they differ in type or shape, or some are missing.
    """
    first = parts[0]
    if first.place.index is None:
        return Entry(name, int(first.kind), first.shape, first.nbytes, lambda: _bytes(first.read()))
    parts = sorted(parts, key=lambda part: part.place.index or 0)
    alike = len({(part.kind, part.shape) for part in parts}) == 1
    if not alike or [part.place.index for part in parts] != list(range(len(parts))):
        raise SourceError(
            f"a GGUF file holds {name} as one tensor of one type, and its {len(parts)} parts differ or are not whole",
            "give all of them one scheme",
        )
    return Entry(
        name,
        int(first.kind),
        (len(parts), *first.shape),
        sum(part.nbytes for part in parts),
        lambda: numpy.concatenate([_bytes(part.read()) for part in parts]),
    )


def _packed_in_order(place: Place, stored: Stored) -> torch.Tensor:
    return place.rows_to_file(stored.read())


def _float_in_order(place: Place, stored: Stored) -> torch.Tensor:
    return place.to_file(stored.read())


def _bytes(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _place(entry: Entry) -> tuple[int, str]:
    """The embedding, the blocks in their order, then the rest."""
    block = re.match(r"blk\.(\d+)\.", entry.name)
    if block:
        return int(block[1]), entry.name
    return (-1 if entry.name.startswith("token_embd") else 1 << 30), entry.name


def _commonest(content: Content) -> str:
    """The type of most weights; of a model without quantized layers that of its matrices."""
    held: Counter[str] = Counter()
    for layer, scheme in content.schemes.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_of(scheme)]]
        held[type_of(scheme)] += math.prod(content.packed[layer][BLOCKS].shape) // block_bytes * block
    if not held:
        matrices = (each for each in content.floats.values() if len(each.shape) > 1)
        held.update(MATRICES[stored.dtype].name for stored in matrices)
    return max(held, key=lambda kind: held[kind])


def _noted(content: Content) -> dict[str, Any]:
    """Who wrote the file, and the schemes of its layers, which their types do not tell whole."""
    schemes = {layer: scheme.to_json() for layer, scheme in content.schemes.items()}
    maker = f"quantkit {own_version()}"
    found = {"general.quantized_by": maker, VERSION_KEY: own_version()}
    return found | ({SCHEMES_KEY: json.dumps(schemes, separators=(",", ":"))} if schemes else {})


def _provenance(folder: Path, tokenizer: PreTrainedTokenizerBase, told: str) -> dict[str, Any]:
    """The name of a model, which if none is told is its folder's or in the hub's cache its own, and its card's licence.

    llama.cpp looks for tokens of Phi-3 where the name is like it, and does not load a file that lacks one.
    """
    place = folder.resolve()
    cached = place.parent.name == "snapshots"
    name = told or (place.parent.parent.name.rpartition("--")[2] if cached else place.name)
    licence, tokens = _licence(folder), tokenizer.get_vocab()
    misleads = re.search("phi-?3", name, re.IGNORECASE) and not all(token in tokens for token in PHI3_TOKENS)
    return {
        "general.type": "model",
        "general.name": "model" if misleads else name,
        **({"general.license": licence} if licence else {}),
    }


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


def _compare(content: Content, path: Path, floats: list[str], naming: Naming) -> None:
    written, head = GgufExport(path), read_head(path)
    for name in floats:
        for place in naming.places(name):
            dtype = FLOATS[head.tensors[place.name].kind]
            found = dequantized(head, place.name, dtype, index=place.index)
            if not torch.equal(place.to_file(content.floats[name].cast(dtype, name).read()), found):
                raise CheckpointError(f"tensor {name} in {path} differs from the source after writing", FAULTY)
    for layer in content.schemes:
        if digest([written.blocks(written.named(naming.places(f"{layer}.weight")[0]))]) != content.digests[layer]:
            raise CheckpointError(f"layer {layer} in {path} does not decode to what the method returned", FAULTY)
