"""Task files of lm-evaluation-harness with local data: read without running anything that they hold.

A task file is YAML whose tag ``!function`` names Python code, and whose key ``class`` names a class. Both, and metrics
that are scripts of the Hugging Face hub, are refused unless remote code is trusted. ``include`` is followed, relative
to the file, and what is included is checked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import EvaluationError
from quantkit.system.artifacts import file_sha256
from quantkit.system.os_errors import is_file
from quantkit.system.strict_yaml import StrictLoader

LOADERS = ("arrow", "csv", "json", "parquet", "text")
"""Values of ``dataset_path`` that read local files, with ``data_files`` in ``dataset_kwargs``."""
_FUNCTION = "!function"
_CODE_KEYS = ("class", "custom_dataset")
_TRUST = "set model.trust_remote_code if you trust the code"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file as it was read.

    Attributes:
        path: the file.
        config: its keys, with those that it includes; functions stand as ``!function NAME``.
        files: the YAML files that it was read from, itself first.
        code: the places in them that name Python code.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    code: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the task calls itself."""
        return str(self.config["task"])

    @property
    def is_local(self) -> bool:
        """Whether its data are local files."""
        return self.config.get("dataset_path") in LOADERS

    def data_files(self) -> Any:
        """Its ``data_files``, with every path that is not absolute taken from the folder of the task file."""
        return _located((self.config.get("dataset_kwargs") or {}).get("data_files"), self.path.parent)

    def identity(self) -> dict[str, str]:
        """SHA-256 of the files that it depends on, by name: the YAML, the data, and code that it names."""
        data = [Path(each) for each in _flat(self.data_files())] if self.is_local else []
        code = sorted(self.path.parent.glob("*.py")) if self.code else []
        return {file.name: file_sha256(file) for file in (*self.files, *data, *code) if is_file(file)}

    def check(self, *, trusted: bool) -> None:
        """Refuse code that is not trusted, and data files that are not there.

        Raises:
            EvaluationError: with the place in the file.
        """
        if self.code and not trusted:
            raise EvaluationError(f"task file {self.code[0]}, which is Python code", f"take it out, or {_TRUST}")
        if self.is_local:
            given = _flat(self.data_files())
            if not given:
                remedy = "give dataset_kwargs: {data_files: {test: data.jsonl}}"
                raise EvaluationError(f"task file {self.path} names no data files", remedy)
            for file in given:
                if not is_file(Path(file)):
                    raise EvaluationError(f"task file {self.path}: there is no data file {file}", "check the path")


def read_task(path: Path) -> TaskFile:
    """Read a task file.

    Raises:
        EvaluationError: it cannot be read, is not YAML, or holds no single task.
    """
    files: list[Path] = []
    code: list[str] = []
    config = _merged(path, files, code)
    if not isinstance(config.get("task"), str):
        remedy = "a task file has 'task: name' at its top; name a group's tasks one by one in the recipe"
        raise EvaluationError(f"task file {path} is not that of a single task", remedy)
    return TaskFile(path, config, tuple(files), tuple(code))


def _merged(path: Path, files: list[Path], code: list[str]) -> dict[str, Any]:
    """The keys of a file over those of the files that it includes."""
    if files and not is_file(path):
        raise EvaluationError(f"task file {files[-1]}: there is no {str(path)!r} to include", "check the path")
    if path.resolve() in [each.resolve() for each in files]:
        raise EvaluationError(f"task file {path} includes itself", "take the include out")
    files.append(path)
    config = _parsed(path, code)
    given = config.pop("include", [])
    found: dict[str, Any] = {}
    for each in given if isinstance(given, list) else [given]:
        found |= _merged(path.parent / str(each), files, code)
    return found | config


def _parsed(path: Path, code: list[str]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(path, code))
    except OSError as error:
        raise EvaluationError(f"cannot read task file {path}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvaluationError(f"task file {path} is not valid YAML: {error}", "see docs/evaluation.md#tasks") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"task file {path} is not a mapping", "see docs/evaluation.md#tasks")
    for key, wanted in (("dataset_kwargs", dict), ("metric_list", list)):
        if not isinstance(config.get(key) or wanted(), wanted):
            what = "mapping" if wanted is dict else "list"
            raise EvaluationError(f"task file {path}: '{key}' is not a {what}", "see docs/evaluation.md#tasks")
    code += [f"{path}: '{key}' names {config[key]}" for key in _CODE_KEYS if key in config]
    if config.get("unsafe_code"):
        code.append(f"{path}: 'unsafe_code' runs what the model writes")
    for metric in config.get("metric_list") or []:
        if isinstance(metric, Mapping) and metric.get("hf_evaluate"):
            code.append(f"{path}: metric '{metric.get('metric')}' is a script of the hub")
    return config


def _loader(path: Path, code: list[str]) -> type[StrictLoader]:
    """A safe loader that notes each function that the file names, and resolves none."""

    class Loader(StrictLoader):
        """Of this file."""

    def note(loader: StrictLoader, node: yaml.Node) -> str:
        line = node.start_mark.line + 1
        text = f"{_FUNCTION} {getattr(node, 'value', '')}"
        code.append(f"{path}, line {line}: '{text}'")
        return text

    Loader.add_constructor(_FUNCTION, note)
    return Loader


def _located(given: Any, folder: Path) -> Any:
    if isinstance(given, str):
        return str(folder / given)
    if isinstance(given, Mapping):
        return {key: _located(value, folder) for key, value in given.items()}
    return [_located(value, folder) for value in given] if isinstance(given, list) else given


def _flat(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    values = given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else []
    return [each for value in values for each in _flat(value)]
