"""The page on large models has the numbers that the planner gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TITLES = ("Llama 3.1 70B", "Llama 3.1 405B", "Qwen3 235B-A22B", "DeepSeek-V3")
PUBLISHED = {
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_419_200,
}
"""Parameters; of DeepSeek-V3 without the module that predicts a further token."""


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale as found

    return found


def assert_on_the_page(scale: Any, title: str) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    printed = scale.tables([title], scale.CARDS["h100"], 128 * 512).splitlines()
    rows = [line for line in printed if line.startswith(f"| {title} |")]
    assert len(rows) >= 11
    assert [row for row in rows if row not in page] == []


def test_the_page_has_what_the_planner_says_of_a_70b(scale: Any) -> None:
    assert_on_the_page(scale, TITLES[0])


def test_a_walk_of_a_70b_is_counted_as_by_the_model_of_the_time(scale: Any) -> None:
    import gpu_time

    counted = gpu_time.parts(gpu_time.MODELS["70B"], 65536)
    found = scale.work("llama-3.1-70b", 65536, 1.0)
    for part in ("forward passes", "Gram matrices", "products of the solver", "loops over columns"):
        ours, theirs = (each[part].seconds(scale.CARDS["h100"]) for each in (found, counted))
        assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("title", TITLES[1:])
def test_the_page_has_what_the_planner_says_of_the_others(scale: Any, title: str) -> None:
    from quantkit.estimation import anatomy_of

    assert anatomy_of(scale.MODELS[title]).parameters == PUBLISHED[scale.MODELS[title]]
    assert_on_the_page(scale, title)
