"""Mixes in a report: what each layer got, predicted beside measured loss, and what others lose at the same size."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from quantkit.report import mix_lines, recommend, rounding_lines
from quantkit.report.bits_map import bits_maps
from quantkit.report.choice import findings
from quantkit.report.columns import scheme_name
from quantkit.report.markdown import render_markdown
from quantkit.report.mixes import Beside, families, mix_sentences, mix_tables, others_at, others_on, rank_correlation
from quantkit.report.numbers import ABSENT, MINUS
from quantkit.report.page import render_html
from quantkit.report.plot import build_plot
from quantkit.schemes.mix import mix_of
from tests.report_rows import WHOLE, allocation, mixed_row, report_of, row


def block(number: int, qkv: str, down: str) -> dict[str, str]:
    stem = f"model.layers.{number}"
    tied = "+".join(f"{stem}.self_attn.{name}_proj" for name in "qkv")
    return {tied: qkv, f"{stem}.mlp.down_proj": down}


THREE = {**block(0, "int4", "int8"), **block(1, "int3", "int4"), **block(2, "int3", "float"), "lm_head": "int8"}


# --- bits by layer


def test_a_strip_shows_what_every_layer_got() -> None:
    report = report_of(mixed_row("mix-4", 0.3, 0.02, chosen=THREE))
    (found,) = bits_maps(report)
    (strip,) = found.strips
    assert (strip.title, strip.first, strip.last) == ("", 0, 2)
    assert [label for label, _ in strip.rows] == ["q_proj", "k_proj", "v_proj", "down_proj"]
    levels = {(label, at): box.level for label, boxes in strip.rows for at, box in enumerate(boxes)}
    assert [levels["k_proj", at] for at in range(3)] == [2, 1, 1]
    assert [levels["down_proj", at] for at in range(3)] == [5, 2, 6]
    assert [box.x for box in strip.rows[0][1]] == ["0.00%", "33.33%", "66.67%"]
    assert strip.rows[3][1][0].tip == "model.layers.0.mlp.down_proj: int8: 8.50 bits a weight"
    assert found.outside == [(5, "lm_head", "int8: 8.50 bits a weight")]
    assert [cells[:3] for _, cells in found.parts] == [
        ["int3", "3.50", "6"],
        ["int4", "4.50", "4"],
        ["int8", "8.50", "2"],
        ["float", "16.00", "1"],
    ]
    assert found.parts[0][1][3:] == ["24.6 K", "10.5 KiB"]
    html, markdown = render_html(report), render_markdown(report)["report.md"]
    assert "<title>model.layers.2.mlp.down_proj: float: 16.00 bits a weight</title>" in html
    assert html.count('<rect class="b1"') == 6 + 1 + 1  # and the legend's, and the table's
    assert "| int3 | 3.50 | 6 | 24.6 K | 10.5 KiB |" in markdown
    assert "| `q_proj` | int3 in 2, int4 in 1 | 3.50 to 4.50 | `433` |" in markdown
    assert "| `down_proj` | int4 in 1, int8 in 1, float in 1 | 4.50 to 16.00 | `84f` |" in markdown


def test_experts_share_a_box_and_blocks_without_a_kind_are_blank() -> None:
    experts = {f"model.layers.2.mlp.experts.{number}.up_proj": "int3" if number else "int8" for number in range(4)}
    chosen = {**block(0, "int4", "int8"), **experts, "visual.blocks.0.mlp.fc1": "int4", "visual.blocks.0.x.fc1": "int4"}
    report = report_of(mixed_row("mix-4", 0.3, 0.02, chosen=chosen))
    (found,) = bits_maps(report)
    assert [(strip.title, strip.last) for strip in found.strips] == [("model.layers", 2), ("visual.blocks", 0)]
    ((label, boxes),) = [line for line in found.strips[0].rows if line[0] == "up_proj"]
    assert (label, [box.x for box in boxes]) == ("up_proj", ["66.67%"])
    tip = "model.layers.2.mlp.experts.*.up_proj: int8 in 1, int3 in 3: 4.75 bits a weight"
    assert boxes[0].tip == tip
    kinds = {label: digits for label, _, _, digits in found.kinds}
    assert kinds["model.layers up_proj"] == "··4"
    assert kinds["model.layers down_proj"] == "8··"
    assert f"<title>{tip}</title>" in render_html(report)


def test_bits_are_not_written_where_there_is_no_room() -> None:
    def boxes(blocks: int) -> str:
        chosen = {f"model.layers.{at}.mlp.down_proj": "int4" for at in range(blocks)}
        return render_html(report_of(mixed_row("mix-4", 0.3, 0.02, chosen=chosen)))

    assert '<svg class="bits" height="16"' in boxes(20)
    assert '<svg class="bits many" height="16"' in boxes(21)
    assert boxes(48).count('<text class="t2"') == 48
    assert '<text class="t2"' not in boxes(49)


def test_names_from_outside_are_texts_and_what_is_no_allocation_shows_nothing() -> None:
    evil = "<script>alert(1)</script>|`x`"
    report = report_of(mixed_row("mix-4", 0.3, 0.02, chosen={f"model.layers.0.{evil}": "int4", "b": "int3"}))
    assert "<script" not in render_html(report)
    assert "<script" not in re.sub(r"(`+).*?\1", "", render_markdown(report)["report.md"])
    units: list[Any] = [[], [{"layers": ["a"], "choice": "int4"}], [None]]
    junk: list[Any] = [None, {}, [], *({"units": each} for each in units)]
    for broken in junk:
        assert mix_of(broken) is None
    report = report_of(row("plain", 0.3, 0.02) | {"allocation": junk[-1]})
    assert "Mixed schemes" not in render_html(report) + render_markdown(report)["report.md"]
    assert mix_lines(report) == []


# --- predicted beside measured


def measured(*pairs: tuple[float, float]) -> list[Beside]:
    return [Beside(f"m{at}", at, loss, None, predicted, None) for at, (predicted, loss) in enumerate(pairs)]


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation(measured((1, 10), (2, 30), (3, 20), (4, 40))) == pytest.approx(0.8)
    assert rank_correlation(measured((1, 1), (2, 8), (3, 27))) == pytest.approx(1)
    assert rank_correlation(measured((1, 3), (2, 2), (3, 1))) == pytest.approx(-1)
    assert rank_correlation(measured((1, 1), (1, 2), (3, 3))) == pytest.approx(math.sqrt(3) / 2)
    assert rank_correlation(measured((1, 1), (2, 2))) is None
    assert rank_correlation(measured((1, 1), (1, 2), (1, 3))) is None


@pytest.mark.parametrize(
    ("losses", "told", "meaning"),
    [
        ((0.021, 0.012, 0.0055), "1.05 to 1.20 times the predicted; rank correlation 1.00 of 3", "predictions hold"),
        ((0.08, 0.02, 0.006), "1.20 to 4.00 times the predicted; rank correlation 1.00", "Their order holds"),
        ((0.021, 0.05, 0.06), "1.05 to 12 times the predicted; rank correlation -1.00", "does not hold everywhere"),
    ],
)
def test_it_is_told_what_predicted_and_measured_apart_mean(losses: tuple[float, ...], told: str, meaning: str) -> None:
    rows = [
        mixed_row(f"mix-{size}", size / 10, loss, predicted)
        for size, loss, predicted in zip((3, 4, 5), losses, (0.02, 0.01, 0.005), strict=True)
    ]
    report = report_of(*rows)
    found = " ".join(mix_sentences(mix_tables(report)))
    assert told.replace("-1", f"{MINUS}1") in found
    assert meaning in found
    assert told.replace("-1", f"{MINUS}1") in render_html(report)
    assert found.split(". ")[0] in " ".join(mix_lines(report))


def test_one_mix_alone_has_its_ratio_and_no_order() -> None:
    report = report_of(mixed_row("mix-4", 0.3, 0.05, predicted=0.02))
    (line,) = mix_tables(report)[0].rows
    assert line.ratio == pytest.approx(2.5)
    assert line.cells == ["286.1 MiB", "0.05000 ± 0.00010", "0.0200", "2.50", ABSENT, ABSENT, "none near in size"]
    found = " ".join(mix_sentences(mix_tables(report)))
    assert "rank correlation" not in found
    assert "it needs the order of the costs alone" in found


# --- at equal size


def given(*rows: dict[str, Any]) -> dict[str, Any]:
    return report_of(row("int3", 0.2, 0.16), row("int4", 0.3, 0.04), row("int8", 0.5, 0.0004), *rows)


def test_between_two_sizes_the_logarithm_of_the_loss_is_interpolated() -> None:
    found = others_at(others_on(given(), "prose"), 0.25 * WHOLE)
    assert found is not None
    assert found.loss == pytest.approx(0.08)
    assert found.words == "between int3 and int4"
    quarter = others_at(others_on(given(), "prose"), 0.35 * WHOLE)
    assert quarter is not None
    assert quarter.loss == pytest.approx(0.04 * 0.01**0.25)


@pytest.mark.parametrize(
    "row",
    [
        row("poor", 0.26, 0.3),  # int3 is smaller and closer
        mixed_row("mix-3.7", 0.26, 0.01),
        row("trained", 0.26, 0.01) | {"original": "int3"},
        row("float", 0.26, 0.01) | {"method": "none"},
        row("broken", 0.26, 0.01) | {"status": "failed"},
    ],
)
def test_what_is_beaten_or_has_no_scheme_of_its_own_is_not_compared_with(row: dict[str, Any]) -> None:
    found = others_at(others_on(given(row), "prose"), 0.25 * WHOLE)
    assert found is not None
    assert found.words == "between int3 and int4"


def test_beyond_what_was_measured_nothing_is_said_but_of_sizes_that_are_near() -> None:
    assert others_at(others_on(given(), "prose"), 0.19 * WHOLE) is None
    assert others_at(others_on(given(), "prose"), 0.51 * WHOLE) is None
    for size, words, loss in (
        (0.3, "int4", 0.04),
        (0.3 * 1.0003, "int4", 0.04),
        (0.2 / 1.006, "int3, 0.6% larger", 0.16),
        (0.5 * 1.004, "int8, 0.4% smaller", 0.0004),
    ):
        found = others_at(others_on(given(), "prose"), size * WHOLE)
        assert found is not None
        assert (found.words, found.loss) == (words, loss)
    worse = others_at(others_on(given(row("larger", 0.6, 0.001)), "prose"), 0.55 * WHOLE)
    assert worse is not None
    assert (worse.words, worse.loss) == ("int8, smaller, and what is larger loses more", 0.0004)
    twin = others_at(others_on(given(row("twin", 0.3 * 1.0002, 0.03)), "prose"), 0.3 * WHOLE)
    assert twin is not None
    assert twin.words == "twin"


def test_a_mix_stands_beside_others_at_its_size() -> None:
    report = given(mixed_row("mix-3.5", 0.25, 0.06), mixed_row("mix-9", 0.9, 0.0001, 0.0001))
    html, markdown = render_html(report), render_markdown(report)["report.md"]
    line = "0.06000 ± 0.00010 | 0.0200 | 3.00 | 0.0800 | 0.75 | between int3 and int4 |"
    assert f"| mix-3.5 | 238.4 MiB | {line}" in markdown
    assert "the logarithm of their loss is interpolated" in html
    assert "On prose the mixes lose 0.75 of what others lose at the same size (1 of 2 have others near)." in html
    assert "0.75 of what others lose" in " ".join(mix_lines(report))


# --- the plot, the choice


def test_mixes_of_one_family_are_a_front_beside_the_others() -> None:
    names = ("mix-3.5", "mix-4", "mix-4.5")
    rows = [
        mixed_row(name, size, kl) for name, size, kl in zip(names, (0.35, 0.25, 0.3), (0.01, 0.1, 0.03), strict=True)
    ]
    other = mixed_row("awq-mix", 0.27, 0.05) | {"method": "awq"}
    report = given(*rows, other)
    assert families(report) == [list(names)]
    plot = build_plot(report)
    assert plot is not None
    (panel,) = plot.panels
    (front,) = panel.fronts
    by_number = {point.number: (point.x, point.y) for point in panel.points}
    assert front[1] == [by_number[number] for number in (5, 6, 4)]  # by size, at what was measured
    assert panel.frontier == [by_number[number] for number in (1, 2, 3)]  # mixes apart
    styles = {point.number: point.style for point in panel.points}
    assert (styles[4], styles[1] == styles[4], styles[7] == styles[4]) == (front[0], False, False)
    assert [entry.name for entry in panel.legend if entry.number is None] == ["gptq", "gptq, mixed", "awq, mixed"]
    html = render_html(report)
    assert html.count('<path class="q d') == 1
    assert "of which only the marks were measured" in html
    assert "solid one" not in render_html(given())
    assert "mixes apart" not in render_html(given())


def test_a_mix_is_recommended_as_one() -> None:
    report = given(mixed_row("mix-4", 0.28, 0.02))
    found = recommend(report)
    assert found.variant == "mix-4"
    assert found.figures.endswith("28.0% of the float model; mixed int3, int4")
    assert "Beside what others lose at its size: 0.38 of it on prose." in found.reason
    smallest = {each.label: each for each in findings(given(mixed_row("mix-2", 0.1, 0.2)))}["Smallest"]
    assert smallest.detail.endswith("; mixed int3, int4")
    json.dumps(found.to_json())


def test_the_table_says_that_schemes_are_mixed() -> None:
    assert scheme_name(mixed_row("mix-4", 0.3, 0.02)) == "mixed int3, int4"
    assert scheme_name(mixed_row("mix-4", 0.3, 0.02, chosen={"a": "int4"})) == "int4"
    assert "mixed int3, int4" in render_html(given(mixed_row("mix-4", 0.3, 0.02)))
    many = mix_of(allocation({"a": "int3", "b": "int4", "c": "int8", "d": "float"}))
    assert many is not None
    assert many.name == "mixed int3, int4, int8, float"


def test_a_mix_is_not_called_worse_than_the_rounding_of_one_of_its_schemes() -> None:
    rounded = row("rounded", 0.4, 0.01) | {"method": "rtn"}
    assert rounding_lines(report_of(rounded, mixed_row("mix-3", 0.2, 0.3))) == []
    assert rounding_lines(report_of(rounded, row("gptq", 0.4, 0.02))) != []
    mixed = mixed_row("rounded-mix", 0.2, 0.2) | {"method": "rtn"}
    assert rounding_lines(report_of(mixed, mixed_row("mix-3", 0.2, 0.3))) != []
