"""Small runs of whole recipes, for the tests of the pipeline, the API and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.exports import open_export
from quantkit.recipe import Recipe, VariantSpec
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes.base import LoadOptions
from quantkit.system.artifacts import read_json
from tests.tiny import VOCABULARY

TOPICS = ("the tide", "a kettle", "the moon", "old maps", "rye bread")
FIGURES = ["perplexity", "kl_divergence", "top1_agreement"]


def write_records(file: Path, count: int = 20) -> Path:
    """A data set of instructions in JSON lines."""
    rows = [
        {
            "instruction": f"Say in {number + 2} words what {TOPICS[number % 5]} is.",
            "input": "Be plain." if number % 3 == 0 else "",
            "output": f"{TOPICS[number % 5]} is number {number} of the things that people ask about "
            * (1 + number % 2),
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe_data(
    model: Path, records: Path, out: Path, variants: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """A recipe that runs in seconds on a tiny model."""
    data: dict[str, Any] = {
        "name": "demo",
        "model": {"source": str(model)},
        "calibration": {"dataset": str(records), "samples": 12, "max_length": 48},
        "defaults": {"group_size": 32},
        "variants": variants,
        "evaluation": {"texts": ["prose"], "context_length": 32, "max_tokens": 96, "metrics": FIGURES, "device": "cpu"},
        "quantization": {"device": "cpu"},
        "report": {"folder": str(out)},
    }
    return data | changes


def make_recipe(*args: Any, **changes: Any) -> Recipe:
    return Recipe.parse(yaml.safe_dump(recipe_data(*args, **changes)))


def write_recipe(file: Path, data: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return file


class Notebook:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def progress(self, step: str, done: int, total: int) -> None:
        self.steps.append((step, done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def score_here(job: EvaluationJob, *, log: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """What ``run_job`` does, in this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    return evaluate(job, on_progress or (lambda step, done, total: None))


def load_model(folder: Path, runtime: str = "auto", dtype: str | None = "float32") -> PreTrainedModel:
    """The module that a runtime runs, for those that compute with transformers."""
    loaded = choose_runtime(folder, runtime, dtype).load(folder, LoadOptions(dtype=dtype))
    assert isinstance(loaded, TransformersModel)
    return loaded.model


def load_whole(folder: Path) -> PreTrainedModel:
    """A checkpoint as transformers loads it, every tensor in its place; an asymmetric one with quantkit's help."""
    config = config_of(folder).get("quantization_config", {"config_groups": {}})
    if not all(group["weights"]["symmetric"] for group in config["config_groups"].values()):
        return load_model(folder)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    loaded: PreTrainedModel = model.eval()
    return loaded


def decoded_model(source: Path, checkpoint: Path, variant: VariantSpec) -> PreTrainedModel:
    """The float model with the weights of the checkpoint as the format itself decodes them."""
    model = load_whole(source)
    export = open_export(checkpoint)
    replaced = 0
    for name, module in model.named_modules():
        scheme = variant.scheme_of(name) if isinstance(module, torch.nn.Linear) else None
        if scheme is not None:
            assert export.schemes[name] == scheme
            weight = export.weight(name).dequantize(torch.float32)
            assert not torch.equal(weight, module.weight)
            module.weight = torch.nn.Parameter(weight)
            replaced += 1
    assert replaced
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(5, 5 + 40).remainder(VOCABULARY).view(1, -1)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def hidden_names(folder: Path) -> list[str]:
    """Names of what begins with a dot, anywhere below: temporary folders and files."""
    return sorted(path.name for path in folder.rglob(".*"))


def files_with_times(folder: Path) -> dict[str, int]:
    """Every file below with the time at which it was last written."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def config_of(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(checkpoint / "config.json")
    return config
