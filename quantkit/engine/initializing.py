"""Whether transformers can load a model whose layers are packed, as far as the class of the model is concerned.

When a file is loaded, transformers runs the class's ``_init_weights`` over its modules, for what the file may lack.
Some classes reach there for the weights of linear layers, which packed layers do not have, and loading ends with an
AttributeError. Whether a class does is found by trying it on the model without weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantkit.checkpoint.conversions import on_load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reaches_for_weights(model: PreTrainedModel, layers: Collection[str], *, replaced: bool) -> str | None:
    """The first layer whose weight loading would miss; None where there is none.

    Args:
        model: on meta, as it was built; it is left as it was.
        layers: the paths of the packed layers.
        replaced: whether modules of another kind stand in the place of packed layers, or they lose their weights alone.
    """
    holders = dict.fromkeys(layer.rpartition(".")[0] for layer in layers)
    tried: dict[type[nn.Module], str] = {}
    for path in [*([] if replaced else layers), *holders]:
        tried.setdefault(type(model.get_submodule(path)), path)
    with torch.no_grad():
        sound = [path for path in tried.values() if not _fails(model, path)]  # others lost what is no packed layer's
        with _packed(model, layers, replaced=replaced):
            failing = next((path for path in sound if _fails(model, path)), None)
    return next((layer for layer in layers if failing and f"{layer}.".startswith(f"{failing}.")), None)


def splits_in_vain(model: PreTrainedModel, layers: Collection[str]) -> str | None:
    """The pattern of tensors that transformers splits on load, and does not in a model with emptied layers.

    Its quantizer lets such a converter look for packed tensors, too, unless the layers that it makes are packed
    themselves, and a converter of several tensors cannot make several.

    Args:
        model: on meta.
        layers: the paths of the packed layers.
    """
    for converter in on_load(model)[1]:
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        if len(targets) < 2 or not all(source.endswith(".weight") for source in sources):
            continue
        first = targets[0].removesuffix("weight").removesuffix(".")
        if not any(layer.endswith(first) for layer in layers):
            return str(sources[0])
    return None


@contextmanager
def _packed(model: nn.Module, layers: Collection[str], *, replaced: bool) -> Iterator[None]:
    """The model as if its layers were packed."""
    before: list[tuple[nn.Module, str, nn.Module, dict[str, nn.Parameter | None]]] = []
    try:
        for layer in layers:
            holder, _, leaf = layer.rpartition(".")
            parent, module = model.get_submodule(holder), model.get_submodule(layer)
            before.append((parent, leaf, module, dict(module._parameters)))
            if replaced:
                setattr(parent, leaf, nn.Module())
            else:
                del module.weight
        yield
    finally:
        for parent, leaf, module, parameters in before:
            setattr(parent, leaf, module)
            module._parameters.clear()
            module._parameters.update(parameters)  # in their order


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model that a module belongs to."""
    from transformers import PreTrainedModel

    names = path.split(".")
    inside = (model.get_submodule(".".join(names[:count])) for count in range(len(names), 0, -1))
    return next((module for module in inside if isinstance(module, PreTrainedModel)), model)


def _fails(model: PreTrainedModel, path: str) -> bool:
    """Whether the code that initializes a module misses a weight."""
    try:
        _owner(model, path)._init_weights(model.get_submodule(path))
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False  # what cannot be computed on meta says nothing of the weights
    return False
