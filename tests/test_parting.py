"""How a walk that variants share is dealt to workers: no pass of the calibration set more than pays, longest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from quantkit.pipeline.parting import parted, unknown_seconds
from quantkit.recipe import VariantSpec

OWN = {"gptq": 10.0, "awq": 20.0, "rtn": 1.0, "hqq": 6.0, "awq+gptq": 22.0}
VARIANTS = [VariantSpec.model_validate({"name": name.replace("+", "-"), "method": name}) for name in OWN]


def seconds(passes: float) -> Callable[[Sequence[VariantSpec]], float]:
    """What walks take: the passes where any variant asks for them, and what each method takes."""

    def takes(variants: Sequence[VariantSpec]) -> float:
        own = sum(OWN[variant.name.replace("-", "+")] for variant in variants)
        return own + (passes if any(variant.calibrated for variant in variants) else 0.0)

    return takes


def dealt(workers: int, passes: float, beside: float = 0.0) -> list[list[str]]:
    """The parts by the names of their variants."""
    found = parted(range(len(VARIANTS)), VARIANTS, workers, seconds(passes), beside)
    return [[VARIANTS[place].name for place in part] for part in found]


def test_one_worker_walks_once() -> None:
    assert dealt(1, 30) == [["gptq", "awq", "rtn", "hqq", "awq-gptq"]]


def test_what_needs_no_calibration_goes_apart_and_the_passes_are_made_once_where_scoring_takes_longer() -> None:
    assert dealt(2, 30, beside=200) == [["gptq", "awq", "awq-gptq"], ["rtn", "hqq"]]


def test_a_walk_that_would_be_waited_for_is_parted() -> None:
    assert dealt(2, 5) == [["gptq", "awq"], ["awq-gptq"], ["rtn", "hqq"]]


def test_passes_that_take_longer_than_all_methods_are_not_made_twice() -> None:
    assert dealt(2, 1000) == [["gptq", "awq", "awq-gptq"], ["rtn", "hqq"]]


@pytest.mark.parametrize("workers", [2, 3, 5, 64])
def test_every_variant_is_in_one_part_and_the_longest_parts_come_first(workers: int) -> None:
    found = parted(range(len(VARIANTS)), VARIANTS, workers, unknown_seconds)
    assert sorted(place for part in found for place in part) == list(range(len(VARIANTS)))
    assert all(part == sorted(part) for part in found)
    takes = [unknown_seconds([VARIANTS[place] for place in part]) for part in found]
    assert takes == sorted(takes, reverse=True)
