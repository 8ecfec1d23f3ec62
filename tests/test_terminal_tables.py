"""Tables in terminals of any width: no number is cut, no name is lost, and what is left out is told."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from quantkit.report import evaluate_gates, table
from quantkit.report.terminal import gate_lines
from quantkit.system.fitted_table import FittedTable, Shown, shortened, wrapped
from tests.report_rows import report_of, row

LONG = "gptq-int4-asym-with-a-long-name-of-somebody"
TEXTS = ("prose", "answers", "a-text-with-a-very-long-name.jsonl")


def printed(shown: Any, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def wide() -> dict[str, Any]:
    rows = []
    for index, name in enumerate((LONG, "rtn-int8", "量化模型四比特")):
        made = row(name, 0.4 + index / 10, 0.0123456 * (index + 1), 10.5 + index)
        made["metrics"] = {metric: dict.fromkeys(TEXTS, values["prose"]) for metric, values in made["metrics"].items()}
        made["metrics"]["top1_agreement"] = dict.fromkeys(TEXTS, 0.912 + index / 100)
        made["speed"] = {"decode_tokens_per_second": 1234.5, "prefill_tokens_per_second": 98765.4}
        made["memory"] = {"weights_bytes": 10**9, "peak_bytes": 3 * 10**9}
        rows.append(made)
    return report_of(*rows)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("everything", [False, True])
def test_numbers_are_whole_at_every_width(width: int, everything: bool) -> None:
    text = printed(table(wide(), everything=everything), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    for figure in ("0.012", "0.037", "381.5"):  # KL of the first and the last, MiB of the first
        assert figure in text, figure
    cut = [line for line in text.splitlines() if "\N{HORIZONTAL ELLIPSIS}" in line]
    assert all("a-text-…." in line or "a-text-…" in line for line in cut), cut
    names = "".join(line.partition("  ")[0] for line in text.splitlines() if not line.startswith(" "))
    assert LONG in names


def test_more_room_shows_more_and_what_is_missing_is_told() -> None:
    narrow, broad = printed(table(wide()), 80), printed(table(wide()), 200)
    assert "not at this width" in narrow
    assert "--all-columns" in narrow
    assert "Decode" in narrow.partition("not at this width")[2]
    assert "not at this width" not in broad
    assert "1,234" in broad
    assert "98,765" in printed(table(wide(), everything=True), 80)


def test_what_gates_need_comes_first() -> None:
    report = wide()
    report["gates"] = evaluate_gates(["top1_agreement.answers >= 95%", "memory.peak_bytes <= 1GiB"], report["variants"])
    shown = printed(table(report), 60).partition("not at this width")[0]
    assert "91.2%" in shown
    assert "2.79" in shown  # GiB of the peak
    assert "91.2%" not in printed(table(wide()), 60).partition("not at this width")[0]


def test_a_missed_gate_has_its_figure() -> None:
    report = wide()
    report["gates"] = evaluate_gates(["perplexity <= 11"], report["variants"])
    lines = gate_lines(report)
    assert lines[0] == f"gate passed: {LONG}: perplexity <= 11: 10.5 on {TEXTS[2]}, its worst text, is <= 11"
    assert "gate FAILED: rtn-int8: perplexity <= 11: 11.5 on" in lines[1]


def test_texts_wrap_after_separators_and_words_of_titles_lose_their_middle() -> None:
    assert wrapped("gptq-int4-asym", 10) == ["gptq-int4-", "asym"]
    assert wrapped("abcdefghijkl", 5) == ["abcde", "fghij", "kl"]
    assert "".join(wrapped("量化模型四比特", 6)) == "量化模型四比特"
    assert shortened("a-very-long-name.jsonl", 11) == "a-ver…jsonl"


def test_a_table_without_rows_is_drawn() -> None:
    assert "Run" in printed(FittedTable([Shown("Run", [Text("1")][:0], 0, True)]), 80)
