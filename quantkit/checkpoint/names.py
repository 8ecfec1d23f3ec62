"""The names of a checkpoint's tensors and those of a model's parameters, in both directions.

Since version 5, transformers renames, splits and stacks tensors on load: a Mixtral's file has
``block_sparse_moe.experts.3.w1.weight``, its model one ``mlp.experts.gate_up_proj`` for all experts. What belongs to
what is told by transformers' own conversion mapping (``transformers.conversion_mapping``); nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.conversions import Conversion, Part, Read, on_load, on_save
from quantkit.checkpoint.model_class import text_part
from quantkit.errors import CheckpointError

DAMAGED = (
    "check that all files are there and that config.json belongs to them; if transformers loads the model whole, "
    "report it as a fault of quantkit"
)


class Names:
    """What each parameter of a model is made of.

    Args:
        model: as transformers builds it, its large tensors on meta. Any other module calls its tensors as it does.
        stored: names of the tensors of its checkpoint; by default those that ``save_pretrained`` would write.
        shapes: of these tensors, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Collection[str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._model = model
        self._shapes = {name: torch.empty(each.shape, device="meta") for name, each in model.state_dict().items()}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._forward, self._backward = on_load(model), on_save(model)
        self._alias: dict[str, str] = {}
        self._conversions: dict[str, Conversion] = {}
        self._parts: dict[str, Part] = {}
        self._made: dict[str, torch.Tensor] = {}
        self._shared = {name for names in shared_parameters(model) for name in names}
        self._stored_shapes = shapes or {}
        self._stored = frozenset(self._as_saved() if stored is None else stored)
        self._match()

    # What the engine asks.

    @property
    def stored(self) -> frozenset[str]:
        """The names of the checkpoint's tensors."""
        return self._stored

    def divide(self, parts: Mapping[str, Part]) -> None:
        """Tell of parameters that take the place of others: each a part of one that transformers knows."""
        self._parts |= parts

    def has(self, parameter: str) -> bool:
        """Whether the checkpoint holds a parameter, or what it is made of."""
        return bool(self.sources(parameter))

    def sources(self, parameter: str) -> list[str]:
        """The tensors of the checkpoint that a parameter is made of; none if they are missing."""
        part = self._parts.get(parameter)
        if part is not None:
            single = self._single(part)
            return [single] if single is not None else self._sources_of_whole(part.parameter)
        return self._sources_of_whole(parameter)

    def _sources_of_whole(self, parameter: str) -> list[str]:
        if parameter in self._alias:
            return [self._alias[parameter]]
        found = self._conversions.get(parameter)
        return [] if found is None else found.names()

    def read(self, parameter: str, read: Read) -> torch.Tensor:
        """A parameter, made of what ``read`` gives for names of the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, or those that belong together do not fit.
        """
        part = self._parts.get(parameter)
        if part is not None:
            single = self._single(part)
            return read(single) if single is not None else part.cut(self._whole(part.parameter, read)).contiguous()
        return self._whole_now(parameter, read)

    def read_whole(self, parameter: str, read: Read) -> torch.Tensor:
        """A parameter as transformers builds the model, though parts took its place; see :meth:`read`."""
        return self._whole_now(parameter, read)

    def unmatched(self) -> tuple[list[str], list[str]]:
        """The tensors that the model needs and the checkpoint lacks, and those that the model does not know."""
        known = {*self._shapes, *self._parts} - {part.parameter for part in self._parts.values()}
        alone = {self.written(name) for name in self._parts} & self._stored
        lacking = [self.written(name) for name in known if not self.has(name)]
        used = {source for name in known for source in self.sources(name)}
        return sorted(set(lacking) - alone), sorted(self._stored - used - alone)

    def unknown_parts(self, known: Collection[str] = ()) -> dict[str, int]:
        """The parts of the checkpoint of which the model knows nothing, each with its number of tensors.

        Args:
            known: tensors that are spoken of elsewhere.
        """
        unknown = [name for name in self.unmatched()[1] if name not in known]
        others = {prefix for name in self._stored.difference(unknown, known) for prefix in _prefixes(name)}
        found: dict[str, int] = {}
        for name in unknown:
            part = next((prefix for prefix in _prefixes(name) if prefix not in others), name)
            found[part] = found.get(part, 0) + 1
        return found

    def unknown_matrices(self) -> list[str]:
        """What the model does not know and looks like weights of layers, without ``.weight``."""
        _, unknown = self.unmatched()
        shapes = self._stored_shapes
        return [name.removesuffix(".weight") for name in unknown if len(shapes.get(name, (0, 0))) > 1]

    def parts(self) -> dict[str, list[str]]:
        """The parameters that gave way to parts, each with the names of these."""
        found: dict[str, list[str]] = {}
        for name, part in self._parts.items():
            found.setdefault(part.parameter, []).append(name)
        return found

    def assemble(self, parameter: str, read: Read) -> torch.Tensor:
        """A parameter of which there are parts, put together of them.

        Args:
            parameter: it.
            read: gives a part by its name in the model.
        """
        members = {name: part for name, part in self._parts.items() if part.parameter == parameter}
        values = {name: read(name) for name in members}
        dtype = next(iter(values.values())).dtype
        whole = torch.empty(self._shapes[parameter].shape, dtype=dtype)
        for name, part in members.items():
            part.cut(whole).copy_(values[name])
        return whole

    def layer(self, parameter: str) -> str:
        """What a layer is called in checkpoints, by the parameter that is its weight.

        It is the name of the tensor that holds the weight, without ``.weight``. An expert of a stack that is one tensor
        is called as servers call it, ``experts.INDEX.NAME``.
        """
        part = self._parts.get(parameter)
        if part is None:
            return self.tensor(parameter).removesuffix(".weight")
        single = self._single(part)
        if single is not None:
            return single.removesuffix(".weight")
        if part.expert is None:
            return self.tensor(part.parameter).removesuffix(".weight")
        return self._layer_of_stack(part)

    def _layer_of_stack(self, part: Part) -> str:
        """What an expert is called by the place of its stack in the file, or in the model where the file renames it."""
        leaf = part.parameter.rpartition(".")[2]

        def called(stack: str) -> str:
            if not part.leaf:
                return f"{stack.removesuffix('.weight')}.{part.expert}"
            return f"{stack.removesuffix(leaf)}{part.expert}.{part.leaf}"

        own = self._alias.get(part.parameter)
        if own is not None and own.endswith(f".{leaf}"):
            return called(own)
        saved = self._backward_name(part.parameter)
        stack = saved if saved.endswith(f".{leaf}") else part.parameter
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        names = [called(stack), called(stack.removeprefix(prefix))]
        return next((name for name in names if f"{name}.weight" in self._stored), names[0])

    def tensor(self, parameter: str) -> str:
        """The name under which a checkpoint holds a parameter that it holds as it is.

        For one that this checkpoint lacks, or makes of several tensors, the name that ``save_pretrained`` would choose.
        """
        if parameter in self._alias:
            return self._alias[parameter]
        return parameter if parameter in self._conversions else self._backward_name(parameter)

    def written(self, parameter: str) -> str:
        """The name of the tensor in which a parameter that stays float is written; see :meth:`layer` for parts."""
        if parameter not in self._parts:
            return self.tensor(parameter)
        return f"{self.layer(parameter)}.{parameter.rpartition('.')[2]}"

    def as_written(self, parameter: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Name and tensor by which a parameter that stays float is written, in the layout of the checkpoint."""
        part = self._parts.get(parameter)
        if part is not None and part.expert is None:
            value = self.assemble(part.parameter, lambda _: value)
        return self.written(parameter), value

    def are_stacked(self, parameter: str) -> bool:
        """Whether transformers makes a parameter of tensors that hold its parts one by one."""
        return parameter in self._conversions

    def loads_alone(self, parameter: str) -> bool:
        """Whether transformers finds the place of a weight that lies in a tensor of its own, see :meth:`layer`.

        It ties the weights that blocks of several depths share by their names, which packed ones do not have.
        """
        part = self._parts.get(parameter)
        if parameter in self._shared:
            return False
        if part is None or part.expert is None:
            return part is None
        key, pattern = self._renamed(f"{self.layer(parameter)}.weight")
        return key == part.parameter and pattern is not None

    def merged(self) -> dict[str, list[str]]:
        """The parameters that transformers makes of the weights of several tensors, each with their names."""
        made = {name: each for name, each in self._conversions.items() if each.is_of_weights()}
        return {name: each.names() for name, each in made.items()}

    def is_part(self, parameter: str) -> bool:
        """Whether a parameter is a part of another one."""
        return parameter in self._parts

    def part(self, parameter: str) -> Part:
        """Of which parameter another one is a part, and which."""
        return self._parts[parameter]

    def alone(self, parameter: str) -> str | None:
        """The tensor of the checkpoint that holds a part of a parameter by itself; None where none does."""
        return self._single(self._parts[parameter])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter as transformers builds the model, also of those that gave way to parts."""
        if len(self._sizes) != len(self._shapes):
            self._sizes = {name: tuple(each.shape) for name, each in self._shapes.items()}
        return self._sizes

    def as_stored(self, parameter: str, value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A whole parameter in the layout of the one tensor that it is made of: as it is, or transposed.

        Args:
            parameter: it.
            value: it.
            shape: of the tensor.

        Raises:
            CheckpointError: it is made of several tensors, or otherwise.
        """
        names = self._sources_of_whole(parameter)
        for stored in (value, value.transpose(-1, -2).contiguous()):
            is_one = len(names) == 1 and tuple(stored.shape) == tuple(shape)
            if is_one and torch.equal(self._whole_now(parameter, partial(_given, stored)), value):
                return stored
        raise CheckpointError(
            f"{parameter} is made of {len(names)} tensors such as {names[0]} and cannot be written as these",
            "change it where the model was made, with transformers, and save it there",
        )

    def parameters(self) -> dict[str, str]:
        """The parameters that the checkpoint holds as they are, by the names of their tensors."""
        return {stored: parameter for parameter, stored in self._alias.items()}

    # How they are found.

    def _single(self, part: Part) -> str | None:
        conversion = self._conversions.get(part.parameter)
        return None if conversion is None else conversion.stacked(part)

    def _whole(self, parameter: str, read: Read) -> torch.Tensor:
        """A parameter of which several parts are read one after another; those of one module are kept meanwhile."""
        module = parameter.rpartition(".")[0]
        if any(kept.rpartition(".")[0] != module for kept in self._made):
            self.forget()
        if parameter not in self._made:
            whole, wanted = self._whole_now(parameter, read), tuple(self._shapes[parameter].shape)
            if tuple(whole.shape) != wanted:
                raise CheckpointError(
                    f"tensor {self._sources_of_whole(parameter)[0]} and those beside it make {parameter} of shape "
                    f"{tuple(whole.shape)}, the model expects {wanted}",
                    "config.json and the weights are of different models, or tensors are missing",
                )
            self._made[parameter] = whole
        return self._made[parameter]

    def forget(self) -> None:
        """Let go of the parameters that were kept for their parts."""
        self._made = {}

    def _whole_now(self, parameter: str, read: Read) -> torch.Tensor:
        if parameter in self._alias:
            return read(self._alias[parameter])
        conversion = self._conversions.get(parameter)
        if conversion is None:
            raise CheckpointError(f"tensor {self.tensor(parameter)} is not in the checkpoint", DAMAGED)
        if len({len(names) for names in conversion.sources.values()}) > 1:
            counts = [f"{len(names)} like {names[0]}" for names in conversion.sources.values()]
            raise CheckpointError(f"tensors of {parameter} are missing: there are {' and '.join(counts)}", DAMAGED)
        try:
            return conversion.run(read, self._stand_in())[parameter]
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            names = conversion.names()
            raise CheckpointError(
                f"{parameter} cannot be made of {len(names)} tensors such as {names[0]}: {error}", DAMAGED
            ) from error

    def _stand_in(self) -> Any:
        """What converters ask of a model: its config, and the shapes of its parameters."""
        return SimpleNamespace(config=self._model.config, get_parameter=self._shapes.__getitem__)

    def _match(self) -> None:
        from transformers.core_model_loading import dot_natural_key

        by_pattern = {pattern: each for each in self._forward[1] for pattern in each.source_patterns}
        found: dict[str, dict[str, list[str]]] = {}
        for name in sorted(self._stored, key=dot_natural_key):
            key, pattern = self._renamed(name)
            if key not in self._shapes and name in self._shapes:
                key, pattern = name, None
            if key not in self._shapes:
                continue
            if pattern is None:
                self._alias.setdefault(key, name)
            else:
                found.setdefault(key, {}).setdefault(pattern, []).append(name)
        for key, sources in found.items():
            conversion = Conversion(key, by_pattern[next(iter(sources))], sources)
            for target in conversion.targets():
                if target in self._shapes:
                    self._conversions[target] = conversion
        self._match_the_last()
        self._match_shared()

    def _match_shared(self) -> None:
        """A weight that blocks of several depths share lies in the file once, under the name of one of them."""
        for names in shared_parameters(self._model):
            held = next((name for name in names if self._sources_of_whole(name)), None)
            for name in names:
                if held in self._alias:
                    self._alias[name] = self._alias[held]
                elif held in self._conversions:
                    self._conversions[name] = self._conversions[held]

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        """What transformers calls a tensor on load, and the pattern of the converter that takes it."""
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self._model, "base_model_prefix", "")
        found: tuple[str, str | None] = rename_source_key(stored, *self._forward, prefix, self._shapes)
        return found

    def _match_the_last(self) -> None:
        """One single tensor that no name fits is the one parameter that is missing, as GPT-NeoX's head may be."""
        used = {name for parameter in self._shapes for name in self.sources(parameter)}
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or ())
        rest = [name for name in self._stored if name not in used and name.endswith(".weight")]
        missing = [name for name in self._shapes if not self.has(name) and name not in tied]
        if len(rest) != 1 or len(missing) != 1 or not missing[0].endswith(".weight"):
            return
        wanted = tuple(self._shapes[missing[0]].shape)
        if self._stored_shapes.get(rest[0], wanted) == wanted:
            self._alias[missing[0]] = rest[0]

    def _as_saved(self) -> list[str]:
        from transformers.core_model_loading import revert_weight_conversion

        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        if not (self._backward[0] or self._backward[1]):
            return [name for name in self._shapes if name not in tied]
        kept = {name: self._shapes[name] for name in self._shapes if name not in tied}
        reverted: dict[str, Any] = revert_weight_conversion(self._model, kept)
        return list(reverted)

    def _backward_name(self, parameter: str) -> str:
        from transformers.core_model_loading import rename_source_key

        renamings, _ = self._backward
        name: str = rename_source_key(parameter, renamings, [], reverse=True)[0]
        return name


def _prefixes(name: str) -> list[str]:
    """What a name begins with, the shortest first; itself last."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that a model has in several places, other than those of its input embedding."""
    embedding: Any = getattr(text_part(model), "get_input_embeddings", lambda: None)()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is not getattr(embedding, "weight", None):
            groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _given(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """What is read under any name."""
    return tensor
