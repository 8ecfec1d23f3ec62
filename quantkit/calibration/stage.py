"""A calibration set: built from a recipe's section or reused where it is there, and its folder on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized

from quantkit import records
from quantkit.calibration.audit import make_audit
from quantkit.calibration.images import Processor, image_file
from quantkit.calibration.model import ModelLimits, load_tokenizer, model_limits, processor_files, tokenizer_files
from quantkit.calibration.rows import Encoded, Packed, draw, pack
from quantkit.errors import CalibrationError
from quantkit.recipe import CalibrationSpec
from quantkit.records import Record, RecordSet
from quantkit.system.artifacts import (
    check_writable,
    file_sha256,
    new_folder,
    read_json,
    read_stage,
    write_json,
    write_stage,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TOKENS_FILE = "tokens.safetensors"
INPUTS_FILE = "inputs.safetensors"
AUDIT_FILE = "audit.json"
STAGE = "calibration"
CODE_VERSION = 4
"""Part of the fingerprint: raised when the same inputs would give other tokens or another audit."""
USES = ("inputs", "experts", "expert_prior", "generated", "sensitivity", "token_weights")
"""Keys of the section that say how the rows are used."""


@dataclass(frozen=True)
class CalibrationSet:
    """The token rows that every method of a recipe is calibrated on.

    Attributes:
        rows: token ids, each row at most ``max_length`` long.
        audit: what became of every record and token; see :func:`quantkit.calibration.audit.make_audit`.
        sha256: see :func:`token_ids_sha256`.
        tokens: in all rows together.
        inputs: of rows with images the further inputs of the model, by the places of the rows and by name.
    """

    rows: list[list[int]]
    audit: dict[str, Any]
    sha256: str
    tokens: int
    inputs: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def token_ids_sha256(
    rows: Iterable[Iterable[int]], inputs: Mapping[int, Mapping[str, torch.Tensor]] | None = None
) -> str:
    """SHA-256 over the rows in their order, each as its length and then its ids, all as little-endian int32.

    Behind them come what further inputs rows have: the place of the row, the name and the bytes of each.
    """
    digest = hashlib.sha256()
    for row in rows:
        ids = np.fromiter(row, dtype="<i4")
        digest.update(np.array([ids.size], dtype="<i4").tobytes() + ids.tobytes())
    for place, named in sorted((inputs or {}).items()):
        for name, tensor in sorted(named.items()):
            digest.update(f"{place} {name} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save(folder: Path, built: CalibrationSet) -> None:
    """Write ``tokens.safetensors`` (int32 ``ids`` of all rows, int64 ``lengths``) and ``audit.json``.

    Further inputs of rows with images go into ``inputs.safetensors``, as ``PLACE.NAME``.
    """
    ids = np.concatenate([np.array(row, dtype=np.int32) for row in built.rows])
    lengths = np.array([len(row) for row in built.rows], dtype=np.int64)
    (folder / TOKENS_FILE).write_bytes(serialized({"ids": ids, "lengths": lengths}))
    if built.inputs:
        from safetensors.torch import save_file

        named = {f"{place}.{name}": each for place, row in built.inputs.items() for name, each in row.items()}
        save_file(named, folder / INPUTS_FILE)
    write_json(folder / AUDIT_FILE, built.audit)


def load(folder: Path) -> CalibrationSet:
    """Read the folder of a calibration stage.

    Raises:
        CalibrationError: a file is missing or broken, or the tokens are not those of the audit.
    """
    remedy = "remove the folder and build the calibration set again"
    try:
        tensors = load_file(folder / TOKENS_FILE)
        audit: dict[str, Any] = read_json(folder / AUDIT_FILE)
        rows = _rows(tensors["ids"], tensors["lengths"])
        wanted = audit["token_ids_sha256"]
        inputs = _inputs(folder / INPUTS_FILE) if audit.get("images") else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"{folder} is not a whole calibration set: {error}", remedy) from error
    sha256 = token_ids_sha256(rows, inputs)
    if sha256 != wanted:
        raise CalibrationError(f"the tokens in {folder} are not those of its audit", remedy)
    return CalibrationSet(rows, audit, sha256, sum(map(len, rows)), inputs)


def _inputs(file: Path) -> dict[int, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file as load_tensors

    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(file).items():
        place, _, name = key.partition(".")
        found.setdefault(int(place), {})[name] = tensor
    return found


def _rows(ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> list[list[int]]:
    if ids.ndim != 1 or lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != ids.size:
        raise ValueError("the rows' lengths do not add up to the tokens")
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def build(spec: CalibrationSpec, model_folder: Path, out: Path, *, trust_remote_code: bool = False) -> CalibrationSet:
    """Turn a data set into the token rows that every method of a recipe is calibrated on.

    Records are drawn in the order ``random.Random(seed).sample`` gives their indices until ``samples`` of them are
    usable, then packed. ``out`` is reused if it was made from the same data set, tokenizer, and settings;
    what says how the rows are used, such as ``spec.inputs``, is not among them.

    Args:
        spec: the recipe's section.
        model_folder: the model's files, with its tokenizer and ``config.json``.
        out: the stage's folder: ``tokens.safetensors``, ``audit.json``, ``stage.json``.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        CalibrationError: the data set, tokenizer or template cannot be used, or tokenizer and model disagree.
        OutputError: ``out`` cannot be written.
    """
    check_writable(out)
    limits = model_limits(model_folder, trust_remote_code)
    fixed = _settings(spec, model_folder, limits)
    finished = read_stage(out, STAGE, {**fixed, "dataset": records.identify(spec.dataset, spec.columns)})
    if finished is not None and _are_unchanged(finished.get("images", {})):
        return load(out)
    found = records.load(spec.dataset, spec.columns, spec.tags)
    tokenizer = load_tokenizer(model_folder, trust_remote_code)
    processor = Processor(model_folder, spec.chat_template, trust_remote_code)
    built, images = _built(spec, found, tokenizer, processor, limits)
    with new_folder(out) as folder:
        save(folder, built)
        facts = {"token_ids_sha256": built.sha256, **({"images": images} if images else {})}
        write_stage(folder, STAGE, {**fixed, "dataset": found.origin}, **facts)
    return built


def _are_unchanged(images: Mapping[str, str]) -> bool:
    """Whether the files of images are what they were."""
    return all(Path(file).is_file() and file_sha256(Path(file)) == sha256 for file, sha256 in images.items())


def _files(found: RecordSet, packed: Packed) -> dict[str, str]:
    """SHA-256 of the files of images that are in rows."""
    used = {record.index for record in packed.used if record.inputs}
    indexed = zip(found.records, found.indices(), strict=True)
    files = {image_file(image) for record, index in indexed if index in used for image in record.images}
    return {str(file): file_sha256(file) for file in sorted(file for file in files if file is not None)}


def _settings(spec: CalibrationSpec, model_folder: Path, limits: ModelLimits) -> dict[str, Any]:
    """The facts that the tokens depend on beside the data set."""
    settings = spec.model_dump(mode="json", exclude={*USES, "dataset", "chat_template"})
    return {
        "code": CODE_VERSION,
        "settings": settings,
        "chat_template": _template_identity(spec.chat_template),
        "tokenizer": tokenizer_files(model_folder),
        "processor": processor_files(model_folder),
        "vocabulary": limits.vocabulary,
        "positions": limits.positions,
        **({} if limits.template_package is None else {"without": limits.template_package}),
    }


def _template_identity(choice: str) -> str | dict[str, str]:
    if choice in ("auto", "none"):
        return choice
    path = Path(choice)
    try:
        return {"file": path.name, "sha256": file_sha256(path)}
    except OSError as error:
        remedy = "'chat_template' is auto, none, or the path of a Jinja file"
        raise CalibrationError(f"cannot read the chat template {path}: {error.strerror}", remedy) from error


def _built(
    spec: CalibrationSpec,
    found: RecordSet,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor,
    limits: ModelLimits,
) -> tuple[CalibrationSet, dict[str, str]]:
    """The calibration set, and the SHA-256 of each file of an image in it."""
    drawn = draw(found, spec.samples, spec.seed, _encoder(spec, tokenizer, processor, limits), spec.max_lost)
    full = spec.packing == "full"
    packed, inputs = pack(drawn.encoded, spec.max_length, tokenizer, full=full, crop=spec.crop, seed=spec.seed)
    if not packed.rows:
        tokens = sum(len(record.ids) for record in drawn.encoded)
        raise CalibrationError(
            f"data set '{found.name}' gives {tokens} tokens, which do not fill one row of {spec.max_length}",
            "use more samples, a smaller max_length or 'packing: none'",
        )
    template = records.describe_template(spec.chat_template, tokenizer)
    sha256 = token_ids_sha256(packed.rows, inputs)
    audit = make_audit(spec, found, drawn, packed, template=template, limits=limits, sha256=sha256)
    built = CalibrationSet(packed.rows, audit, sha256, sum(map(len, packed.rows)), inputs)
    return built, _files(found, packed) if inputs else {}


def _encoder(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, processor: Processor, limits: ModelLimits
) -> Callable[[Record, int], Encoded]:
    def encode(record: Record, index: int) -> Encoded:
        if record.images:
            found = processor.encode(record, tokenizer, index)
        else:
            plain = records.encoded(record, tokenizer, spec.chat_template, index=index)
            found = Encoded(index, plain.ids, changes=plain.changes)
        largest = max(found.ids, default=0)
        if largest >= limits.vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise CalibrationError(
                f"the tokenizer gives token {largest} ('{token}') for record {index}, "
                f"but the model's vocabulary is {limits.vocabulary}",
                "the tokenizer belongs to another model: put the model's own files beside it",
            )
        return found

    return encode
