"""Of which class of transformers a checkpoint's model is: its config says, and nothing is assumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from torch import nn

from quantkit.errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TEXT = "AutoModelForCausalLM"
MORE_THAN_TEXT = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
)
WHOLE = "AutoModel"
"""Which remote code may name alone for a model that generates."""
BUILDING = RLock()
"""Held while a model is built: transformers changes settings of the whole process meanwhile, and several runs at the
same time build models."""


def class_name(config: Any) -> str:
    """The class of transformers that people load a config's model by: an auto class, where one knows it.

    Raises:
        SourceError: none generates text with such a config.
    """
    import transformers

    is_composite = config.get_text_config() is not config
    order = (*MORE_THAN_TEXT, TEXT) if is_composite else (TEXT, *MORE_THAN_TEXT)
    remote = getattr(config, "auto_map", None) or {}
    for name in (*order, WHOLE):
        if name in remote:
            return name
    named = _named_class(config)
    known = [name for name in order if type(config) in getattr(transformers, name)._model_mapping]
    for name in known:
        if named is None or named in _classes(getattr(transformers, name)._model_mapping[type(config)]):
            return name
    if named is not None or known:
        return known[0] if named is None else str(named.__name__)
    raise SourceError(
        f"transformers has no model that generates text with a config of type {config.model_type!r}",
        "check model_type in config.json; quantkit quantizes language models, alone or inside models that see or hear",
    )


def class_name_in(folder: Path) -> str:
    """:func:`class_name` for a checkpoint; ``AutoModelForCausalLM`` where transformers reads no config there."""
    from transformers import AutoConfig

    try:
        return class_name(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, LookupError, AttributeError, ImportError, SourceError):
        return TEXT


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class with whose ``from_pretrained`` a config's model is loaded.

    ``architectures`` names it, where transformers has that class for such a config and it generates; else the auto
    class says it, which serves where the code of the model comes with it.

    Raises:
        SourceError: none generates text with such a config.
    """
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    named = _named_class(config)
    if named is None or (remote and trust_remote_code):
        return getattr(transformers, class_name(config))
    return named


def build_model(config: Any, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, its parameters as they were initialized; other errors are those of transformers.

    Raises:
        SourceError: none generates text with such a config.
    """
    found = model_class(config, trust_remote_code)
    given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model: PreTrainedModel
    with BUILDING:
        if hasattr(found, "from_config"):
            model = found.from_config(config, trust_remote_code=trust_remote_code, **given)
        else:
            model = found._from_config(config_for(found, config), **given)
    return model


def loader(found: Any) -> Any:
    """The ``from_pretrained`` of a class that returns the model and what was found, as it is asked to.

    Classes of models that speak load voices on top of that of all models, from a folder, and lose what was found.
    """
    from transformers import PreTrainedModel

    if getattr(found, "forward", None) is nn.Module.forward:
        return partial(PreTrainedModel.from_pretrained.__func__, found)
    return found.from_pretrained


def config_for(found: Any, config: Any) -> Any:
    """The config of which a class makes its model: a class of text models inside others takes that of the text."""
    text = config.get_text_config()
    return text if found.config_class is type(text) else config


def text_part(model: nn.Module) -> Any:
    """The part of a model that is given tokens and gives logits: the model itself, unless it only holds such a one.

    A model that speaks, too, such as Qwen's Omni, holds the one that thinks beside the one that speaks.
    """
    if type(model).forward is not nn.Module.forward:
        return model
    text = text_config(model)
    return next((child for child in model.children() if text_config(child) is text is not None), model)


def text_config(module: nn.Module) -> Any:
    """The config of the text model in a model; None where it has none."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _named_class(config: Any) -> Any:
    """The class that ``architectures`` names, where transformers has it, it suits the config, and it generates."""
    import transformers

    names = getattr(config, "architectures", None)
    found = getattr(transformers, names[0], None) if isinstance(names, list) and names else None
    suits = getattr(found, "config_class", None)
    if not isinstance(found, type) or suits is None or not found.can_generate():  # type: ignore[attr-defined]
        return None
    return found if isinstance(config, suits) or isinstance(config.get_text_config(), suits) else None


def _classes(found: Any) -> tuple[Any, ...]:
    """What an auto class maps a config to: a class, or several."""
    return tuple(found) if isinstance(found, tuple | list) else (found,)
