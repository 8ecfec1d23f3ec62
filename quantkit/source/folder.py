"""A folder that holds a float model: checked, identified, and copied in another dtype where one is wanted."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader, ShardWriter
from quantkit.checkpoint.adapter_folder import adapter_in
from quantkit.checkpoint.companions import copy_companions, copy_files, matching, model_files
from quantkit.checkpoint.foreign_errors import said_by_transformers
from quantkit.checkpoint.leftovers import leftovers, misleads_loaders, quantization_of, without_quantization
from quantkit.checkpoint.names import Names
from quantkit.checkpoint.reader import link_checkpoint
from quantkit.checkpoint.sizes import check_sizes
from quantkit.checkpoint.tied import TIED, UNTIED, set_tied, tied_by_tensors
from quantkit.checkpoint.tokenizer_files import ONE_OF, has_tokenizer
from quantkit.checkpoint.wrapped_names import own_names
from quantkit.engine.empty_model import empty_model
from quantkit.errors import OutputError, SourceError
from quantkit.source.decoded import DecodedTensor
from quantkit.source.decoding import decoding_of, float_dtype
from quantkit.source.halving import Flushed
from quantkit.source.hub import IN_OWN_LAYOUT, OTHER_LAYOUT, OWN_OF_MISTRAL
from quantkit.system.artifacts import file_sha256, read_json, translated_os_errors, write_json
from quantkit.system.units import in_units

CARD = "README.md"
"""The model's own card, which tells its licence."""


class FloatFolder:
    """A folder with ``config.json``, a tokenizer and float safetensors, or such that are decoded to floats.

    Attributes:
        folder: the folder.
        reader: its checkpoint.
        config: its ``config.json``.
        decoding: how its tensors are decoded; None where they are floats as they lie.
        dtype: of most of its weights: ``float32``, ``float16``, ``bfloat16`` or ``float64``; of a decoded one what its
            config says.
        tensors: of the float model by the names that its class has, none of them read yet, each in its own dtype.
        notes: what the folder or its config says and its weights do not, and what became of it; a line each.

    Raises:
        SourceError: the folder lacks a part, is quantized already, or needs code that may not run.
        CheckpointError: the checkpoint is missing or broken.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool, decode: bool = False) -> None:
        self.folder = folder
        adapter = adapter_in(folder)
        if adapter is not None:
            raise SourceError(*adapter)
        if (folder / OWN_OF_MISTRAL).exists() and not (folder / "config.json").exists():
            raise SourceError(f"{folder} {IN_OWN_LAYOUT}", OTHER_LAYOUT)
        self.config = _json_object(folder / "config.json", "a model's folder has one; is this the folder?")
        check_sizes(self.config, str(folder / "config.json"), folder)
        if not has_tokenizer(folder):
            raise SourceError(f"{folder} holds no tokenizer", f"it needs one of {', '.join(ONE_OF)}")
        self.runs_code = _runs_code(folder, self.config, trust_remote_code)
        if self.runs_code and not trust_remote_code:
            raise SourceError(
                f"{folder} needs Python code that comes with the model (auto_map)",
                "read that code, and set model.trust_remote_code: true (--trust-remote-code) if you trust it",
            )
        self.reader = CheckpointReader(folder)
        told = float_dtype(self.config)
        _check_known(folder, self.config, trust_remote_code)
        self.decoding = decoding_of(
            folder, self.config, self.reader, FLOATS[told], asked=decode, trust_remote_code=trust_remote_code
        )
        self.dtype = _float_dtype(folder, self.reader) if self.decoding is None else told
        self.tensors = self.decoding.tensors if self.decoding else _as_stored(self.reader)
        self.notes = leftovers(folder, self.config, self.reader)
        self._renames = self._reties = False
        self._mend(trust_remote_code)

    def _mend(self, trust_remote_code: bool) -> None:
        """Call the tensors as the model's class does, and have the config say of the head what the weights say."""
        try:
            model = empty_model(self.folder, trust_remote_code)
        except SourceError:
            return  # nothing goes on with such a model, and whoever builds it next says why
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        called = own_names(model, shapes)
        if called:
            self._renames = True
            self.tensors = [replace(each, name=called.get(each.name, each.name)) for each in self.tensors]
            shapes = {tensor.name: tensor.shape for tensor in self.tensors}
            stored, own = next(iter(called.items()))
            self.notes.append(
                f"{len(called)} tensors have other names than {type(model).__name__}'s: {stored} is {own}"
            )
        named = {tensor.name: tensor for tensor in self.tensors}
        tied = tied_by_tensors(model, Names(model, shapes, shapes), lambda name: named[name].parts())
        if tied is not None:
            self._reties = True
            self.config = set_tied(self.config, tied)
            self.notes.append(TIED if tied else UNTIED)

    @property
    def mended(self) -> list[str]:
        """What was changed of the model as it lies, for fingerprints."""
        changed = {"names": self._renames, "tie_word_embeddings": self._reties}
        return [what for what, holds in changed.items() if holds]

    def lies_as(self, dtype: str) -> bool:
        """Whether the folder itself is the float model in a dtype, and no other has to be made."""
        plain = not self.mended and not misleads_loaders(self.folder, self.reader)
        return plain and self._lies_stored_as(dtype) and quantization_of(self.config) is None

    def _lies_stored_as(self, dtype: str) -> bool:
        """Whether the files of weights are those of the float model in a dtype."""
        return self.decoding is None and not self._renames and dtype == self.dtype

    def values(self) -> Iterator[torch.Tensor]:
        """Its tensors, or the parts of those that are stacks, one in memory at a time."""
        for tensor in self.tensors:
            yield from tensor.parts()

    def sha256(self, known: Mapping[str, str]) -> dict[str, str]:
        """File name to hash, of everything that makes up the model; files with a ``known`` one are not read again."""
        files = [*model_files(self.folder, code=self.runs_code), *self.reader.files()]
        names = {file.relative_to(self.folder).as_posix(): file for file in files}
        return {name: known.get(name) or file_sha256(file) for name, file in names.items()}

    def copy_as(self, dtype: str, target: Path) -> str | None:
        """Write the model to ``target``; in another dtype than its own all floating-point tensors have that.

        Weights that lie as they are wanted are linked, so that what is beside them and misleads loaders stays away.

        Returns:
            What the user is told of values that are too small for ``dtype``; None where they are few.

        Raises:
            SourceError: a value is too large for ``dtype``.
            OutputError: ``target`` cannot be written, or the disk has no room for it.
        """
        copy_companions(self.folder, target, code=self.runs_code)
        copy_files(matching(self.folder, [CARD]), self.folder, target)
        write_json(target / "config.json", _config_as(self.config, dtype))
        if self._lies_stored_as(dtype):
            link_checkpoint(self.reader, target)
            return None
        same = dtype == self.dtype
        tensors = self.tensors if same else [tensor.cast(FLOATS[dtype]) for tensor in self.tensors]
        _check_room(target, sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors))
        flushed = Flushed(dtype)
        with ShardWriter(target) as writer:
            for tensor in tensors:
                writer.declare(tensor.name, tensor.dtype, tensor.shape)
            for tensor in tensors:
                writer.write_parts(tensor.name, self._checked(tensor, dtype, flushed))
        return flushed.note()

    def _checked(self, tensor: DecodedTensor, dtype: str, flushed: Flushed) -> Iterator[torch.Tensor]:
        """The parts of a tensor, none of which became infinite."""
        for part in tensor.parts():
            stored = part.to(tensor.dtype)
            flushed.count(tensor.name, part, stored)
            if part.is_floating_point() and bool((stored.isinf() & part.isfinite()).any()):
                raise SourceError(
                    f"{self.folder}: tensor '{tensor.name}' holds values up to {part[part.isfinite()].abs().max():g}, "
                    f"and {dtype} ends at {torch.finfo(tensor.dtype).max:g}",
                    "set model.dtype: bfloat16, which reaches as far as float32",
                )
            yield stored


