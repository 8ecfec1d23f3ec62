"""What the comparisons with other libraries share: the same rows to calibrate on, the same texts to score on."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantkit
from quantkit import calibration
from quantkit.engine.walk import Inputs
from quantkit.quantization import Job
from quantkit.recipe import CalibrationSpec, ModelSpec
from quantkit.source import resolve
from quantkit.system.environment import describe


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records; the first of them calibrate")
    parser.add_argument("--text", type=Path, required=True, help="text to score on, unlike the calibration")
    parser.add_argument("--samples", type=int, default=128, help="how many of the records calibrate")
    return parser


@dataclass(frozen=True, slots=True)
class Setting:
    """A float model, calibration rows, and texts.

    Attributes:
        job: what quantkit quantizes from.
        rows_file: the token ids of the calibration as JSON, for other environments.
        texts: ``unlike`` the calibration, and ``held-out`` records like it.
    """

    job: Job
    rows_file: Path
    texts: list[dict[str, str]]

    @property
    def folder(self) -> Path:
        """Of the float model."""
        return self.job.source


def read_calibration(given: argparse.Namespace, work: Path, *, inputs: Inputs = "quantized") -> Job:
    """The model and the first of the records that were named on the command line."""
    records = json.loads(given.records.read_text(encoding="utf-8"))
    (work / "calibration.json").write_text(json.dumps(records[: given.samples]), encoding="utf-8")
    source = resolve(ModelSpec(source=str(given.model)), work)
    spec = CalibrationSpec(dataset=str(work / "calibration.json"), samples=given.samples, max_length=512)
    rows = calibration.build(spec, source.folder, work / "calibration").rows
    return Job(source.folder, source.made_from(), source.dtype, rows, "benchmark", inputs=inputs)


def prepare(given: argparse.Namespace, work: Path, *, inputs: Inputs = "quantized") -> Setting:
    """What was named on the command line, and texts to score on."""
    job = read_calibration(given, work, inputs=inputs)
    records = json.loads(given.records.read_text(encoding="utf-8"))
    (work / "held-out.json").write_text(json.dumps(records[300:]), encoding="utf-8")
    (work / "rows.json").write_text(json.dumps([list(row) for row in job.rows]), encoding="utf-8")
    texts = [{"name": "unlike", "file": str(given.text)}, {"name": "held-out", "file": str(work / "held-out.json")}]
    return Setting(job, work / "rows.json", texts)


def scores(checkpoint: Path, model: Path, texts: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """KL divergence and perplexity by text."""
    result = quantkit.evaluate(
        checkpoint,
        texts=texts,
        reference=model,
        context_length=512,
        max_tokens=24 * 512,
        metrics=["perplexity", "kl_divergence"],
    )
    return {
        text: {"kl": result["metrics"]["kl_divergence"][text]["mean"], "perplexity": value}
        for text, value in result["metrics"]["perplexity"].items()
    }


def print_scores(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table for people."""
    for who, by_text in found.items():
        for text, figures in by_text.items():
            print(f"{who:18} {text:10} KL {figures['kl']:.4f} perplexity {figures['perplexity']:.3f}", flush=True)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found = describe()
    return {key: found[key] for key in ("cpu", "cores", "threads", "packages")}
