"""Values that go to a machine whose folders lie elsewhere: pickled, with the paths in them told by names of folders."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.recipe import AutoSpec, EvaluationSpec
from quantkit.recipe.local_files import scoring_files

Roots = Mapping[str, Path]
"""Folders, or files, by names that both machines know."""


@dataclass(slots=True)
class Packed:
    """A value on its way.

    Attributes:
        content: its pickle.
        paths: those in it that lie below a root, as the root's name and the path from there.
        files: those that recipes name as texts, and that are read where the value goes.
    """

    content: bytes = b""
    paths: set[tuple[str, str]] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def packed(value: Any, roots: Roots) -> Packed:
    """Pickle a value, with paths below ``roots`` told from there."""
    into, found = io.BytesIO(), Packed()
    _Pickler(into, roots, found).dump(value)
    found.content = into.getvalue()
    return found


def unpacked(content: bytes, roots: Roots) -> Any:
    """The value, with its paths below the roots of this machine."""
    return _Unpickler(io.BytesIO(content), roots).load()


class _Pickler(pickle.Pickler):
    def __init__(self, into: io.BytesIO, roots: Roots, found: Packed) -> None:
        super().__init__(into, protocol=pickle.HIGHEST_PROTOCOL)
        self._roots = {name: place.absolute() for name, place in roots.items()}
        self._found = found

    def persistent_id(self, value: Any) -> tuple[str, str] | None:
        """A path's root, and the path from there."""
        if isinstance(value, Path):
            path = value.absolute()
            for name, place in self._roots.items():
                if path.is_relative_to(place):
                    told = name, path.relative_to(place).as_posix()
                    self._found.paths.add(told)
                    return told
        elif isinstance(value, EvaluationSpec | AutoSpec):
            self._found.files.update(_files_of(value))
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: io.BytesIO, roots: Roots) -> None:
        super().__init__(content)
        self._roots = roots

    def persistent_load(self, told: tuple[str, str]) -> Path:
        """A path below a root of this machine."""
        name, path = told
        return self._roots[name] / path


def _files_of(spec: EvaluationSpec | AutoSpec) -> Iterator[str]:
    if isinstance(spec, AutoSpec):
        yield from () if spec.allocation is None else (spec.allocation,)
    else:
        yield from (each.path for each in scoring_files(spec))
