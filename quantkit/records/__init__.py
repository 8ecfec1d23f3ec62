"""Records: the texts and conversations that calibration and evaluation read.

A data set is a file, a hub data set or a name of quantkit's registry; :func:`load` takes any of them. What it
cannot use it lists, with the reason. :func:`encode` turns a record into the tokens that the model expects.

Nothing here imports torch, transformers or datasets before a function needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError, did_you_mean
from quantkit.records.dataset import Layout, RecordSet, Skipped, without_images
from quantkit.records.files import identify_file, read_file
from quantkit.records.hub import HUB_PREFIX, identify_hub, read_hub
from quantkit.records.llamafactory import INFO, LLAMAFACTORY_PREFIX, identify_llamafactory, read_llamafactory
from quantkit.records.named import NamedDataset, dataset_names, identify_named, named_dataset, read_named
from quantkit.records.record import Call, Message, Record
from quantkit.records.render import (
    RefusedRecordError,
    describe_template,
    encode,
    encoded,
    is_templated,
    render,
    rendered,
    template_text,
)

__all__ = [
    "Call",
    "Layout",
    "Message",
    "NamedDataset",
    "Record",
    "RecordSet",
    "RefusedRecordError",
    "Skipped",
    "dataset_names",
    "describe_template",
    "encode",
    "encoded",
    "identify",
    "is_templated",
    "load",
    "named_dataset",
    "read_file",
    "read_hub",
    "read_named",
    "read_reference",
    "render",
    "rendered",
    "template_text",
    "without_images",
]


def load(reference: str, columns: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None) -> RecordSet:
    """Read a data set: a name of the registry, ``hub:org/name`` (split ``train``), or the path of a file or folder.

    ``llamafactory:DIR/NAME`` is the entry NAME of ``DIR/dataset_info.json``.

    A name of the registry comes before a file of that name; write ``./name`` for the file.

    Args:
        reference: of the data set.
        columns, tags: how it calls what a record has; see :func:`quantkit.records.formats.parse`. Those of the registry
            and of LLaMA-Factory say so themselves.

    Raises:
        CalibrationError: there is no such data set, it cannot be read, or it has no usable record.
    """
    says_itself = reference in dataset_names() or reference.startswith(LLAMAFACTORY_PREFIX)
    if says_itself and (columns or tags):
        raise CalibrationError(f"data set '{reference}' says itself what its columns are", "leave out columns and tags")
    if reference in dataset_names():
        return read_named(reference)
    if reference.startswith(HUB_PREFIX):
        return read_hub(reference.removeprefix(HUB_PREFIX), columns=columns or None, tags=tags)
    if reference.startswith(LLAMAFACTORY_PREFIX):
        return read_llamafactory(reference.removeprefix(LLAMAFACTORY_PREFIX))
    return read_file(_path(reference), layout=Layout(columns or None, tags))


def read_reference(file: str, columns: Mapping[str, str], tags: Mapping[str, str]) -> RecordSet:
    """Read a file, whatever names the registry has, or ``llamafactory:DIR/NAME``; see :func:`load`."""
    if file.startswith(LLAMAFACTORY_PREFIX):
        return load(file, columns, tags)
    return read_file(Path(file), layout=Layout(columns or None, tags))


def identify(reference: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The origin of a data set, which identifies its content, without its records: ``load(reference, columns).origin``.

    Raises:
        CalibrationError: there is no such data set, or its commit cannot be found out.
    """
    if reference in dataset_names():
        return identify_named(reference)
    if reference.startswith(HUB_PREFIX):
        return identify_hub(reference.removeprefix(HUB_PREFIX), columns=columns or None)
    if reference.startswith(LLAMAFACTORY_PREFIX):
        return identify_llamafactory(reference.removeprefix(LLAMAFACTORY_PREFIX))
    return identify_file(_path(reference), columns=columns or None)


def _path(reference: str) -> Path:
    path = Path(reference)
    if path.name == INFO:
        remedy = f"write {LLAMAFACTORY_PREFIX}{path.parent}/NAME for one of them"
        raise CalibrationError(f"{path} lists data sets and is none", remedy)
    if not path.suffix and not path.exists():
        remedy = f"{did_you_mean(reference, dataset_names())}; or a file's path, or hub:org/name"
        raise CalibrationError(f"unknown data set '{reference}'", remedy)
    return path
