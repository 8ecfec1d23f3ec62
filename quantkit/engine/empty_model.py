"""A model as transformers builds it, without weights, and the list of decoder blocks in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.engine.layers import linear_modules
from quantkit.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def auto_class(config: Any) -> Any:
    """The auto class of transformers that loads a config's model: of text or, where there is none, of images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees and not known else AutoModelForCausalLM


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's ``config.json``, its large tensors on meta and its small ones computed.

    Raises:
        SourceError: there is no ``config.json``, or transformers cannot build a causal language model of it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with _ParametersOnMeta():
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise SourceError(
            f"transformers cannot build the model of {folder / 'config.json'}: {error}",
            "check that it is a decoder-only language model that the installed transformers knows",
        ) from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        # what the classes of models raise for values that nobody foresaw; a mistake here would look the same
        raise SourceError(
            f"building the model of {folder / 'config.json'} failed: {type(error).__name__}: {error}",
            "check the values of config.json; if transformers itself loads the model, report it as a fault of quantkit",
        ) from error
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: in the text model the outermost ModuleList that holds the most linear layers.

    Raises:
        SourceError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    text: nn.Module = getattr(model, "get_decoder", lambda: model)()
    within = {id(module) for module in text.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in within:
            linears = sum(1 for _ in linear_modules(module))
            if linears and (best is None or linears > best[0]):
                best = (linears, name, module)
    if best is None:
        raise SourceError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers",
            "quantkit quantizes decoder-only transformers",
        )
    return best[1], best[2]


class _ParametersOnMeta(TorchFunctionMode):
    """Makes ``torch.empty`` give meta tensors: parameters are made so, computed buffers are not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
