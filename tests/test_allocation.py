"""Allocations: a choice for every unit, on disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.allocation.table import Allocation, Unit
from quantkit.errors import RecipeError
from quantkit.system.artifacts import read_json, write_json

UNITS = (
    Unit(("a.q", "a.k"), 200, {"int2": 0.5, "int4": 0.1}, {"int2": 50, "int4": 100}),
    Unit(("a.o",), 100, {"int4": 0.2}, {"int4": 50}),
)
GIVEN = Allocation({"int2": {"bits": 2}, "int4": {"bits": 4}}, UNITS, ("int2", "int4"), {"budget": {"bytes": 100}})


def test_it_tells_what_it_is_predicted_to_cost() -> None:
    assert GIVEN.predicted == pytest.approx(0.7)
    assert GIVEN.nbytes == 100
    assert GIVEN.bits_per_weight == pytest.approx(800 / 300)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    GIVEN.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == Allocation(
        GIVEN.choices, list(UNITS), GIVEN.chosen, GIVEN.facts
    )


def test_a_choice_can_be_changed_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "allocation.json"
    GIVEN.save(file)
    data = read_json(file)
    data["units"][0]["choice"] = "int4"
    write_json(file, data)
    assert Allocation.load(file).chosen == ("int4", "int4")
    data["units"][1]["choice"] = "int2"
    write_json(file, data)
    with pytest.raises(RecipeError, match=r"a\.o has no choice 'int2'"):
        Allocation.load(file)
    write_json(file, [1])
    with pytest.raises(RecipeError, match="is no allocation"):
        Allocation.load(file)
