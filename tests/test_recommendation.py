"""The recommendation: what someone should take, whatever else was tried, and the same wherever it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantkit.errors import RecipeError
from quantkit.recipe import Recipe
from quantkit.report import evaluate_gates, noted, recommend, rounding_lines, table, write
from quantkit.report.choice import findings
from tests.report_rows import report_of, row

INT8, INT4, INT3 = row("int8", 0.62, 0.002), row("int4", 0.42, 0.06), row("int3", 0.37, 0.6, 15.2)


def gated(report: dict[str, Any], *gates: str) -> dict[str, Any]:
    return {**report, "gates": evaluate_gates(list(gates), report["variants"])}


def test_the_smallest_that_meets_every_gate_is_not_taken_where_it_is_broken() -> None:
    report = gated(report_of(INT8, INT4, INT3), "kl_divergence.mean <= 1.5")
    found = recommend(report)
    assert found.variant == "int4"
    assert found.why == "knee"
    assert found.broken == {"int3": "perplexity +52% on prose"}
    assert "int8 would take" in found.reason
    assert "0.058 nats per token less" in found.reason
    smallest = next(each for each in findings(report) if each.label == "Smallest that meets every gate")
    assert (smallest.name, "broken: perplexity +52%" in smallest.aside) == ("int3", True)


def test_a_row_that_loses_more_than_plain_rounding_says_so() -> None:
    def made(name: str, kl: float, **more: Any) -> dict[str, Any]:
        return {**row(name, 0.42, kl, stderr=0.01), "notes": ["seen"], **more}

    rows = [
        made("searched", 0.24, method="rtn"),
        made("plain", 0.30, method="gptqmodel rtn"),
        made("tuned", 0.375, method="autoround"),
        made("close", 0.26),  # within two standard errors of the difference
        made("better", 0.1),
        made("coarser", 0.9, scheme="int3 g64 sym"),
        made("smoothed", 0.9, method="smoothing+rtn", scheme="int2 g64 sym"),
    ]
    report = report_of(*rows)
    how = "KL divergence 0.38 ± 0.01 on prose, where searched has 0.24 ± 0.01"
    assert rounding_lines(report) == [f"worse than plain rounding: tuned: {how}"]
    told = {each["name"]: each["notes"] for each in noted(report)["variants"]}
    assert told.pop("tuned") == [f"worse than plain rounding: {how}", "seen"]
    assert set(map(tuple, told.values())) == {("seen",)}
    unsure = report_of(*({**each, "metrics": {"perplexity": {"prose": 11.0}}} for each in rows))
    assert noted(unsure) == unsure, "a perplexity has no standard error"


def test_what_else_was_tried_moves_nothing() -> None:
    alone = recommend(report_of(INT8, INT4)).variant
    useless = [row("int2", 0.3, 0.39), row("awful", 0.2, 9.0), row("large", 0.99, 0.0019)]
    assert alone == recommend(report_of(INT8, INT4, *useless)).variant == "int4"


@pytest.mark.parametrize(("kl", "taken"), [(0.03, "int4"), (0.2, "int8")])
def test_two_variants_are_weighed_by_what_their_difference_costs(kl: float, taken: str) -> None:
    assert recommend(report_of(row("int8", 0.55, 0.001), row("int4", 0.3, kl))).variant == taken


def test_perplexity_serves_where_no_divergence_was_measured() -> None:
    report = report_of(row("a", 0.5, None, 10.01), row("b", 0.3, None, 10.2), row("c", 0.25, None, 16.0))
    found = recommend(report)
    assert (found.variant, list(found.broken)) == ("b", ["c"])
    assert "perplexity 10.20 (+2.00%)" in found.figures


def test_within_a_budget_the_least_loss_is_taken() -> None:
    rows = [INT8, INT4, row("int4-large", 0.45, 0.05)]
    budget = {"recipe": {"budget": {"size": 460_000_000, "memory": None}}}
    assert recommend(report_of(*rows, **budget)).variant == "int4-large"
    assert recommend(report_of(*rows, **budget)).why == "budget"
    by_gate = recommend(gated(report_of(*rows), "size_bytes <= 460MB"))
    assert (by_gate.variant, "fits size_bytes <= 460MB" in by_gate.reason) == ("int4-large", True)
    served = [{**each, "server": {"bytes_with_device": size}} for each, size in zip(rows, (9, 5, 7), strict=True)]
    assert recommend(report_of(*served, recipe={"budget": {"memory": 6}})).variant == "int4"
    assert recommend(report_of(*served, recipe={"budget": {"memory": 100}})).variant == "int8"


def test_of_those_that_noise_makes_alike_the_smaller_fits_better() -> None:
    rows = [row("a", 0.45, 0.050, stderr=0.004), row("b", 0.42, 0.053, stderr=0.004)]
    found = recommend(report_of(*rows, recipe={"budget": {"size": 10**9}}))
    assert (found.variant, "a loses no less that could be told" in found.reason) == ("b", True)


def test_nothing_is_recommended_where_nothing_will_do_and_it_says_why() -> None:
    assert "Every variant is broken" in recommend(report_of(INT3)).reason
    missed = recommend(gated(report_of(INT8, INT4), "kl_divergence.mean <= 0.0001"))
    assert (missed.variant, "No variant meets every gate. The smallest, int4" in missed.reason) == (None, True)
    small = recommend(report_of(INT8, recipe={"budget": {"size": 1000}}))
    assert "No variant fits 1000 B on disk" in small.reason.replace(",", "")
    unscored = {**INT8, "metrics": {}}
    assert "No loss was measured" in recommend(report_of(unscored)).reason
    not_finite = {**INT4, "metrics": {"perplexity": {"prose": None}}}
    assert recommend(report_of(INT8, not_finite)).broken == {"int4": "perplexity on prose is not finite"}


def test_the_float_model_merged_into_the_other_base_is_no_choice() -> None:
    other = row("merged-nf4", 1.0, 0.001)
    assert recommend(report_of(INT3, other, recipe={"merge": {"compare": "nf4"}})).variant is None


def test_all_pages_say_the_same(tmp_path: Path) -> None:
    report = report_of(INT8, INT4, INT3)
    write({**report, "recommendation": recommend(report).to_json()}, tmp_path, ("html", "md"))
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    told = json.loads((tmp_path / "report.json").read_text())["recommendation"]
    assert told["variant"] == "int4"
    assert "**Recommended: `int4`**" in markdown
    assert "| `int3` (broken) |" in markdown
    assert '<p class="label">Recommended</p><p class="answer">int4</p>' in page
    assert ">broken</span>" in page
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as printed:
        console.print(table(report))
    assert "int4 (recommended)" in printed.get()
    assert "int3 (broken)" in printed.get()
    assert "recommended: int4" in recommend(report).lines()[0]


def test_a_budget_is_read_with_its_units_and_refused_without_sense() -> None:
    text = "name: x\nmodel: {source: m}\nvariants: [{name: a}]\nbudget: {size: 4GiB, memory: 8 GB}\n"
    budget = Recipe.parse(text).budget
    assert (budget.size, budget.memory, budget.context) == (4 * 2**30, 8 * 10**9, 4096)
    with pytest.raises(RecipeError, match="'much' is not a size"):
        Recipe.parse(text.replace("4GiB", "much"))
