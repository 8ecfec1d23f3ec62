"""Data sets from the Hugging Face hub, at a commit that the origin records."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError, SourceError
from quantkit.records.dataset import Layout, RecordSet, collect, records_sha256

HUB_PREFIX = "hub:"
ROWS = 1000
"""Rows that are read at a time."""
_REMEDY = "check the id and the network, or use a local file, or 'dataset: instructions_mini', which needs no network"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<commit>[0-9a-f]{40})/(?P<path>.+)")


def read_hub(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_files: str | None = None,
    tags: Mapping[str, str] | None = None,
    others: bool = True,
) -> RecordSet:
    """Read a data set of the hub through ``datasets``, from its cache where it is there.

    Args:
        dataset: the id, ``org/name``.
        config: which of its configurations.
        split: which split, with a slice where wanted: ``train[:1000]``.
        revision: branch, tag or commit.
        columns: see :func:`quantkit.records.formats.parse`.
        data_files: a file of the data set, to read that instead of all.
        tags, others: see :func:`quantkit.records.formats.parse`.

    Raises:
        CalibrationError: it cannot be reached or found, lacks the configuration, split or revision, has a file that
            is not what the hub states, or no usable record.
    """
    builder = _builder(dataset, config, split, revision, data_files)
    # The split sizes that a data set announces are those of all its files.
    checks = "no_checks" if data_files else None
    with _translated(dataset):
        builder.download_and_prepare(verification_mode=checks)
        unchecked = _compared(dataset, builder)
        rows = builder.as_dataset(split=split).with_format("arrow")  # images and sounds stay what the files hold
        tables = rows.iter(batch_size=ROWS)
        layout = Layout(columns, tags, others)
        records, skipped = collect(
            f"{HUB_PREFIX}{dataset}", (row for table in tables for row in table.to_pylist()), layout
        )
    origin = _origin(dataset, config, split, builder.hash, columns, data_files)
    return RecordSet(dataset.split("/")[1], origin, records_sha256(records), records, skipped, unchecked)


def identify_hub(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_files: str | None = None,
) -> dict[str, Any]:
    """The origin that :func:`read_hub` would give, without the records; see there for arguments and errors."""
    builder = _builder(dataset, config, split, revision, data_files)
    return _origin(dataset, config, split, builder.hash, columns, data_files)


def _origin(
    dataset: str,
    config: str | None,
    split: str,
    commit: str,
    columns: Mapping[str, str] | None,
    data_files: str | None,
) -> dict[str, Any]:
    given = {"config": config, "columns": dict(columns) if columns else None, "data_files": data_files}
    chosen = {key: value for key, value in given.items() if value is not None}
    return {"kind": "hub", "dataset": dataset, "split": split, "revision": commit, **chosen}


def _compared(dataset: str, builder: Any) -> tuple[str, ...]:
    """Compare the files that the data set was made from with what the hub states; names of those that it could not be.

    A data set that was prepared before is taken from the library's own cache; files that the hub's cache no longer
    holds count as not compared.

    Raises:
        CalibrationError: a file is not what the hub states.
    """
    from huggingface_hub import try_to_load_from_cache

    from quantkit.source.hashes import check_files
    from quantkit.source.hub import TRANSPORT_ERROR

    lists = (builder.config.data_files or {}).values()
    places = [match for files in lists for file in files if (match := _HUB_FILE.fullmatch(str(file)))]
    found = {
        match["path"]: try_to_load_from_cache(match["id"], match["path"], revision=match["commit"], repo_type="dataset")
        for match in places
        if match["id"] == dataset
    }
    files = {path: Path(file) for path, file in found.items() if isinstance(file, str)}
    try:
        checked = check_files(
            dataset,
            files,
            builder.hash,
            errors=(OSError, TRANSPORT_ERROR),
            endpoint=os.environ.get("HF_ENDPOINT"),
            repo_type="dataset",
        )
    except SourceError as error:
        shutil.rmtree(builder.cache_dir, ignore_errors=True)  # what was made of the file; it is made again
        raise CalibrationError(error.problem, error.remedy) from error
    return tuple(sorted({*checked.unchecked, *(found.keys() - files.keys())}))


def _builder(dataset: str, config: str | None, split: str, revision: str | None, data_files: str | None) -> Any:
    """A ``DatasetBuilder``; its ``hash`` is the commit that the data set was found at."""
    if not _ID.fullmatch(dataset):
        raise CalibrationError(f"'{dataset}' is not a hub id", "write hub:org/name")
    if Path(dataset).exists():
        raise CalibrationError(
            f"hub data set '{dataset}' would be read from the local folder of that name", "run from another folder"
        )
    import datasets

    files = {split.partition("[")[0]: data_files} if data_files else None
    with _translated(dataset):
        builder = datasets.load_dataset_builder(dataset, config, data_files=files, revision=revision)
    if revision and _COMMIT.fullmatch(revision) and builder.hash != revision:
        raise CalibrationError(
            f"hub data set '{dataset}' is here at commit {builder.hash}, not at {revision}", "check the network"
        )
    return builder


@contextmanager
def _translated(dataset: str) -> Iterator[None]:
    """Turn what ``datasets`` raises for a data set that is not to be had into one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by hub version

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError, DatasetsError) as error:
        raise CalibrationError(f"cannot read the hub data set '{dataset}': {error}", _REMEDY) from error
