"""What a language model inside another is called by the class that transformers has for it alone.

Of some models that see, transformers loads the language model alone from the same files, with
``AutoModelForCausalLM``, under names without the other's prefix. What a file says of its layers has to hold there, too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.model_class import BUILDING
from quantkit.checkpoint.names import Names
from quantkit.engine.layers import give_way, layer_of, linear_modules
from quantkit.engine.skeleton import Skeleton


def names_alone(skeleton: Skeleton) -> dict[str, str]:
    """By the names of layers in the checkpoint those in the model that transformers makes of the text alone."""
    config: Any = skeleton.model.config
    mapping = AutoModelForCausalLM._model_mapping
    cls = mapping[type(config)] if type(config) in mapping else type(skeleton.model)
    if isinstance(skeleton.model, cls) or cls.config_class is not type(config.get_text_config()):
        return {}
    with BUILDING, torch.device("meta"):
        alone = cls._from_config(config.get_text_config())
    names = Names(alone, skeleton.names.stored)
    names.divide(give_way(alone))
    layers = [layer_of(path, module, names) for path, module in linear_modules(alone)]
    return {layer.name: layer.path for layer in layers if layer.name != layer.path}
