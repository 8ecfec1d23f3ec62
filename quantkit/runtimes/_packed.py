"""Load a folder of safetensors by transformers as it is: packed weights stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.engine.skeleton import auto_class
from quantkit.errors import EvaluationError
from quantkit.runtimes._checkpoint import check_checkpoint, is_gguf, translated, whole_config
from quantkit.runtimes._model import TransformersModel, whole
from quantkit.runtimes._zero_points import packed_zero_points
from quantkit.runtimes.base import LoadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_packed(path: Path, options: LoadOptions) -> TransformersModel:
    """A checkpoint as transformers loads it, from safetensors only.

    Raises:
        EvaluationError: it cannot be loaded, or a tensor is missing, unexpected or of the wrong shape.
    """
    check_checkpoint(path)
    if is_gguf(path):
        raise EvaluationError(
            f"transformers does not compute from the packed weights of {path}",
            "load it with llama.cpp, or with reference, which decodes them",
        )
    with translated(path, "the model"), packed_zero_points() as stand_in:
        config = whole_config(path, trust_remote_code=options.trust_remote_code)
        model, found = auto_class(config).from_pretrained(
            path,
            dtype=options.dtype or "auto",
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are reported by name
            output_loading_info=True,
        )
        stand_in.check([str(key[0]) for key in found["mismatched_keys"]])
        if found["missing_keys"]:
            found = {**found, "missing_keys": set(found["missing_keys"]) - _computed_names(model)}
    return whole(path, model, found, torch.device(options.device))


def _computed_names(model: PreTrainedModel) -> set[str]:
    """Names of the buffers that no file holds, such as the normalizer of Gemma's embedding.

    compressed-tensors makes parameters of those of a module that it compresses; transformers then computes them as
    ever, but says that they were missing.
    """
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, _ in fresh.named_buffers()} - set(fresh.state_dict())
