"""What a report has for reading: llama.cpp's table, texts side by side, and where the loss is."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.evaluation.divergence_table import divergence_table
from quantkit.report.divergence_table import divergence_tables
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
