"""From the name of a model to its anatomy: well-known configs, folders, and models of the hub; no weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, QuantkitError, SourceError, did_you_mean
from quantkit.estimation.anatomy import Anatomy

CONFIG = "config.json"


def anatomy_of(reference: str, *, trust_remote_code: bool = False) -> Anatomy:
    """The anatomy of a model.

    Args:
        reference: a well-known name such as ``llama-2-7b``, a folder with ``config.json`` or that file, or the name of
            a hub model, of which ``config.json`` alone is fetched; those that are well known are not.
        trust_remote_code: run Python code that comes with the model in the folder.

    Raises:
        SourceError: there is no such model, or its config cannot be read.
    """
    path = Path(reference).expanduser()
    if path.exists():
        file = path / CONFIG if path.is_dir() else path
        return _from_file(file, reference, file.parent if trust_remote_code else None)
    known = well_known()
    found = known.get(reference.lower()) or known.get(_hub_names().get(reference.lower(), ""))
    if found is not None:
        return anatomy_by(found, reference)
    return _from_file(fetched_config(reference), reference)


@cache
def well_known() -> Mapping[str, Mapping[str, Any]]:
    """The configs that come along, by name."""
    return {name: entry["config"] for name, entry in _entries().items()}


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    folder = resources.files("quantkit.estimation") / "configs"
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.name.endswith(".json"):
            found |= json.loads(file.read_text(encoding="utf-8"))
    return found


@cache
def _hub_names() -> Mapping[str, str]:
    """By the name on the hub in lower case, what a well-known config is called here."""
    return {hub.lower(): name for name, entry in _entries().items() for hub in entry["hub"]}


def _from_file(file: Path, name: str, code: Path | None = None) -> Anatomy:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {error}", "name a folder with the config.json of a model") from error
    if not isinstance(data, Mapping):
        raise SourceError(f"{file} is no config: it holds no mapping", "name the config.json of a model")
    return anatomy_by(data, name, code)


def anatomy_by(data: Mapping[str, Any], name: str, code: Path | None = None) -> Anatomy:
    """The anatomy of the model of a config, as ``config.json`` has it; ``code`` is a folder whose code may run.

    Raises:
        SourceError: it asks for sizes that no model has, or transformers cannot build it.
    """
    from quantkit.checkpoint.sizes import check_sizes  # it brings torch along, and building transformers

    try:
        check_sizes(data, f"the config of {name}")
    except CheckpointError as error:
        raise SourceError(error.problem, error.remedy) from error
    plain = {key: value for key, value in data.items() if key != "quantization_config"}
    return _built(json.dumps(plain, sort_keys=True), name, code)


@lru_cache(maxsize=8)
def _built(config: str, name: str, code: Path | None) -> Anatomy:
    """The variants of a report have one config."""
    from quantkit.estimation.building import built

    return built(json.loads(config), name, code)


def fetched_config(reference: str) -> Path:
    """``config.json`` of a hub model, from its cache or the hub.

    Raises:
        SourceError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    from quantkit.recipe.model import HUB_REFERENCE
    from quantkit.source.hashes import check_files
    from quantkit.source.hub import TRANSPORT_ERROR

    match = HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise SourceError(
            f"'{reference}' is neither a folder, a well-known model nor the name of a hub model",
            did_you_mean(reference.lower(), well_known()),
        )
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        file = Path(hf_hub_download(match["id"], CONFIG, revision=match["revision"], endpoint=endpoint))
        check_files(match["id"], {CONFIG: file}, file.parent.name, errors=(OSError, TRANSPORT_ERROR), endpoint=endpoint)
        return file
    except (HFValidationError, OSError, TRANSPORT_ERROR) as error:
        raise _unreachable(match["id"], match["revision"], error) from error


def _unreachable(name: str, revision: str | None, error: BaseException) -> QuantkitError:
    from quantkit.source.hub import translated_error

    return translated_error(name, revision, error)
