"""The report: what is in the JSON is what people read, whatever is missing and whatever the names hold."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantkit.errors import QuantkitError, RecipeError
from quantkit.report import evaluate_gates, load, table, write
from quantkit.report.choice import findings
from quantkit.report.losses import frontier
from quantkit.report.plot import FRAME, build_plot, place_numbers

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert('x')</script> & | `tick` **bold** [a](http://evil.example/x.png)"
FORMATS = ("html", "md", "json")


def variant(
    name: str, *, method: str = "gptq", bits: int = 4, kl: float = 0.08, size: int = 110_000_000
) -> dict[str, Any]:
    return {
        "name": name,
        "status": "ok",
        "error": None,
        "method": method,
        "format": "compressed-tensors",
        "bits": bits,
        "group_size": 64,
        "symmetric": True,
        "bits_per_weight": bits + 0.25,
        "checkpoint": f"reports/run/checkpoints/{name}",
        "options": {"damping": 0.01},
        "metrics": {
            "perplexity": {"prose": 16.0 + 20 * kl, "answers": 6.0 + 5 * kl},
            "kl_divergence": {
                text: {"mean": value, "stderr": value / 50, "median": value / 2, "p99": value * 9}
                for text, value in (("prose", kl), ("answers", kl * 0.7))
            },
            "top1_agreement": {"prose": 0.95 - kl, "answers": 0.97 - kl},
        },
        "size_bytes": size,
        "memory": {"weights_bytes": size - 1000, "peak_bytes": size * 6, "peak_kind": "RSS", "device": "cpu"},
        "speed": {
            "prefill_tokens_per_second": 410.0,
            "decode_tokens_per_second": 24.0 + bits,
            "device": "cpu",
            "threads": 2,
        },
        "seconds": {"quantize": 125.0, "evaluate": 61.4},
        "layers": [
            {
                "name": f"model.layers.{index}.mlp.down_proj",
                "scheme": "int4 g64 sym",
                "error_before": 0.002 * (index + 1),
                "error_after": 0.001 * (index + 1),
            }
            for index in range(20)
        ],
        "notes": [f"note of {name}"],
    }


def failed(name: str, error: str) -> dict[str, Any]:
    return {
        "name": name,
        "status": "failed",
        "error": error,
        "method": "gptq",
        "format": "compressed-tensors",
        "bits": 2,
        "group_size": 32,
    }


def make_report(**changes: Any) -> dict[str, Any]:
    text = {
        "definition": "exp of the mean negative log-likelihood over windows of 512 tokens",
        "context_length": 512,
        "stride": 512,
        "bos": "none is added",
        "tokens": 8192,
        "nll_sum": 22893.2214,
        "nll_count": 8176,
    }
    variants = [
        variant("rtn-int8", method="rtn", bits=8, kl=0.0003, size=164_300_000),
        variant("rtn-int4", method="rtn", kl=0.2145, size=112_800_000),
        variant("gptq-int4", kl=0.0812, size=112_800_000),
        variant("awq-int4", method="awq", kl=0.0921, size=113_600_000),
        variant("gptq-int3", bits=3, kl=0.4312, size=99_100_000),
        failed("gptq-int2", "layer model.layers.3.mlp.down_proj: no Cholesky factor"),
    ]
    report: dict[str, Any] = {
        "schema": 1,
        "name": "run",
        "created": "2025-11-21T23:40:12+00:00",
        "status": "ok",
        "quantkit_version": "0.1.0",
        "recipe": {"name": "run"},
        "recipe_text": "name: run\nmodel:\n  source: org/model\n",
        "source": {
            "reference": "org/model",
            "kind": "hub",
            "relative_to": "the float model",
            "dtype": "float16",
            "revision": "12fd25f77366",
            "parameters": 134_515_008,
            "size_bytes": 269_060_552,
        },
        "calibration": {
            "origin": {"dataset": "alpaca_gpt4", "license": "CC BY-NC 4.0"},
            "records": {
                "read": 1200,
                "usable": 1188,
                "used": 128,
                "truncated": 3,
                "skipped": 1060,
                "dropped": {"empty": 9},
            },
            "rows": 128,
            "tokens": 27136,
            "truncated_tokens": 412,
            "length": {
                "min": 31,
                "mean": 212.4,
                "median": 188,
                "max": 512,
                "histogram": [{"from": 0, "to": 255, "count": 97}, {"from": 256, "to": 512, "count": 31}],
            },
            "token_ids_sha256": "ab12" * 16,
            "seed": 0,
            "packing": "none",
            "max_length": 512,
            "chat_template": "the model's",
            "warnings": ["3 records were cut off"],
        },
        "environment": {
            "python": "3.12.8",
            "platform": "Linux",
            "cpu": "a CPU",
            "cores": 2,
            "memory_bytes": 16 * 2**30,
            "device": "cpu",
            "packages": {"torch": "2.13.0"},
        },
        "baseline": {
            "metrics": {"perplexity": {"prose": 16.0, "answers": 6.0}},
            "texts": {"prose": text, "answers": {**text, "nll_count": 4088}},
            "size_bytes": 269_060_552,
            "memory": {"weights_bytes": 269_030_016, "peak_bytes": 912_000_000, "peak_kind": "RSS", "device": "cpu"},
            "speed": {
                "prefill_tokens_per_second": 530.0,
                "decode_tokens_per_second": 36.2,
                "device": "cpu",
                "threads": 2,
            },
            "seconds": {"evaluate": 58.0},
        },
        "variants": variants,
        "gates": [],
    }
    report |= changes
    gates = ["kl_divergence.mean <= 0.1", "size_bytes <= 120MB"]
    return {**report, "gates": changes.get("gates", evaluate_gates(gates, report["variants"]))}


def rendered(report: dict[str, Any], folder: Path) -> tuple[str, str]:
    write(report, folder, FORMATS)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


class Page(HTMLParser):
    """Checks that tags balance, and gathers text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_write_returns_the_files_it_wrote(tmp_path: Path) -> None:
    files = write(make_report(), tmp_path / "new", FORMATS)
    assert [file.name for file in files] == ["report.json", "report.md", "divergence.svg", "report.html"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(file.name for file in files)
    assert [file.name for file in write(make_report(), tmp_path / "json", ())] == ["report.json"]


def test_json_holds_the_report_and_load_reads_it(tmp_path: Path) -> None:
    report = make_report()
    write(report, tmp_path, ("json",))
    assert load(tmp_path) == report
    assert load(tmp_path / "report.json") == report


def test_figures_of_the_json_stand_in_markdown_and_html(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(), tmp_path)
    words = parsed(html).words
    figures = [
        "0.08120 ± 0.00162",  # KL and its standard error
        "0.04060",  # median
        "0.7308",  # p99
        "17.62",  # perplexity
        "+1.62",  # its rise
        "+10.15%",
        "86.9%",  # top-1
        "107.6",  # MiB on disk
        "41.9%",  # of float
        "4.25",  # bits per weight
        "28.0",  # decode tokens/s
        "410",  # prefill tokens/s
        "2 min 05 s",
        "22,893.2214",  # NLL sum
        "8,176",
        "4,088",
        "27,136",  # calibration tokens
        "1,188 usable",
        "ab12" * 16,
        "2.13.0",
    ]
    for figure in figures:
        assert figure in markdown, figure
        assert figure in words, figure


def test_the_best_of_each_figure_is_marked(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(), tmp_path)
    assert "**0.00030 ± 0.00001**" in markdown
    assert "**94.5**" in markdown
    marked = re.findall(r'<span class="best" title="best of its column">([^<]*)</span>', html)
    assert {"0.00030 ± 0.00001", "16.01", "95.0%", "94.5", "36.8%", "3.25", "32.0"} <= set(marked)
    assert "0.08120 ± 0.00162" not in marked
    assert "256.6" not in marked  # the float model takes no part
    assert "410" not in marked  # all the same: no best


def test_the_headline_names_the_closest_the_smallest_and_the_smallest_that_passes(tmp_path: Path) -> None:
    report = make_report()
    found = {finding.label: finding for finding in findings(report)}
    assert found["Loses least"].name == "rtn-int8"
    assert found["Smallest"].name == "gptq-int3"
    assert found["Smallest that meets every gate"].name == "gptq-int4"
    assert "on prose, its worst text" in found["Smallest"].detail
    markdown, _ = rendered(report, tmp_path)
    assert "**Loses least: `rtn-int8`**" in markdown
    assert markdown.index("Loses least") < markdown.index("## Comparison") < markdown.index("## Gates")


def test_variants_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    close = [variant("a", kl=0.080, size=100), variant("b", kl=0.081, size=120), variant("c", kl=0.2, size=100)]
    report = make_report(variants=close, gates=[])
    found = findings(report)
    assert f"{found[1].detail}. {found[1].aside}\n- **Smallest" in rendered(report, tmp_path)[0]
    assert found[1].name == "a"
    assert "b" in found[1].aside
    assert "c" not in found[1].aside.removeprefix("Within two standard errors of the difference: ")
    assert (found[2].name, found[2].aside) == ("a", "Of the same size, and losing more: c.")


def test_the_frontier_holds_what_nothing_beats() -> None:
    assert frontier(make_report()) == ["gptq-int3", "gptq-int4", "rtn-int8"]


def test_a_dequantized_source_is_said_wherever_figures_are_compared(tmp_path: Path) -> None:
    source = {**make_report()["source"], "kind": "gguf", "relative_to": "the dequantized source"}
    markdown, html = rendered(make_report(source=source), tmp_path)
    for text in (markdown, parsed(html).words):
        assert "All losses are relative to the dequantized source." in text
        assert "KL(the dequantized source ‖ quantized)" in text
        assert "the float model" not in text
        assert "of the dequantized source" in text
    markdown, html = rendered(make_report(), tmp_path)
    assert "dequantized" not in markdown
    assert "dequantized" not in parsed(html).words


def test_a_failed_variant_is_a_row_with_its_escaped_error(tmp_path: Path) -> None:
    variants = [variant("good"), failed("broken", f"tensor {EVIL}")]
    markdown, html = rendered(make_report(variants=variants), tmp_path)
    page = parsed(html)
    assert "script" not in page.tags
    assert f"Failed: tensor {EVIL}" in page.words
    row = next(line for line in markdown.splitlines() if line.startswith("| `broken`"))
    assert "**failed:** tensor &lt;script&gt;" in row
    assert "<script" not in markdown
    cells = len(re.findall(r"(?<!\\)\|", row))
    header = next(line for line in markdown.splitlines() if line.startswith("| Variant | Method"))
    assert cells == len(re.findall(r"(?<!\\)\|", header))


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    report = make_report(name=EVIL, recipe_text=f"name: x\n```\n{EVIL}\n````\n")
    first = report["variants"][0]
    first["name"], first["notes"], first["options"] = EVIL, [EVIL], {EVIL: EVIL}
    first["layers"][0]["name"] = EVIL
    first["checkpoint"] = "a'b\"c `x`"
    report["calibration"]["warnings"] = [EVIL]
    report["calibration"]["origin"] = {EVIL: EVIL}
    report["baseline"]["texts"]["prose"]["definition"] = EVIL
    report["environment"]["cpu"] = EVIL
    report["gates"] = evaluate_gates(["size_bytes <= 1"], report["variants"])
    markdown, html = rendered(report, tmp_path)
    page = parsed(html)
    assert "script" not in page.tags
    assert "strong" not in page.tags
    assert page.words.count(EVIL) > 8
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "<script" not in outside
    assert "[a](http" not in outside.replace("\\[a\\](http", "")
    assert "\n`````yaml\n" in markdown
    svg = (tmp_path / "divergence.svg").read_text()
    ElementTree.fromstring(svg)
    assert "<script" not in svg


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    report = make_report()
    report["variants"][0]["notes"] = ["see https://example.org/paper"]
    _, html = rendered(report, tmp_path)
    page = parsed(html)
    assert "https://example.org/paper" in page.words
    loads = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background", "style"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in loads:
            assert value.startswith("#") or value == "data:,", (name, value)
    assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    svg = (tmp_path / "divergence.svg").read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in svg
    assert "url(" not in svg


def test_the_pages_policy_allows_its_style_sheet_and_nothing_else(tmp_path: Path) -> None:
    import base64
    import hashlib

    _, html = rendered(make_report(), tmp_path)
    (style,) = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(value for name, value in parsed(html).attributes if value.startswith("default-src"))
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_output_is_deterministic(tmp_path: Path) -> None:
    first = [file.read_bytes() for file in write(make_report(), tmp_path / "a", FORMATS)]
    again = [file.read_bytes() for file in write(load(tmp_path / "a"), tmp_path / "b", FORMATS)]
    assert first == again


def test_the_plot_shows_every_variant_that_has_figures(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(), tmp_path)
    assert "](divergence.svg)" in markdown
    svg = (tmp_path / "divergence.svg").read_text()
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("rtn-int8", "rtn-int4", "gptq-int4", "awq-int4", "gptq-int3"):
        assert texts.count(name) == 2  # one panel per text
        assert html.count(f">{name}</text>") == 2
    assert "gptq-int2" not in texts
    assert {"prose", "answers", "KL divergence, nats per token", "Size, MiB"} <= set(texts)


def test_some_bytes_more_are_the_same_size() -> None:
    sizes = {"a": (0.2, 1_000_000), "b": (0.1, 1_000_040), "c": (0.05, 1_001_000)}
    rows = [variant(name, kl=kl, size=size) for name, (kl, size) in sizes.items()]
    found = findings(make_report(variants=rows, gates=[]))
    assert (found[2].name, found[2].aside) == ("b", "Of the same size, and losing more: a.")


def test_closer_is_lower_and_smaller_is_further_left(tmp_path: Path) -> None:
    plot = build_plot(make_report())
    assert plot is not None
    points = {point.tip.partition(":")[0]: point for point in plot.panels[0].points}
    assert points["rtn-int8"].y > points["gptq-int4"].y > points["rtn-int4"].y > points["gptq-int3"].y
    assert points["gptq-int3"].x < points["gptq-int4"].x < points["awq-int4"].x < points["rtn-int8"].x


def test_without_divergence_the_plot_is_of_perplexity(tmp_path: Path) -> None:
    report = make_report(gates=[])
    for row in report["variants"][:-1]:
        del row["metrics"]["kl_divergence"]
    markdown, html = rendered(report, tmp_path)
    assert "](perplexity.svg)" in markdown
    assert "Perplexity against size" in html
    assert "KL divergence" not in parsed(html).words
    assert findings(report)[1].name == "rtn-int8"
    assert "perplexity 16.01 (+0.04%) on prose" in findings(report)[1].detail


def test_numbers_in_a_plot_cover_neither_each_other_nor_marks() -> None:
    marks = [(300.0 + 3 * (index % 4), 120.0 + 9 * index) for index in range(12)]
    places = place_numbers(marks)
    assert min(math.dist(first, second) for first, second in itertools.combinations(places, 2)) >= 17
    assert min(math.dist(place, mark) for place in places for mark in marks) >= 14
    assert all(FRAME.holds(place, 1) for place in places)
    corner = place_numbers([(FRAME.left, FRAME.top)] * 2)
    assert all(FRAME.holds(place, 1) for place in corner)


def test_a_number_in_the_plot_is_that_of_its_name_in_the_legend() -> None:
    plot = build_plot(make_report())
    assert plot is not None
    for panel in plot.panels:
        named = {entry.number: entry.name for entry in panel.legend if entry.number}
        assert [named[point.number] for point in panel.points] == [
            point.tip.partition(":")[0] for point in panel.points
        ]
        assert [entry.name for entry in panel.legend if not entry.number] == ["rtn", "gptq", "awq"]
        assert max(entry.y for entry in panel.legend) < panel.height


def drop(report: dict[str, Any], *path: str) -> dict[str, Any]:
    for row in report["variants"]:
        place = row
        for key in path[:-1]:
            place = place.get(key) or {}
        place.pop(path[-1], None)
    return report


@pytest.mark.parametrize(
    "path",
    [
        ("metrics",),
        ("metrics", "perplexity"),
        ("metrics", "kl_divergence"),
        ("metrics", "top1_agreement"),
        ("size_bytes",),
        ("memory",),
        ("memory", "weights_bytes"),
        ("speed",),
        ("seconds",),
        ("layers",),
        ("notes",),
        ("options",),
        ("checkpoint",),
        ("bits_per_weight",),
        ("symmetric",),
        ("format",),
        ("method",),
    ],
)
def test_any_figure_of_the_variants_may_be_missing(path: tuple[str, ...], tmp_path: Path) -> None:
    markdown, html = rendered(drop(make_report(), *path), tmp_path)
    assert "gptq-int4" in parsed(html).words
    assert "None" not in parsed(html).words
    assert "None" not in markdown


@pytest.mark.parametrize("key", ["calibration", "environment", "baseline", "source", "recipe_text", "created", "gates"])
def test_any_section_may_be_missing(key: str, tmp_path: Path) -> None:
    report = make_report()
    report[key] = None
    parsed(rendered(report, tmp_path)[1])
    del report[key]
    markdown, html = rendered(report, tmp_path)
    assert "gptq-int4" in markdown
    assert "None" not in parsed(html).words


def test_no_calibration_is_said(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(calibration=None), tmp_path)
    assert "No variant of this recipe needs calibration." in markdown
    assert "No variant of this recipe needs calibration." in parsed(html).words


def test_a_run_in_which_everything_failed_still_has_a_report(tmp_path: Path) -> None:
    report = make_report(variants=[failed("a", "no memory"), failed("b", "no disk")], status="failed")
    markdown, html = rendered(report, tmp_path)
    for text in (markdown, parsed(html).words):
        assert "No variant has figures to compare." in text or "No variant meets every gate." in text
        assert "no memory" in text
        assert "no disk" in text
    assert not (tmp_path / "divergence.svg").exists()


def test_infinite_figures_become_null_with_a_note(tmp_path: Path) -> None:
    report = make_report()
    report["variants"][2]["metrics"]["perplexity"]["prose"] = math.inf
    report["variants"][3]["metrics"]["kl_divergence"]["prose"]["mean"] = math.nan
    before = copy.deepcopy(report["variants"][2])
    markdown, _ = rendered(report, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["variants"][2]["metrics"]["perplexity"]["prose"] is None
    assert read["variants"][2]["notes"][-1] == "metrics.perplexity.prose is inf, shown as missing"
    assert "metrics.kl\\_divergence.prose.mean is nan" in markdown
    assert report["variants"][2] == before


def test_divergence_of_zero_or_less_is_drawn_at_the_foot_of_the_plot(tmp_path: Path) -> None:
    variants = [variant("same", kl=0.0), variant("minus", kl=-1e-9, size=90_000_000), variant("far", kl=0.1)]
    rendered(make_report(variants=variants), tmp_path)
    ElementTree.fromstring((tmp_path / "divergence.svg").read_text())
    rendered(make_report(variants=variants[:1]), tmp_path)


def test_large_models_show_the_worst_layers_and_say_how_many_there_are(tmp_path: Path) -> None:
    big = variant("big", size=38_500_000_000)
    big["layers"] = [
        {"name": f"model.layers.{index}.q_proj", "scheme": "int4", "error_before": None, "error_after": 1e-3 * index}
        for index in range(560)
    ]
    markdown, html = rendered(make_report(variants=[big]), tmp_path)
    assert "35.86" in parsed(html).words  # GiB
    for text in (markdown, html[html.index('id="variants"') :]):
        assert "15 of 560" in text
        assert "model.layers.559.q_proj" in text
        assert "model.layers.545.q_proj" in text
        assert "model.layers.544.q_proj" not in text


def test_tokens_by_expert_stand_in_a_table_by_layer(tmp_path: Path) -> None:
    report = make_report()
    assert "Calibration tokens by expert" not in "".join(rendered(report, tmp_path / "dense"))
    report["variants"][0]["experts"] = [
        {"name": "model.layers.3.mlp.experts", "tokens": [2000, 0, 1500, 71], "wanted": 1234, "few": 2},
        {"name": "model.layers.4.mlp.experts", "tokens": [3000, 4000], "wanted": 1234, "few": 0},
    ]
    markdown, html = rendered(report, tmp_path / "mixture")
    assert "| `model.layers.3.mlp.experts` | 4 | 0 | 786 | 2,000 | 2 | 1,234 |" in markdown
    assert "| `model.layers.4.mlp.experts` | 2 | 3,000 | 3,500 | 4,000 | 0 | 1,234 |" in markdown
    assert "Calibration tokens by expert: some saw few" in html
    for cell in ("model.layers.3.mlp.experts", "786", "3,500", "1,234"):
        assert f">{cell}</td>" in html


def test_gates_are_shown_with_their_verdicts(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(), tmp_path)
    assert "- `gptq-int3` fails `kl_divergence.mean <= 0.1`: 0.4312 on prose, its worst text," in markdown
    assert "| `gptq-int4` | ✓ 0.0812 | ✓ 107.6 MiB |" in markdown
    assert "2 of 6 variants meet every gate" in parsed(html).words


def test_loading_names_the_checkpoint_as_code(tmp_path: Path) -> None:
    report = make_report()
    report["variants"][0]["checkpoint"] = 'runs/it\'s "here"/rtn'
    markdown, html = rendered(report, tmp_path)
    for text in (markdown, parsed(html).words):
        assert 'AutoModelForCausalLM.from_pretrained("runs/it\'s \\"here\\"/rtn")' in text


def test_the_recipe_stands_as_it_was_given(tmp_path: Path) -> None:
    report = make_report()
    markdown, html = rendered(report, tmp_path)
    assert f"```yaml\n{report['recipe_text']}```" in markdown
    assert report["recipe_text"] in parsed(html).words


def test_tables_of_the_markdown_have_as_many_cells_in_every_row(tmp_path: Path) -> None:
    markdown, _ = rendered(make_report(), tmp_path)
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_the_terminal_table_has_a_row_per_variant_and_says_why_one_failed() -> None:
    report = make_report()
    report["variants"][-1]["error"] = "no [bold]Cholesky[/bold] factor"
    console = Console(width=160, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(table(report))
    shown = captured.get()
    for words in ("rtn-int8", "0.08120", "17.62", "107.6", "28.0", "gptq-int2 failed: no [bold]Cholesky[/bold] factor"):
        assert words in shown
    assert table(report).row_count == 7


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"schema": "1"}', '{"schema": 1, "name": "x"}'])
def test_what_is_no_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(QuantkitError, match=r"report\.json"):
        load(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**make_report(), "schema": 2}))
    with pytest.raises(QuantkitError, match=r"schema 2, and this quantkit reads up to 1.*upgrade"):
        load(tmp_path)


