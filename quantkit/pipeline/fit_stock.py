"""What a model is made of, before it is fetched or merged, and by what it is known again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.models import CONFIG, anatomy_by, anatomy_of
from quantkit.exports import find_gguf
from quantkit.gguf.config import model_config
from quantkit.gguf.head import read_head
from quantkit.recipe import CalibrationSpec, ModelSpec
from quantkit.recipe.local_files import calibration_files, model_files
from quantkit.recipe.model import NAMED_BY_ADAPTER
from quantkit.source import package
from quantkit.system.progress import Observer


def anatomy_for(model: ModelSpec, observer: Observer) -> Anatomy:
    """The anatomy of a model of which only the config is read; adapters change no shape.

    Args:
        model: the model.
        observer: is told of the base that an adapter names.

    Raises:
        QuantkitError: there is no such model, or its config cannot be read.
    """
    source = _source(model, observer)
    path = package.locate(source) if source.startswith(package.PREFIX) else Path(source).expanduser()
    if not path.exists():
        return anatomy_of(source, trust_remote_code=model.trust_remote_code)
    file = None if (path / CONFIG).is_file() else find_gguf(path)
    if file is not None:
        return anatomy_by(dict(model_config(read_head(file), torch.float16)), source)
    return replace(anatomy_of(str(path), trust_remote_code=model.trust_remote_code), name=source)


def _source(model: ModelSpec, observer: Observer) -> str:
    if model.source != NAMED_BY_ADAPTER:
        return model.source
    from quantkit.merging.named_base import with_named_base  # it brings PEFT along

    return with_named_base(model, observer).source


def content_of(model: ModelSpec, data: CalibrationSpec | None) -> list[list[Any]]:
    """The files of a model and its data on this machine, each with its size and when it was written."""
    named = [*model_files(model), *(() if data is None else calibration_files(data))]
    files = [(file, file.stat()) for each in named for file in _files(each.path)]
    return sorted([str(file), known.st_size, known.st_mtime_ns] for file, known in files)


def _files(given: str) -> Iterator[Path]:
    path = Path(given).expanduser().absolute()
    yield from (file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
