"""The parts of a model without its weights: its blocks, its layers, and what the checkpoint calls them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.extra_tensors import left_out
from quantkit.checkpoint.model_class import text_part
from quantkit.checkpoint.names import DAMAGED, Names, shared_parameters
from quantkit.engine.empty_model import empty_model, find_blocks, outermost_lists
from quantkit.engine.experts import is_stack, tells_tokens
from quantkit.engine.layers import Layer, give_way, layer_of, linear_modules
from quantkit.engine.segment import Segment
from quantkit.errors import CheckpointError


class Outline:
    """A causal language model whose parameters lie on meta.

    Args:
        folder: checkpoint folder with ``config.json``.
        trust_remote_code: run model code that comes with the checkpoint.
        stored: names of the checkpoint's tensors; by default those of the folder, and where it has no weights those
            that transformers would write.
        packed: names of the layers of a quantized checkpoint, each of which is read by its own name as ``[out_features,
            in_features]``, whatever the float model holds it in.

    Attributes:
        model: the whole model.
        text: the part of it that is run: it is given tokens and gives logits.
        names: what its parameters are called in the checkpoint.
        blocks: its list of decoder blocks.
        segments: the blocks, each to be loaded by itself.
        towers: the blocks of models of images and sound inside the model, which text does not pass.
        head: the output head, if it is a linear layer.
        embedding: the input embedding, if it is an Embedding.

    Raises:
        SourceError: transformers cannot build the model, or it has no decoder blocks.
    """

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool = False,
        stored: Collection[str] | None = None,
        packed: Collection[str] = (),
    ) -> None:
        self.model = empty_model(folder, trust_remote_code)
        self.text: Any = text_part(self.model)
        shapes = _stored_shapes(folder) if stored is None else None
        self.names = Names(self.model, shapes if stored is None else stored, shapes)
        self.names.divide(give_way(self.model))
        self._packed = frozenset(packed)
        self._first = {name: names[0] for names in shared_parameters(self.model) for name in names}
        lists = find_blocks(self.model)
        self.blocks = [block for _, blocks in lists for block in blocks]
        self.segments = [
            self._segment(f"{prefix}.{index}", block) for prefix, blocks in lists for index, block in enumerate(blocks)
        ]
        self._stays = len(lists) > 1
        self.towers = self._tower_segments()
        self.head = self._single(self.text.get_output_embeddings(), nn.Linear)
        self.embedding = self._single(self.text.get_input_embeddings(), nn.Embedding)
        self._twins = self._tied_names()

    def _segment(self, prefix: str, module: nn.Module) -> Segment:
        inside = [layer_of(joined(prefix, name), linear, self.names) for name, linear in linear_modules(module)]
        named = module.named_parameters(remove_duplicate=False)
        shared = {name.rpartition(".")[0] for name, _ in named if joined(prefix, name) in self._first}
        return Segment(prefix, module, tuple(each for each in inside if self._is_first(each)), frozenset(shared))

    def _tower_segments(self) -> list[Segment]:
        names = {module: name for name, module in self.model.named_modules()}
        lists = {each: names[each] for tower in self._towers() for each in outermost_lists(tower)}
        blocks = [(f"{name}.{index}", block) for each, name in lists.items() for index, block in enumerate(each)]
        return [self._segment(prefix, block) for prefix, block in blocks]

    def tower_weights(self) -> dict[str, int]:
        """By the names of the models of images and sound in the checkpoint the weights of their matrices."""
        names = {module: name for name, module in self.model.named_modules()}
        towers = self._towers()
        inner = {id(each) for tower in towers for each in tower.modules() if each is not tower}
        outer = [tower for tower in towers if id(tower) not in inner]
        return {
            self._stored_prefix(names[each], each): sum(m.numel() for m in each.parameters() if m.ndim >= 2)
            for each in outer
        }

    def outside(self) -> list[Layer]:
        """The linear layers that are in no block, in no model of images or sound, and not the head."""
        parts = [*self._towers(), *self.blocks, *([self.head.module] if self.head else [])]
        inside = {id(module) for part in parts for module in part.modules()}
        return [layer for layer in self.layers() if id(layer.module) not in inside]

    def _stored_prefix(self, path: str, module: nn.Module) -> str:
        """What the names of a module's parameters begin with in the checkpoint."""
        first = next((name for name, _ in module.named_parameters()), "")
        return self.names.written(joined(path, first)).removesuffix(f".{first}")

    def _is_first(self, layer: Layer) -> bool:
        """Whether a layer is the first of those that share its weight."""
        weight = f"{layer.path}.weight"
        return self._first.get(weight, weight) == weight

    def _single(self, module: object, kind: type[nn.Linear | nn.Embedding]) -> Segment | None:
        """The segment that the output head or the input embedding is; None where it is of another kind."""
        if not isinstance(module, kind):
            return None
        path = self._name(module)
        return Segment(path, module, (layer_of(path, module, self.names),))

    @property
    def runs_once(self) -> bool:
        """Whether every block has parameters of its own, and the model goes through each once."""
        return not self._stays and not any(segment.shared for segment in self.segments)

    @property
    def tied(self) -> tuple[str, ...]:
        """Names of the head and the embedding where they share one weight; else empty."""
        return tuple(self.names.layer(parameter) for parameter in self._twins)

    def _tied_names(self) -> dict[str, str]:
        """The weights of a tied head and its embedding, each to the other; parameters of the model."""
        embedding = self.text.get_input_embeddings()
        if self.head is None or embedding is None or embedding.weight is not self.head.module.weight:
            return {}
        head, tied = f"{self.head.prefix}.weight", f"{self._name(embedding)}.weight"
        return {head: tied, tied: head}

    def _name(self, module: nn.Module) -> str:
        names: dict[nn.Module, str] = {candidate: name for name, candidate in self.model.named_modules()}
        return names[module]

    def layers(self) -> list[Layer]:
        """Every linear layer of the model, those outside the decoder blocks too."""
        found = (layer_of(name, module, self.names) for name, module in linear_modules(self.model))
        return [layer for layer in found if self._is_first(layer)]

    def all_linears(self) -> list[str]:
        """The names of every linear layer of the model."""
        return [layer.name for layer in self.layers()]

    def lacking(self) -> list[str]:
        """The tensors that the model needs, and that the checkpoint has not, nor what they are tied to."""
        tied = {self.names.written(name) for name, twin in self._twins.items() if self.names.has(twin)}
        return [name for name in self.names.unmatched()[0] if name not in tied]

    def left_out(self, *, all_unknown: bool = False) -> list[str]:
        """The tensors that the model does not know and that exports leave out.

        Args:
            all_unknown: those of an export that has no place for any that the model does not know, such as a GGUF file.
        """
        unknown = self.names.unmatched()[1]
        return unknown if all_unknown else left_out(unknown, self.model)

    def check_blocks(self) -> None:
        """Refuse a checkpoint that lacks a parameter of a block, before any is read.

        Raises:
            CheckpointError: with the first that it lacks.
        """
        for segment in self.segments:
            for name, _ in segment.module.named_parameters():
                full = joined(segment.prefix, name)
                first = self._first.get(full, full)
                if self._by_layer(first) is None:
                    self._there(first)

    def others(self) -> list[str]:
        """What has a matrix and is no linear layer: routers that are bare parameters, what the model does not know.

        Each by its name in the checkpoint, and by that in the model where it is another.
        """
        dropped = {name.removesuffix(".weight") for name in self.left_out()}
        found = [name for name in self.names.unknown_matrices() if name not in dropped]
        for segment in self.segments:
            for path, module in segment.module.named_modules():
                weight = module._parameters.get("weight")
                if weight is None or weight.ndim < 2 or isinstance(module, nn.Linear | nn.Embedding):
                    continue
                parameter = joined(joined(segment.prefix, path), "weight")
                found += [self.names.written(parameter).removesuffix(".weight"), parameter.removesuffix(".weight")]
        return list(dict.fromkeys(found))

    def stacks(self) -> dict[str, list[str]]:
        """The tensors of the checkpoint that are no layer's own ``.weight``, each with the layers that it holds."""
        found: dict[str, list[str]] = {}
        for layer in self.layers():
            for source in self.names.sources(f"{layer.path}.weight"):
                if source != f"{layer.name}.weight":
                    found.setdefault(source, []).append(layer.name)
        return found

    def has_routed_layers(self) -> bool:
        """Whether blocks hold experts that may be given some tokens only, and nobody tells which."""
        inside = [module for block in self.blocks for module in block.modules()]
        stacks = (module for module in inside if is_stack(module))
        return any(isinstance(module, nn.ModuleList) for module in inside) or not all(map(tells_tokens, stacks))

    def _towers(self) -> list[nn.Module]:
        """Models inside the model that text does not pass, such as that of images."""
        models = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        first = self.blocks[0]
        return [each for each in models if not any(module is first for module in each.modules())]

    def _by_layer(self, parameter: str) -> str | None:
        """The tensor of a quantized checkpoint that is a layer's own, as packed ones are and others may be."""
        if not self._packed or not parameter.endswith(".weight"):
            return None
        layer = self.names.layer(parameter)
        is_float = not self.names.has(parameter) and f"{layer}.weight" in self.names.stored
        return f"{layer}.weight" if layer in self._packed or is_float else None

    def stored_name(self, parameter: str) -> str:
        """The name under which the checkpoint holds a parameter or, where it makes it of several, the first of them.

        Raises:
            CheckpointError: it does not hold it.
        """
        return self.names.sources(self._there(parameter))[0]

    def _there(self, parameter: str) -> str:
        """A parameter, or the one it is tied to where the checkpoint holds that."""
        twin = self._twins.get(parameter)
        if self.names.has(parameter):
            return parameter
        if twin is not None and self.names.has(twin):
            return twin
        raise CheckpointError(f"tensor {self.names.tensor(parameter)} is not in the checkpoint", DAMAGED)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The names and shapes of a folder's tensors; None where it has none."""
    if not any(folder.glob("*.safetensors*")):
        return None
    reader = CheckpointReader(folder)
    return {name: reader.shape(name) for name in reader.names()}


def joined(prefix: str, name: str) -> str:
    """The name of what lies in a part of a model; that part's own where it has none."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
