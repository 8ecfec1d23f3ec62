"""Data sets of LLaMA-Factory: an entry of a ``dataset_info.json``, read as it stands.

The layout is the one of ``data/README.md`` of https://github.com/hiyouga/LLaMA-Factory: where the data lie, whether
rows are alpaca's or conversations, how their columns are called, and by which tags a conversation tells its roles. Of
preferences the chosen side is read.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import CalibrationError, did_you_mean
from quantkit.records.dataset import Layout, RecordSet
from quantkit.records.files import identify_file, read_file
from quantkit.records.hub import identify_hub, read_hub

LLAMAFACTORY_PREFIX = "llamafactory:"
INFO = "dataset_info.json"
USUAL_FOLDER = "data"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
READ_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", "images", "chosen", "kto_tag")
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""LLaMA-Factory's tags, and what each is where an entry does not say."""
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}
MEDIA = ("videos", "audios")


class DatasetEntry(BaseModel):
    """An entry of ``dataset_info.json``; keys beside these are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    file_name: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(default=None, ge=1)
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None

    def layout(self) -> Layout:
        """How its rows call what a record has; columns that it does not name are not read."""
        columns, tags = self.columns or {}, {tag: name for tag, name in (self.tags or {}).items() if name}
        read = {name: column for name, column in columns.items() if column and name in READ_COLUMNS}
        if self.formatting == "alpaca":
            return Layout(dict(ALPACA_COLUMNS) if self.columns is None else read, tags, others=False)
        usual = OPENAI_TAGS if self.formatting == "openai" else SHAREGPT_TAGS
        return Layout({"messages": "conversations", **read}, usual | tags, others=False)


def read_llamafactory(reference: str) -> RecordSet:
    """Read ``DIR/NAME``: the entry NAME of ``DIR/dataset_info.json``; without DIR that of ``data/``.

    With ``num_samples`` the first so many rows are read.

    Raises:
        CalibrationError: there is no such entry, it is of a kind that cannot calibrate, or its data cannot be read.
    """
    folder, name = _split(reference)
    entry = _entry(folder, name)
    if entry.hf_hub_url:
        arguments: dict[str, Any] = _hub_arguments(entry)
        found = read_hub(entry.hf_hub_url, **arguments, tags=entry.layout().tags, others=False)
    else:
        found = read_file(_file(folder, entry), layout=entry.layout(), base=folder)
    return replace(_first(found, entry.num_samples), name=name, origin=_with_entry(found.origin, entry))


def identify_llamafactory(reference: str) -> dict[str, Any]:
    """The origin that :func:`read_llamafactory` would give, without the records; see there."""
    folder, name = _split(reference)
    entry = _entry(folder, name)
    if entry.hf_hub_url:
        return _with_entry(identify_hub(entry.hf_hub_url, **_hub_arguments(entry)), entry)
    return _with_entry(identify_file(_file(folder, entry), columns=entry.layout().columns), entry)


def _split(reference: str) -> tuple[Path, str]:
    folder, _, name = reference.rpartition("/")
    return Path(folder or USUAL_FOLDER).expanduser(), name


def _entry(folder: Path, name: str) -> DatasetEntry:
    file = folder / INFO
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        remedy = f"write {LLAMAFACTORY_PREFIX}DIR/NAME, where DIR holds {INFO}"
        raise CalibrationError(f"cannot read {file}: {error.strerror}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{file} is not valid JSON: {error}", "mend it") from error
    if not isinstance(entries, dict) or name not in entries:
        known = sorted(entries) if isinstance(entries, dict) else []
        raise CalibrationError(f"{file} has no data set '{name}'", did_you_mean(name, known))
    try:
        entry = DatasetEntry.model_validate(entries[name])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CalibrationError(f"{file}: {name}.{place}: {first['msg']}", "mend it") from error
    _check(entry, f"data set '{name}' of {file}")
    return entry


def _check(entry: DatasetEntry, what: str) -> None:
    columns = entry.columns or {}
    media = next((column for column in MEDIA if columns.get(column)), None)
    if media:
        raise CalibrationError(f"{what} holds {media}", "choose one of texts, or of texts and images")
    if entry.script_url:
        raise CalibrationError(f"{what} is made by a script, which is not run", "convert it to a JSON file")
    if not entry.hf_hub_url and not entry.file_name:
        raise CalibrationError(f"{what} lies neither in a file nor on the Hugging Face hub", "download it to a file")
    if entry.hf_hub_url and entry.folder:
        raise CalibrationError(f"{what} lies in a folder of its hub repository", "download it to a file")


def _file(folder: Path, entry: DatasetEntry) -> Path:
    return folder / str(entry.file_name)


def _hub_arguments(entry: DatasetEntry) -> dict[str, Any]:
    return {"config": entry.subset, "split": entry.split, "columns": entry.layout().columns}


def _first(found: RecordSet, count: int | None) -> RecordSet:
    if count is None:
        return found
    kept = [record for record, index in zip(found.records, found.indices(), strict=True) if index < count]
    if not kept:
        raise CalibrationError(
            f"data set '{found.name}': none of its first {count} rows can be used", "raise num_samples"
        )
    return replace(found, records=kept, skipped=[row for row in found.skipped if row.index < count])


def _with_entry(origin: dict[str, Any], entry: DatasetEntry) -> dict[str, Any]:
    return {**origin, "entry": entry.model_dump(exclude_defaults=True)}
