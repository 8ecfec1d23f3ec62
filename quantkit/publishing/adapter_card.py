"""The card of an adapter for a quantized checkpoint: what it is, of which codes, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.adapter_folder import CONFIG
from quantkit.errors import CheckpointError
from quantkit.exports.adapter import AGAIN
from quantkit.exports.manifest import MANIFEST
from quantkit.formats import FORMATS
from quantkit.publishing.card import CARD
from quantkit.publishing.markdown import code, fenced, plain, quoted
from quantkit.recipe.adapting import SERVED
from quantkit.system.artifacts import read_json, write_text

STARTS = {
    "weighted": "weighed by the inputs of each layer in the quantized model (EoRA, arXiv:2410.21271)",
    "plain": "the singular value decomposition of the error (the first step of LoftQ, arXiv:2310.08659)",
}


def describe_adapter(folder: Path, name: str) -> None:
    """Write ``README.md`` beside a new adapter.

    Args:
        folder: where it lies while it is made.
        name: that its folder will have.

    Raises:
        CheckpointError: its manifest is broken.
        OutputError: the folder cannot be written.
    """
    write_text(folder / CARD, adapter_card(folder, name))


def adapter_card(folder: Path, name: str) -> str:
    """The card of an adapter."""
    try:
        manifest, config = read_json(folder / MANIFEST), read_json(folder / CONFIG)
        base, digest = str(manifest["base"]["name"]), str(manifest["base"]["digest"])
        head: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter", "library_name": "peft"}
        head["tags"] = ["quantkit", "lora", str(manifest["format"])]
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
            f"# {plain(name)}",
            f"A LoRA of rank {config['r']} for {len(manifest['names'])} layers of {code(base)}, a model in the format "
            f"{plain(manifest['format'])}. It takes up what quantization lost there, and belongs to these codes alone: "
            "on the float model, or on the same model quantized again, it does harm.",
            "\n".join(f"- {line}" for line in _facts(manifest, digest)),
            "## How to load it",
            _usage(base, name, str(manifest["format"]), int(config["r"])),
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest of adapter {folder} cannot be read: {error}", AGAIN) from error
    return "\n\n".join(parts) + "\n"


def _facts(manifest: Mapping[str, Any], digest: str) -> Iterator[str]:
    errors = list(manifest["errors"].values())
    before, after = (sum(each[place] for each in errors) / len(errors) for place in (0, 1))
    yield f"start: {STARTS[manifest['start']]}"
    yield f"mean square of the layers' output errors, by that of the outputs: {before:.3g}, and {after:.3g} with it"
    yield f"digest of the tensors that it was made for: {code(digest)}"
    if manifest.get("calibration_sha256"):
        yield f"calibration tokens: SHA-256 {code(manifest['calibration_sha256'])}"
    yield f"made by {plain(manifest['created_by'])}"


def _usage(base: str, name: str, form: str, rank: int) -> str:
    config = FORMATS.get(form).decoding_config
    names = f"AutoModelForCausalLM, {config}" if config else "AutoModelForCausalLM"
    given = f", quantization_config={config}(dequantize=True)" if config else ""
    text = (
        f"from peft import PeftModel\nfrom transformers import {names}\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted(base)}{given})\n"
        f"model = PeftModel.from_pretrained(model, {quoted(name)})"
    )
    why = "\n\nPEFT looks for weights that packed layers do not have, so that they are decoded first." if config else ""
    served = next((each for each in SERVED if each >= rank), None)
    line = f"vllm serve {base} --enable-lora --max-lora-rank {served} --lora-modules recovered={name}"
    serve = (
        f"Where vLLM serves the checkpoint, it serves the adapter beside its packed weights:\n\n{fenced(line, 'sh')}"
    )
    return f"{fenced(text, 'python')}{why}" + (f"\n\n{serve}" if served else "")
