"""A LLaMA-Factory export configuration as a recipe.

The keys are those of ``src/llamafactory/hparams`` in https://github.com/hiyouga/LLaMA-Factory, as its examples in
``examples/merge_lora`` use them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import RecipeError
from quantkit.recipe.document import Recipe, text_of
from quantkit.recipe.fields import named_after
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.system.strict_yaml import parse_mapping

SAMPLES = 128
MAX_LENGTH = 1024
GROUP_SIZE = 128
"""LLaMA-Factory's own, where a configuration does not say."""
DTYPES = ("auto", "float16", "bfloat16", "float32")
MEANINGLESS = {
    "export_size": "shards hold up to 4 GiB",
    "export_device": "the merge runs on the CPU, one tensor at a time",
    "export_legacy_format": "checkpoints are safetensors",
    "do_sample": "nothing is sampled",
    "finetuning_type": "the adapter says itself what it is",
    "stage": "a merge is the same for all stages",
}
TRANSLATED = {
    "model_name_or_path", "adapter_name_or_path", "model_revision", "trust_remote_code", "infer_dtype", "export_dir",
    "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
    "export_quantization_maxlen", "template",
}  # fmt: skip
REFUSED = {
    "quantization_bit": (
        "merges into a quantized base",
        "remove the key and name the float base; for a QLoRA adapter set merge.base: nf4 in the recipe",
    ),
    "do_train": ("is a configuration of a training", "give the one that exports its adapter"),
}
NOT_LORA = ("freeze", "oft", "galore", "badam")


@dataclass(slots=True)
class _Draft:
    """A recipe in the making: its sections, and remarks that stand above them."""

    sections: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, section: str, text: str) -> None:
        self.remarks.setdefault(section, []).append(text)

    def text(self) -> str:
        parts = []
        for name, content in self.sections.items():
            comments = "".join(f"# {text}\n" for text in self.remarks.get(name, []))
            parts.append(comments + yaml.safe_dump({name: content}, sort_keys=False, allow_unicode=True))
        return "\n".join(parts)


def import_recipe(path: str | Path) -> str:
    """The text of a recipe that does what a LLaMA-Factory export configuration asks for.

    Args:
        path: a YAML or JSON file with ``model_name_or_path`` and ``export_dir``.

    Returns:
        A valid recipe; comments tell what has no counterpart and was left out.

    Raises:
        RecipeError: the file cannot be read, is no export configuration, or asks for what quantkit refuses.
    """
    path = Path(path)
    given = parse_mapping(text_of(path, str(path), "is this a configuration?"), str(path))
    _check(given, path)
    draft = _Draft()
    draft.sections["name"] = _name(given, path)
    draft.remark("name", f"From the LLaMA-Factory configuration {path.name}; relative paths are as they were there.")
    _model(draft, given, path)
    _quantization(draft, given, path)
    _leftovers(draft, given)
    text = draft.text()
    Recipe.parse(text, origin=f"recipe made of {path}")
    return text


def _check(given: Mapping[str, Any], path: Path) -> None:
    for key, (what, remedy) in REFUSED.items():
        if given.get(key):
            raise RecipeError(f"{path} {what} ({key}: {given[key]})", remedy)
    if given.get("finetuning_type") in NOT_LORA and given.get("adapter_name_or_path"):
        raise RecipeError(
            f"{path}: finetuning_type {given['finetuning_type']} is no LoRA", "merge it with LLaMA-Factory"
        )
    for key in ("model_name_or_path", "export_dir"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise RecipeError(f"{path} is no export configuration: it has no {key}", "give one of LLaMA-Factory's")


def _name(given: Mapping[str, Any], path: Path) -> str:
    last = Path(given["export_dir"].rstrip("/")).name or path.stem
    return named_after(re.sub(r"[\s/\\\\]+", "-", last), "exported").rstrip("-._")


def _model(draft: _Draft, given: Mapping[str, Any], path: Path) -> None:
    model: dict[str, Any] = {"source": given["model_name_or_path"].strip()}
    adapters = _adapters(given, path)
    if adapters:
        model["adapter"] = adapters[0] if len(adapters) == 1 else adapters
    if given.get("model_revision") not in (None, "main"):
        model["revision"] = str(given["model_revision"])
    dtype = given.get("infer_dtype", "auto")
    if dtype not in DTYPES:
        raise RecipeError(f"{path}: infer_dtype '{dtype}' is none of {', '.join(DTYPES)}", "mend it")
    if dtype != "auto":
        model["dtype"] = dtype
    if given.get("trust_remote_code") is True:
        model["trust_remote_code"] = True
    if given.get("template"):
        draft.remark(
            "model",
            f"template: {given['template']} is left out: the chat template is the tokenizer's own, and that of the "
            "adapter's folder where it holds one.",
        )
    draft.sections["model"] = model


def _adapters(given: Mapping[str, Any], path: Path) -> list[str]:
    named = given.get("adapter_name_or_path")
    if named is None:
        return []
    if isinstance(named, str):
        named = named.split(",")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise RecipeError(f"{path}: adapter_name_or_path is neither text nor a list of it", "mend it")
    return [name.strip() for name in named if name.strip()]


def _quantization(draft: _Draft, given: Mapping[str, Any], path: Path) -> None:
    bits = given.get("export_quantization_bit")
    where = f"quantkit run writes it to reports/{draft.sections['name']}/variants/, not to {given['export_dir']}."
    if bits is None:
        scheme = "float16" if given.get("infer_dtype") == "float16" else "bfloat16"
        variant: dict[str, Any] = {"name": "merged", "method": "none", "format": "float", "scheme": scheme}
        draft.remark("variants", f"No export_quantization_bit: the merged model in 16 bits. {where}")
    else:
        draft.sections["calibration"] = _calibration(draft, given)
        variant = {
            "name": f"gptq-int{bits}",
            "method": "gptq",
            "format": "gptq",
            "bits": bits,
            "group_size": GROUP_SIZE,
        }
        draft.remark("variants", f"What LLaMA-Factory exports: GPTQ with groups of {GROUP_SIZE}, symmetric. {where}")
    draft.sections["variants"] = [variant]


def _calibration(draft: _Draft, given: Mapping[str, Any]) -> dict[str, Any]:
    dataset = given.get("export_quantization_dataset")
    if not dataset:
        dataset = "instructions_mini"
        draft.remark("calibration", "No export_quantization_dataset was given: this is quantkit's own.")
    elif not Path(str(dataset)).suffix and HUB_REFERENCE.fullmatch(str(dataset)):
        dataset = f"hub:{dataset}"
    draft.remark("calibration", "Rows are filled up: LLaMA-Factory takes texts of export_quantization_maxlen tokens.")
    return {
        "dataset": str(dataset),
        "samples": given.get("export_quantization_nsamples", SAMPLES),
        "max_length": given.get("export_quantization_maxlen", MAX_LENGTH),
        "packing": "full",
    }


def _leftovers(draft: _Draft, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        shown = " ".join(str(value).split())
        if key in MEANINGLESS:
            draft.remark("name", f"Left out: {key}: {shown} ({MEANINGLESS[key]}).")
        elif key not in TRANSLATED and value not in (None, False):
            draft.remark("name", f"Left out, not known: {key}: {shown}")
