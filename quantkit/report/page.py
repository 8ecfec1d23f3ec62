"""The content of a report's pages, the template engine, and the report as one HTML file.

The HTML file asks nothing of the network: no scripts, no fonts, no images from outside.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from quantkit.report.bits_map import bits_maps
from quantkit.report.choice import findings
from quantkit.report.columns import Record, reference_name, reference_word, scheme_name
from quantkit.report.comparison import build_comparison, failure
from quantkit.report.definitions import definitions, text_definitions
from quantkit.report.divergence_table import divergence_tables
from quantkit.report.facts import calibration_facts, environment_facts, source_facts, variant_facts
from quantkit.report.layer_map import LEGEND, layer_maps
from quantkit.report.losses import frontier
from quantkit.report.mixes import TITLES, mix_sentences, mix_tables
from quantkit.report.numbers import figure, fixed, pick
from quantkit.report.plot import Plot, build_plot
from quantkit.report.samples import brief, build_samples
from quantkit.report.served import build_served
from quantkit.report.stages import LEAD as STAGES_LEAD
from quantkit.report.stages import TITLES as STAGES_TITLES
from quantkit.report.stages import stage_rows
from quantkit.report.tables import experts, gate_table, histogram, loading, worst_layers, written_date
from quantkit.report.tasks_and_answers import changed_answers, further_models, further_rows
from quantkit.schemes.mix import LEGEND as BITS_LEGEND
from quantkit.system.units import percentage


def environment(**options: Any) -> jinja2.Environment:
    """The engine for the templates of this package."""
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    engine.filters["px"] = pixels
    engine.filters["brief"] = brief
    return engine


def template_text(engine: jinja2.Environment, name: str) -> str:
    """A file of this package's templates, as it stands."""
    if engine.loader is None:
        raise RuntimeError("the engine has no templates")
    return engine.loader.get_source(engine, name)[0]


def pixels(value: float) -> str:
    """A length in pixels with at most one decimal."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def context(report: Record, plot: Plot | None) -> dict[str, Any]:
    """Everything that the templates show; the plot is laid out by who draws it."""
    return {
        "report": {"source": None, "recipe_text": "", "quantkit_version": "", "status": "", "title": None, **report},
        "created": written_date(report),
        "failed": sum(variant.get("status") != "ok" for variant in report["variants"]),
        "reference": reference_name(report),
        "dequantized": reference_word(report) == "source",
        "findings": findings(report),
        "frontier": frontier(report),
        "has_divergence": any(pick(row, "metrics", "kl_divergence") for row in report["variants"]),
        "table": build_comparison(report),
        "plot": plot,
        "mixes": _mixes(report),
        "divergences": divergence_tables(report),
        "served": build_served(report),
        "samples": build_samples(report),
        "maps": layer_maps(report),
        "map_legend": LEGEND,
        "further": further_rows(report),
        "further_models": further_models(report),
        "gates": gate_table(report),
        "variants": [_variant(variant) for variant in report["variants"]],
        "calibrated": isinstance(report.get("calibration"), Mapping),
        "calibration": calibration_facts(report),
        "warnings": [str(warning) for warning in pick(report, "calibration", "warnings") or []],
        "bars": histogram(report),
        "definitions": definitions(report),
        "texts": text_definitions(report),
        "source": source_facts(report),
        "environment": environment_facts(report),
        "stages": {"rows": stage_rows(report), "titles": STAGES_TITLES, "lead": STAGES_LEAD},
        "loading": loading(report),
    }


def _mixes(report: Record) -> dict[str, Any] | None:
    """What there is to tell of mixes; None where there are none."""
    maps, tables = bits_maps(report), mix_tables(report)
    told = {"maps": maps, "legend": BITS_LEGEND, "tables": tables, "titles": TITLES}
    return {**told, "sentences": mix_sentences(tables)} if maps else None


def _variant(variant: Record) -> dict[str, Any]:
    bits = figure(variant, "bits_per_weight")
    tags = [str(variant.get("method") or ""), scheme_name(variant), str(variant.get("format") or "")]
    tags += [] if bits is None else [f"{fixed(bits, 2)} bits per weight"]
    share = figure(variant, "share")
    tags += [] if share is None else [f"{percentage(share)} of the block weights"]
    return {
        "name": str(variant["name"]),
        "title": str(variant.get("title") or ""),
        "tags": " · ".join(tag for tag in tags if tag),
        "error": failure(variant),
        "notes": [str(note) for note in variant.get("notes") or []],
        "facts": variant_facts(variant),
        "layers": worst_layers(variant),
        "experts": experts(variant),
        "answers": changed_answers(variant),
    }


def render_html(report: Record) -> str:
    """The report as a page.

    All text of the report is escaped. The page's own content security policy allows nothing but its one
    style sheet, by hash.
    """
    engine = environment(autoescape=True)
    style = "\n" + template_text(engine, "page.css") + template_text(engine, "plot.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return engine.get_template("report.html.j2").render(
        context(report, build_plot(report)), style=Markup(style), style_hash=Markup(f"sha256-{digest}")
    )