def test_a_missing_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="cannot read report"):
        load(tmp_path)


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'html'"):
        write(make_report(), tmp_path / "out", ("htm",))
    assert not (tmp_path / "out").exists()


def test_reports_need_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(make_report()))
    code = (
        "import sys; from pathlib import Path; from quantkit.report import load, write; "
        f"folder = Path({str(tmp_path)!r}); write(load(folder), folder, ('html', 'md')); "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Estimates of memory


def with_estimates(kind: str, prefix: str = "") -> dict[str, Any]:
    """A report whose first variant has estimates beside what was measured of one kind."""
    report = make_report()
    pair = {"estimated_bytes": 90 * 2**20, "measured_bytes": 120 * 2**20, "ratio": 0.75, "lines": []}
    estimates = {"weights": {**pair, "ratio": 0.9999}, f"{prefix}prefill": pair}
    report["variants"][0]["memory"] |= {"peak_kind": kind, "peaks_are_of": "phase", "estimates": estimates}
    return report


@pytest.mark.parametrize(
    ("kind", "prefix", "words"),
    [
        ("RSS", "", "what the resident set grew by"),
        ("CUDA allocator", "", "allocator gave out since"),
        ("NVML", "process_", "it is the whole process"),
    ],
)
def test_estimates_stand_beside_measurements_everywhere(tmp_path: Path, kind: str, prefix: str, words: str) -> None:
    report = with_estimates(kind, prefix)
    write(report, tmp_path, FORMATS)
    for file in ("report.md", "report.html"):
        text = (tmp_path / file).read_text()
        assert words in text, file
        assert "At prefill, MiB" in text
        assert "stimated / measured" in text
        assert "estimated 90.0 MiB, measured 120.0 MiB, ratio 0.750" in text
        assert "ratio 1.000" in text
    console = Console(width=220, record=True)
    console.print(table(report))
    shown = console.export_text()
    assert "120.0" in shown
    assert "0.75" in shown


def test_peaks_of_a_whole_process_are_called_so(tmp_path: Path) -> None:
    report = with_estimates("RSS")
    report["variants"][0]["memory"]["peaks_are_of"] = "process"
    write(report, tmp_path, FORMATS)
    assert "no peak could be begun anew" in (tmp_path / "report.md").read_text()


STAGES = [
    {"stage": "baseline", "how": "loaded whole", "estimated_bytes": 90 << 20, "measured_bytes": 100 << 20}
    | {"ratio": 0.9, "baseline_bytes": 400 << 20, "kind": "RSS", "seconds": 65.0},
    {"stage": f"walk: {EVIL}", "how": "", "estimated_bytes": None, "measured_bytes": 30 << 20}
    | {"ratio": None, "baseline_bytes": 400 << 20, "kind": "RSS", "seconds": 2.0},
    {"stage": "evaluate: there already", "how": "loaded whole", "estimated_bytes": 90 << 20, "measured_bytes": None}
    | {"ratio": None, "baseline_bytes": None, "kind": None, "seconds": None},
]


def test_memory_of_each_stage_stands_beside_what_was_expected(tmp_path: Path) -> None:
    markdown, html = rendered(make_report(stages=STAGES), tmp_path)
    assert "| baseline | 90.0 MiB | 100.0 MiB | 0.90 | 1 min 05 s | loaded whole |" in markdown
    assert "baseline90.0 MiB100.0 MiB0.901 min 05 sloaded whole" in parsed(html).words
    for text in (markdown, html):
        assert "Memory of each stage" in text
        assert "there already" not in text
        assert "<script>" not in text
    without = rendered(make_report(), tmp_path / "without")
    assert not any("Memory of each stage" in text for text in without)
