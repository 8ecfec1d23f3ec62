"""What transformers does to tensors between a file and a model: parts, conversions, and its own mapping of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Read = Callable[[str], torch.Tensor]
"""Reads a tensor of the checkpoint by its name there."""


@dataclass(frozen=True, slots=True)
class Part:
    """A weight that the engine takes out of a larger parameter, such as one projection of one expert.

    Attributes:
        parameter: the model's parameter of which it is a part.
        cut: gives the view of that parameter which it is.
        expert: index in a stack of experts; None where the parameter is no stack.
        piece: which of the matrices that are concatenated there, and how many these are.
        leaf: what the part is called beside its index, where the checkpoint holds the stack as one tensor; empty for
            what is called by the stack and its index.
    """

    parameter: str
    cut: Callable[[torch.Tensor], torch.Tensor]
    expert: int | None = None
    piece: tuple[int, int] = (0, 1)
    leaf: str = ""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of the checkpoint of which transformers makes parameters.

    Attributes:
        first: the parameter by which its converter is called.
        converter: transformers' own.
        sources: by pattern of the converter the names of the tensors, in the order in which they are stacked.
    """

    first: str
    converter: Any
    sources: Mapping[str, list[str]]

    def names(self) -> list[str]:
        """The tensors of the checkpoint."""
        return [name for names in self.sources.values() for name in names]

    def is_of_weights(self) -> bool:
        """Whether it takes what is called ``weight`` and nothing else."""
        patterns: list[str] = self.converter._original_source_patterns
        return all(pattern.endswith(".weight") for pattern in patterns)

    def targets(self) -> list[str]:
        """The parameters that are made."""
        pattern, *others = self.converter.target_patterns
        return [self.first, *(self.first.replace(pattern, other, 1) for other in others if pattern in self.first)]

    def run(self, read: Read, model: Any) -> dict[str, torch.Tensor]:
        """The parameters, from tensors that are read as they are needed."""
        converter = deepcopy(self.converter)
        for pattern in converter.source_patterns:
            for name in self.sources.get(pattern, ()):
                converter.add_tensor(self.first, name, pattern, lambda name=name: read(name))
        made: dict[str, torch.Tensor] = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def stacked(self, part: Part) -> str | None:
        """The tensor that holds one piece of one expert by itself; None where none does."""
        kinds = [type(operation).__name__ for operation in self.converter.operations]
        place, pieces = part.piece
        if part.expert is None or kinds != ["MergeModulelist", "Concatenate"][: 1 + (pieces > 1)]:
            return None
        if len(self.converter.source_patterns) != pieces:
            return None
        names = self.sources.get(self.converter.source_patterns[place], [])
        return names[part.expert] if part.expert < len(names) else None


def on_load(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What transformers does to names on load: renamings, and converters."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return _kinds(get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else [])


def on_save(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What it does when a model is saved."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not isinstance(model, PreTrainedModel):
        return [], []
    given = get_model_conversion_mapping(model, add_legacy=False)
    return _kinds([each.reverse_transform() for each in given[::-1] if not isinstance(each, PrefixChange)])


def _kinds(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    given = list(transforms)
    renamings = [each for each in given if isinstance(each, WeightRenaming)]
    return renamings, [each for each in given if isinstance(each, WeightConverter)]
