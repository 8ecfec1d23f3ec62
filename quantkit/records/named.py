"""The data sets that have a name: one small YAML file each, in ``calib_data/``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from quantkit.errors import CalibrationError, did_you_mean
from quantkit.records.dataset import RecordSet
from quantkit.records.files import identify_file, read_file
from quantkit.records.hub import identify_hub, read_hub

_INSTALLED = Path(__file__).parent.parent / "calib_data"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parent.parent / "calib_data"
"""The registry: inside the package where a wheel has put it, and beside the package in a checkout."""


class NamedDataset(BaseModel):
    """An entry of the registry: exactly one of ``hub`` and ``file``.

    Attributes:
        description: what it is, on one line.
        licence: under which its authors publish it.
        hub: hub id, with ``config``, ``split``, ``revision`` and ``data_files`` as :func:`read_hub` takes them.
        file: a file beside the entry.
        columns: see :func:`quantkit.records.formats.parse`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    licence: str
    hub: str | None = None
    file: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    columns: dict[str, str] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> NamedDataset:
        if (self.hub is None) == (self.file is None):
            raise ValueError("give exactly one of 'hub' and 'file'")
        if self.file is not None and Path(self.file).name != self.file:
            raise ValueError("'file' lies beside the entry: give its name alone")
        return self

    def hub_arguments(self) -> dict[str, Any]:
        """The keyword arguments of :func:`read_hub`."""
        return self.model_dump(include={"config", "split", "revision", "columns", "data_files"})


def dataset_names() -> list[str]:
    """The names of the registry, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def named_dataset(name: str) -> NamedDataset:
    """The registry's entry of that name.

    Raises:
        CalibrationError: there is none; the remedy lists those there are.
    """
    names = dataset_names()
    if name not in names:
        raise CalibrationError(f"unknown data set '{name}'", did_you_mean(name, names))
    path = FOLDER / f"{name}.yaml"
    try:
        return NamedDataset.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise CalibrationError(f"{path} is not a data set's entry: {error}", "install quantkit again") from error


def read_named(name: str) -> RecordSet:
    """Read a data set of the registry.

    Raises:
        CalibrationError: no such name, or it cannot be read.
    """
    entry = named_dataset(name)
    if entry.hub is not None:
        found = read_hub(entry.hub, **entry.hub_arguments())
    else:
        found = read_file(FOLDER / str(entry.file), columns=entry.columns)
    return replace(found, name=name, origin=_with_licence(found.origin, entry))


def identify_named(name: str) -> dict[str, Any]:
    """The origin that :func:`read_named` would give, without the records.

    Raises:
        CalibrationError: no such name, or it cannot be found.
    """
    entry = named_dataset(name)
    if entry.hub is not None:
        return _with_licence(identify_hub(entry.hub, **entry.hub_arguments()), entry)
    return _with_licence(identify_file(FOLDER / str(entry.file), columns=entry.columns), entry)


def _with_licence(origin: dict[str, Any], entry: NamedDataset) -> dict[str, Any]:
    kind = {"kind": "bundled"} if entry.file is not None else {}
    return {**origin, **kind, "licence": entry.licence}