def _check_room(folder: Path, needed: int) -> None:
    with translated_os_errors(folder):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"the float model takes {in_units(needed)}, and {folder.parent} has {in_units(free)} free",
            "free some disk space, or give the run a folder on another disk",
        )


def _as_stored(reader: CheckpointReader) -> list[DecodedTensor]:
    return [DecodedTensor.plain(reader, name, reader.dtype(name)) for name in reader.names()]


def _config_as(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of the float model in a dtype, which each of its models that names one gets."""
    plain = without_quantization(config)
    for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        if part is plain or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    return plain


def _check_known(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Check that transformers reads the config; what it raises for a broken one is of every kind."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise SourceError(f"{folder / 'config.json'}: model_type is {kind!r}, not a name", "get the file again")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (
        OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        problem, remedy = said_by_transformers(error)
        raise SourceError(f"transformers cannot read {folder / 'config.json'}: {problem}", remedy) from error


def _runs_code(folder: Path, config: dict[str, Any], trusted: bool) -> bool:
    """Whether model or tokenizer are loaded by code that comes with them.

    Of those that transformers has a class for, it takes its own unless the code is trusted.
    """
    file = folder / "tokenizer_config.json"
    tokenizer = _json_object(file, "get the file again") if file.exists() else {}
    of_model, of_tokenizer = "auto_map" in config, "auto_map" in tokenizer
    if trusted or not (of_model or of_tokenizer):
        return of_model or of_tokenizer
    return (of_model and not _has_model(config)) or (of_tokenizer and not _has_tokenizer(tokenizer, config))


def _has_model(config: dict[str, Any]) -> bool:
    """Whether transformers has the model's class."""
    from transformers import CONFIG_MAPPING

    return isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING


def _has_tokenizer(tokenizer: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether transformers has the tokenizer's class."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    named = tokenizer.get("tokenizer_class")
    if not isinstance(named, str):
        return config.get("model_type") in TOKENIZER_MAPPING_NAMES
    return any(tokenizer_class_from_name(name) is not None for name in (named, named.removesuffix("Fast")))


def _float_dtype(folder: Path, reader: CheckpointReader) -> str:
    """The dtype of most of the weights' bytes."""
    held: Counter[torch.dtype] = Counter()
    for name in reader.names():
        held[reader.dtype(name)] += reader.nbytes(name)
    packed = sum(count for dtype, count in held.items() if not (dtype.is_floating_point and dtype.itemsize > 1))
    most = max((dtype for dtype in held if dtype.is_floating_point), key=lambda dtype: held[dtype], default=None)
    if most is None or most.itemsize < 2 or packed > held[most]:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held)) or "nothing"
        raise SourceError(f"{folder} holds no float model: its tensors are {kinds}", "give the float model")
    return str(most).removeprefix("torch.")


def _json_object(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = read_json(file)
    except FileNotFoundError as error:
        raise SourceError(f"{file.parent} holds no {file.name}", remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read as JSON: {error}", remedy) from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} is not a JSON object", remedy)
    return content
