"""Reports and their figures that are not what they claim."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place


def rendered(place: Place, content: str | bytes) -> list[str]:
    return ["report", str(place.write("report.json", content)), "--out", place.out]


def report(place: Place, **changes: Any) -> list[str]:
    return rendered(place, json.dumps({"schema": 1, "name": "x", "variants": [], **changes}))


@case("not JSON")
def nothing(place: Place) -> list[str]:
    return rendered(place, "")


@case("not JSON")
def deep(place: Place) -> list[str]:
    return rendered(place, "[" * 200_000)


@case("not JSON")
def not_utf8(place: Place) -> list[str]:
    return rendered(place, b'{"schema": "\xff"}')


@case("schema")
def a_list(place: Place) -> list[str]:
    return rendered(place, "[]")


@case("schema 99")
def of_the_future(place: Place) -> list[str]:
    return report(place, schema=99)


@case("is not a whole report")
def variants_that_are_text(place: Place) -> list[str]:
    return report(place, variants="many")


@case("is not a whole report")
def variants_that_are_numbers(place: Place) -> list[str]:
    return report(place, variants=[1, 2])


@case("is not a whole report")
def a_baseline_that_is_a_list(place: Place) -> list[str]:
    return report(place, baseline=[1], model="x", environment=5, variants=[{"name": "a"}])


@case("cannot be rendered: AttributeError")
def a_library_that_is_text(place: Place) -> list[str]:
    return report(place, variants=[{"name": "a", "library": "x"}])
