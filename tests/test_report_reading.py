"""What a report has for reading: llama.cpp's table, texts side by side, and where the loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from quantkit.evaluation.divergence_table import divergence_table
from quantkit.recipe import VariantSpec
from quantkit.report.divergence_table import divergence_tables
from quantkit.report.layer_map import layer_maps
from quantkit.report.markdown import render_markdown
from quantkit.report.page import render_html
from quantkit.report.samples import build_samples
from tests.test_report import make_report


def with_divergence() -> dict[str, Any]:
    report = make_report()
    nll = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, variant in enumerate(report["variants"][:2], start=1):
        table = divergence_table(nll + 0.01 * number, nll, 0.001 * number * nll, (nll > 0.1).double())
        variant["texts"] = {"prose": {"divergence": table}}
    return report


def test_llama_cpps_figures_stand_under_its_own_names() -> None:
    report = with_divergence()
    (table,) = divergence_tables(report)
    assert (table.text, table.names) == ("prose", ["rtn-int8", "rtn-int4"])
    rows = {name: cells for _, group in table.groups for name, cells in group}
    assert [cell.split(" ± ")[0] for cell in rows["Mean PPL(Q)/PPL(base)"]] == ["1.010050", "1.020201"]
    assert rows["Mean ln(PPL(Q)/PPL(base))"][1].startswith("0.020000 ± ")
    first = report["variants"][0]["texts"]["prose"]["divergence"]
    assert rows["Maximum KLD"][0] == f"{first['kl_divergence']['max']:.6f}"
    assert rows["Same top p"][0].endswith("%")
    assert len(rows) == 6 + 12 + 16
    assert "75.0% KLD" not in rows  # which llama.cpp does not print either
    html, markdown = render_html(report), render_markdown(report)["report.md"]
    for name in ("99.9% KLD", "RMS Δp", "Mean PPL(Q)-PPL(base)"):
        assert f">{name}<" in html
        assert f"| {name} |" in markdown


def test_a_report_without_the_table_has_no_section_of_it() -> None:
    assert "Divergence in full" not in render_html(make_report())


# Samples


def with_samples() -> dict[str, Any]:
    def sample(*pieces: str, parts: int | None = None, end: int | None = None) -> dict[str, Any]:
        return {"prompt": "Say <b>.", "token_ids": [1], "end": end, "parts_at": parts, "pieces": list(pieces)}

    report = make_report()
    rows = {
        "": sample("The tide is out.", "", "", end=2),
        "rtn-int8": sample("The tide is out.", "", "", end=2),
        "rtn-int4": sample("The tide ", "*wa&s*", " in", parts=2),
        "gptq-int4": sample("The tide", "", "", parts=2, end=2),
    }
    for row in (report["baseline"], *report["variants"]):
        if row.get("name", "") in rows:
            row["samples"] = {"origin": "answers", "max_new_tokens": 16, "items": [rows[row.get("name", "")]]}
    return report


def test_continuations_stand_beside_each_other_with_the_first_other_token_marked() -> None:
    found = build_samples(with_samples())
    assert found is not None
    assert [each.name for each in found.items[0].continuations] == [
        "the float model",
        "rtn-int8",
        "rtn-int4",
        "gptq-int4",
    ]
    assert dict(found.kept)["rtn-int8"] == "1 of 1 the same"
    assert dict(found.kept)["rtn-int4"] == "0 of 1 the same; the others part after 2 tokens on average"
    html = render_html(with_samples())
    mark = '<mark title="the first token that is not that of the float model">'
    assert f'<span class="same">The tide </span>{mark}*wa&amp;s*</mark> in' in html
    assert "Say &lt;b&gt;." in html
    assert '<span class="same">The tide</span><mark title="the text ends here' in html
    markdown = render_markdown(with_samples())["report.md"]
    assert "- `rtn-int4`, parts after 2 tokens: The tide **\\*wa&amp;s\\*** in" in markdown
    assert "- `rtn-int8`, the same: The tide is out." in markdown


def test_a_report_without_samples_has_no_section_of_them() -> None:
    assert build_samples(make_report()) is None
    assert "side by side" not in render_html(make_report()) + render_markdown(make_report())["report.md"]


# Loss by layer


def with_layers(errors: dict[str, float], **entry: Any) -> dict[str, Any]:
    """A report of one variant whose layers have these errors, with its entry in the recipe."""
    report = make_report()
    report["variants"] = report["variants"][2:3]
    report["variants"][0]["layers"] = [
        {"name": name, "scheme": "int4 g64 sym", "tokens": 9, "error_before": error, "error_after": error}
        for name, error in errors.items()
    ]
    given = VariantSpec.model_validate({"name": "gptq-int4", "method": "gptq", "group_size": 64, **entry})
    report["recipe"] = {"variants": [given.resolved()]}
    return report


def errors_of(**others: float) -> dict[str, float]:
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    plain = {f"model.layers.{block}.{kind}": 0.01 for block in range(6) for kind in kinds}
    return plain | {name.replace("__", "."): error for name, error in others.items()}


def test_a_strip_has_a_row_for_each_kind_of_layer_and_a_column_for_each_block() -> None:
    errors = errors_of(model__layers__3__mlp__down_proj=0.05, lm_head=0.02)
    (found,) = layer_maps(with_layers(errors))
    (strip,) = found.strips
    assert [row.label for row in strip.rows] == ["q_proj", "v_proj", "up_proj", "down_proj"]
    assert (strip.first, strip.last, strip.columns) == (0, 5, 6)
    levels = {(row.label, column): spot.level for row in strip.rows for column, spot in row.spots}
    assert levels["down_proj", 3] == 6
    assert {level for at, level in levels.items() if at != ("down_proj", 3)} == {3}
    assert (strip.rows[3].largest, strip.rows[3].block) == ("0.0500", "3")
    assert found.outside == [("lm_head", "0.0200")]
    html, markdown = (text(with_layers(errors)) for text in (render_html, lambda r: render_markdown(r)["report.md"]))
    assert "<title>model.layers.3.mlp.down_proj: 0.0500, 5 times the median</title>" in html
    assert html.count('<rect class="h3"') == 24 - 1 + 1  # and the one of the legend
    assert "| `down_proj` | 0.0100 | 0.0500 | 3 |" in markdown


def test_experts_of_a_block_share_a_place_and_towers_have_strips_of_their_own() -> None:
    errors = {f"model.layers.0.mlp.experts.{n}.up_proj": 0.01 * (n + 1) for n in range(4)}
    errors |= {"model.layers.0.mlp.shared.up_proj": 0.01, "visual.blocks.2.attn.qkv": 0.01}
    (found,) = layer_maps(with_layers(errors))
    assert [(strip.title, strip.first, strip.columns) for strip in found.strips] == [
        ("model.layers", 0, 1),
        ("visual.blocks", 2, 1),
    ]
    assert [row.label for row in found.strips[0].rows] == ["*.up_proj", "shared.up_proj"]
    spot = found.strips[0].rows[0].spots[0][1]
    assert (spot.name, spot.count) == ("model.layers.0.mlp.experts.3.up_proj", 4)


@pytest.mark.parametrize(
    ("others", "entry", "code"),
    [
        (
            {"model__layers__3__mlp__down_proj": 0.05},
            {"bits": 4},
            r"overrides:|  '^model\.layers\.3\.mlp\.down_proj$': {bits: 8}",
        ),
        (
            {"model__layers__0__self_attn__q_proj": 0.05},  # which servers load as one with k_proj and v_proj
            {"bits": 4},
            r"overrides:|  '^model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj)$': {bits: 8}",
        ),
        (
            {f"model__layers__{block}__mlp__down_proj": 0.03 for block in range(1, 6)},
            {"bits": 4},
            r"overrides:|  '^model\.layers\.\d+\.mlp\.down_proj$': {bits: 8}",
        ),
        (
            {f"model__layers__5__{kind}_proj": 0.05 for kind in ("mlp__up", "mlp__down", "self_attn__v")},
            {"bits": 4},
            r"overrides:|  '^model\.layers\.5\.': {bits: 8}",
        ),
        (
            {"model__layers__3__mlp__down_proj": 0.05},  # nothing richer lies beside it in one file
            {"bits": 8},
            r"ignore: ['lm_head', '^model\.layers\.3\.mlp\.down_proj$']",
        ),
    ],
)  # fmt: skip
def test_hints_are_overrides_that_the_variant_takes(others: dict[str, float], entry: dict[str, Any], code: str) -> None:
    report = with_layers(errors_of(**others), **entry)
    (found,) = layer_maps(report)
    assert found.mending == code.replace("|  ", "\n  ")
    keys = yaml.safe_load(found.mending)
    spec = VariantSpec.model_validate({**report["recipe"]["variants"][0], **keys})
    worst = max(report["variants"][0]["layers"], key=lambda layer: layer["error_after"])["name"]
    before = VariantSpec.model_validate(report["recipe"]["variants"][0]).scheme_of(worst)
    assert spec.scheme_of(worst) != before
    assert "What would mend them" in render_html(report)
    assert found.mending in render_markdown(report)["report.md"]


def test_what_tuning_did_is_told_block_by_block() -> None:
    report = with_layers(errors_of())
    assert layer_maps(report)[0].tuned is None
    assert "Tuned" not in render_html(report)
    told = {"segment": "model.layers.0", "before": 0.02, "after": 0.015, "steps": 40, "paid": True, "note": ""}
    left = {**told, "segment": "model.layers.1", "after": 0.02, "steps": 8, "paid": False}
    report["variants"][0]["tuning"] = [told, left, {**told, "before": None}]
    caption = "became 0.88 of what it was in the median; 1 of 2 blocks were left as the method made them."
    html, markdown = render_html(report), render_markdown(report)["report.md"]
    assert caption in html
    assert caption in markdown
    assert "| `model.layers.0` | 0.0200 | 0.0150 | 0.75 | 40 |" in markdown
    assert "<td>model.layers.1</td>" in html


def test_a_run_that_missed_a_gate_is_complete_and_one_without_a_variant_is_not() -> None:
    report = with_layers(errors_of()) | {"status": "failed"}
    assert ">run complete<" in render_html(report)
    assert "Run: complete." in render_markdown(report)["report.md"]
    report["variants"][0] |= {"status": "failed", "error": "no room"}
    assert f">1 of {len(report['variants'])} variants failed<" in render_html(report)
    assert f"Run: 1 of {len(report['variants'])} variants failed." in render_markdown(report)["report.md"]


def test_what_stands_out_without_a_remedy_is_still_told() -> None:
    report = with_layers(errors_of(model__layers__3__mlp__down_proj=0.05))
    report["recipe"] = {"name": "older"}
    (found,) = layer_maps(report)
    assert (found.worst, found.mending) == (["model.layers.3.mlp.down_proj: 5 times the median"], "")
    assert "No layer stands out" not in render_html(report)
    report = with_layers(errors_of())
    assert (layer_maps(report)[0].worst, layer_maps(report)[0].mending) == ([], "")
    assert "No layer stands out" in render_html(report)
