"""Registries: names to classes, and plugins that cannot be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from quantkit.errors import MissingDependencyError, QuantkitError, RecipeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.system.registry import Registry
from quantkit.transforms import TRANSFORMS


class Thing:
    name: ClassVar[str] = "thing"


class Other(Thing):
    name = "other"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package ``sample_parts`` without modules."""
    folder = tmp_path / "sample_parts"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "sample_parts"]:
        del sys.modules[name]


@pytest.fixture
def parts(package: Path) -> Registry[Thing]:
    return Registry("part", "sample_parts", "quantkit.sample_parts")


def plug_in(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr("quantkit.system.registry.entry_points", entry_points)


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group="quantkit.sample_parts")


def test_what_is_registered_is_found_sorted_by_name(parts: Registry[Thing]) -> None:
    assert parts.register(Thing) is Thing
    parts.register(Other)
    assert parts.names() == ["other", "thing"]
    assert list(parts) == [Other, Thing]
    assert parts.get("thing") is Thing


def test_registering_a_class_again_changes_nothing_and_another_of_its_name_is_a_bug(parts: Registry[Thing]) -> None:
    parts.register(Thing)
    parts.register(Thing)
    with pytest.raises(RuntimeError, match="two implementations of part 'thing'"):
        parts.register(type("Imposter", (Thing,), {}))


def test_an_unknown_name_gets_the_nearest(parts: Registry[Thing]) -> None:
    parts.register(Thing)
    with pytest.raises(RecipeError, match=r"unknown part 'thng' \(did you mean 'thing'\? known: thing\)"):
        parts.get("thng")


def test_modules_of_the_package_are_imported_on_first_use_but_not_private_ones(
    package: Path, parts: Registry[Thing]
) -> None:
    (package / "one.py").write_text("LOADED = True")
    (package / "_private.py").write_text("raise RuntimeError('imported')")
    (package / "base.py").write_text("raise RuntimeError('imported')")
    assert "sample_parts.one" not in sys.modules
    parts.names()
    assert "sample_parts.one" in sys.modules


def test_a_module_that_fails_fails_every_time(package: Path, parts: Registry[Thing]) -> None:
    """A second look must not find a registry with half its entries."""
    (package / "one.py").write_text("raise RuntimeError('broken module')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken module"):
            parts.names()


def test_an_installed_plugin_is_found(monkeypatch: pytest.MonkeyPatch, parts: Registry[Thing]) -> None:
    plug_in(monkeypatch, point("other", f"{__name__}:Other"))
    assert parts.get("other") is Other
    assert parts.broken() == {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [("no_such_package.part:Part", "no_such_package"), (f"{__name__}:Absent", "Absent")],
)
def test_a_plugin_that_cannot_be_imported_says_why(
    monkeypatch: pytest.MonkeyPatch, parts: Registry[Thing], value: str, reason: str
) -> None:
    parts.register(Thing)
    plug_in(monkeypatch, point("lost", value))
    assert parts.names() == ["thing"]
    assert reason in parts.broken()["lost"]
    with pytest.raises(QuantkitError, match=f"part 'lost' cannot be used: .*{reason}"):
        parts.get("lost")


def test_a_plugin_without_its_dependency_gives_the_command(
    package: Path, monkeypatch: pytest.MonkeyPatch, parts: Registry[Thing]
) -> None:
    error = MissingDependencyError("fancy", "the fancy part")
    (package / "_needy.py").write_text(
        "from quantkit.errors import MissingDependencyError\nraise MissingDependencyError('fancy', 'the fancy part')"
    )
    plug_in(monkeypatch, point("fancy", "sample_parts._needy:Part"))
    with pytest.raises(QuantkitError, match="pip install fancy"):
        parts.get("fancy")
    assert str(error) in parts.broken()["fancy"]


def test_everything_that_ships_is_usable_and_described() -> None:
    assert {"gptq", "rtn"} <= set(METHODS.names())
    assert "compressed-tensors" in FORMATS.names()
    assert METHODS.broken() == {}
    assert FORMATS.broken() == {}
    for method in METHODS:
        assert method.summary
        assert method.source
        assert method.Options().model_dump() is not None
    assert TRANSFORMS.names() == ["affine", "awq", "hadamard", "rotate", "smoothquant"]
    for transform in TRANSFORMS:
        assert transform.summary
        assert transform.source
        assert transform.Options().model_dump() is not None
    for store in FORMATS:
        assert store.summary
        assert store.runtimes
