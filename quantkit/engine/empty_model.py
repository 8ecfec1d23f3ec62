"""A model as transformers builds it, without weights, and the list of decoder blocks in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from quantkit.checkpoint.foreign_errors import said_by_transformers
from quantkit.checkpoint.model_class import BUILDING, build_model, text_config, text_part
from quantkit.engine.layers import linear_modules
from quantkit.errors import SourceError

LARGE = 1 << 16
"""Values of a parameter from which on it does not stay where it was made."""


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's ``config.json``, its large tensors on meta and its small ones computed.

    Raises:
        SourceError: there is no ``config.json``, or transformers cannot build a model of it that goes on with text by a
            decoder alone.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with BUILDING, _ParametersOnMeta(), _filled_on_meta():
            model = build_model(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        problem, remedy = said_by_transformers(error)
        raise SourceError(
            f"transformers cannot build the model of {folder / 'config.json'}: {problem}", remedy
        ) from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        # what the classes of models raise for values that nobody foresaw; a mistake here would look the same
        raise SourceError(
            f"building the model of {folder / 'config.json'} failed: {type(error).__name__}: {error}",
            "check the values of config.json; if transformers itself loads the model, report it as a fault of quantkit",
        ) from error
    if getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in signature(model.forward).parameters:
        raise SourceError(
            f"{type(model).__name__} has an encoder that its decoder reads, and quantkit walks through models of one "
            "stream of tokens",
            "quantkit quantizes decoder-only language models, alone or inside models that see or hear",
        )
    return model.eval()


def find_blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The list of decoder blocks: the outermost ModuleList of the text model that has as many as its config says.

    Models inside the text model, such as that of sound in Phi-4 multimodal, are not looked into. Where the config says
    no number, or no list has it, the list with the most linear layers is taken. There are several where others are
    made of the same classes: a model that goes through them in turns, again and again.

    Raises:
        SourceError: there is none.
    """
    part = text_part(model)
    text: nn.Module = getattr(part, "get_decoder", lambda: part)()
    text = text if any(isinstance(each, nn.ModuleList) for each in text.modules()) else part
    configs = [config for config in (text_config(text), getattr(text, "config", None)) if config is not None]
    count = getattr(configs[0], "num_hidden_layers", None) if configs else None
    names = {module: name for name, module in model.named_modules()}
    best: tuple[tuple[bool, int], nn.ModuleList] | None = None
    for each in outermost_lists(text, {type(config) for config in configs}):
        linears = sum(1 for _ in linear_modules(each))
        if linears and (best is None or (len(each) == count, linears) > best[0]):
            best = (len(each) == count, linears), each
    if best is None:
        raise SourceError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers",
            "quantkit quantizes decoder-only transformers",
        )
    lists = list(outermost_lists(text, {type(config) for config in configs}))
    alike = [(names[each], each) for each in lists if [*map(type, each)] == [*map(type, best[1])]]
    _check_whole(best[1], lists, names)
    return alike


def _check_whole(blocks: nn.ModuleList, lists: Sequence[nn.ModuleList], names: Mapping[nn.Module, str]) -> None:
    """Refuse a model whose blocks are no modules, as XLM's: it has a list of attentions, and one of what follows each.

    Raises:
        SourceError: a list of other modules, as many, holds linear layers of more than half the weights.
    """

    def weights(each: nn.ModuleList) -> int:
        return sum(linear.weight.numel() for _, linear in linear_modules(each))

    for other in lists:
        differs = type(other[0]) is not type(blocks[0]) and len(other) == len(blocks)
        if differs and 2 * weights(other) > weights(blocks):
            raise SourceError(
                f"the model keeps the parts of its blocks in several lists, {names[blocks]} and {names[other]}",
                "quantkit quantizes models whose blocks are modules of one list",
            )


def outermost_lists(module: nn.Module, configs: Set[type] | None = None) -> Iterator[nn.ModuleList]:
    """The ModuleLists in a model that are in no other, those of models with configs of other kinds aside, if given."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from [child] if len(child) else []
        elif configs is None or not isinstance(child, PreTrainedModel) or type(child.config) in configs:
            yield from outermost_lists(child, configs)


@contextmanager
def _filled_on_meta() -> Iterator[None]:
    """Inside the block a large parameter that is made with values, as experts that begin as zeros, goes to meta.

    Otherwise those of all blocks would be there together.
    """

    def moved(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or parameter.numel() < LARGE:
            return None
        return nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # a hook may return one
    try:
        yield
    finally:
        hook.remove()


class _ParametersOnMeta(TorchFunctionMode):
    """Makes ``torch.empty`` give meta tensors: parameters are made so, computed buffers are not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
