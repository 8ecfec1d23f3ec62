"""Each tensor of the merged model, from the base and the adapters, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_target_module_exists

from quantkit.errors import SourceError
from quantkit.merging.adapter import Adapter, Whole
from quantkit.merging.base import Base
from quantkit.merging.config import WITH_PEFT
from quantkit.merging.layers import LayerWeights, add_adapter, nf4_round_trip, replace_rows
from quantkit.merging.places import RIGHT_BASE, place, tower, without_wrappers
from quantkit.merging.stacked_tensors import StackedTensors


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that the merged checkpoint will hold.

    Attributes:
        name: in the checkpoint, as in the base's.
        parameter: in the model.
        dtype: that it is stored in.
        shape: of it.
    """

    name: str
    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MergedTensors:
    """The tensors of ``base`` with ``adapters`` merged in.

    Args:
        base: a float model.
        adapters: in the order in which they are added.
        dtype: of all float tensors; None keeps each tensor's own.
        nf4_dtype: merge into what NF4 leaves of the Linear layers, decoded in this dtype; None merges into the
            weights as they are.

    Attributes:
        base: as given.
        adapters: as given, by the names of the base.
        nf4_dtype: as given.
        tied: whether head and embedding share one weight after the merge.
        rows: rows of the embedding after the merge, where adapters give it others than the base has; else None.

    Raises:
        SourceError: an adapter does not fit the base, or adapters do not fit each other.
    """

    def __init__(
        self, base: Base, adapters: tuple[Adapter, ...], dtype: torch.dtype | None, nf4_dtype: torch.dtype | None
    ) -> None:
        self.base, self.nf4_dtype = base, nf4_dtype
        self.adapters = tuple(place(adapter, base) for adapter in adapters)
        self._dtype = dtype
        for adapter in self.adapters:
            self._check_places(adapter)
            self._check_complete(adapter)
        self._check_together()
        self._stacks = StackedTensors(base, self.adapters)
        self.rows = self._new_rows()
        self.tied = base.tied and self._stays_tied()

    def plan(self) -> Iterator[Planned]:
        """The tensors of the merged checkpoint, in the order in which they are best written."""
        base = self.base
        untied = [f"{base.head}.weight"] if base.tied and not self.tied else []
        for name in [*base.parameters(), *untied]:
            stored = base.stored(name) or name
            dtype, shape = base.reader.dtype(stored), base.reader.shape(stored)
            own = name if base.tied and base.twin(name) else stored
            if self.rows is not None and name.rpartition(".")[0] in (base.embedding, base.head):
                shape = (self.rows, *shape[1:])
            yield Planned(own, name, self._dtype if self._dtype and dtype.is_floating_point else dtype, shape)

    def read(self, planned: Planned) -> Iterator[torch.Tensor]:
        """A tensor of :meth:`plan`: whole, or a stack's experts one after another.

        Raises:
            SourceError: its values are too large for its dtype.
            CheckpointError: the base or an adapter holds a NaN or an infinity.
        """
        parts = self._stacks.read(planned.name) if planned.name in self._stacks else None
        for found in (self._merged(planned.parameter),) if parts is None else parts:
            stored = found.to(planned.dtype)
            if found.is_floating_point() and bool((stored.isinf() & found.isfinite()).any()):
                dtype = str(planned.dtype).removeprefix("torch.")
                raise SourceError(
                    f"merged tensor '{planned.name}' holds values too large for {dtype}", "set model.dtype: float32"
                )
            yield stored

    def _merged(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if not self._changes(module, leaf):
            return self._start(name)
        layer = LayerWeights(self._start(f"{module}.weight").float(), self._bias(module))
        for adapter in self.adapters:
            if module in adapter.contents.lora:
                layer = add_adapter(layer, adapter, module)
            tokens = self._token_module(adapter, module)
            if tokens is not None:
                layer = replace_rows(layer, adapter, tokens)
        return layer.weight if leaf == "weight" or layer.bias is None else layer.bias

    def _changes(self, module: str, leaf: str) -> bool:
        """Whether adapters change a weight or bias by other means than replacing it whole."""
        tuned = [adapter for adapter in self.adapters if module in adapter.contents.lora]
        if leaf == "bias":
            return any(adapter.config.lora.lora_bias for adapter in tuned)
        return leaf == "weight" and bool(tuned or any(self._token_module(a, module) for a in self.adapters))

    def _token_module(self, adapter: Adapter, module: str) -> str | None:
        """The embedding that the adapter trained rows of, for a module that shares its weight; None for others."""
        if module in adapter.contents.tokens:
            return module
        shared = self.base.embedding if self.base.tied and module == self.base.head else None
        return shared if shared in adapter.contents.tokens else None

    def _bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self._start(name).float() if self.base.stored(name) else None

    def _start(self, name: str) -> torch.Tensor:
        """A parameter before low-rank changes: an adapter's where it brings it whole, else the base's."""
        for adapter, whole in self._wholes(name):
            return adapter.read(whole.key)
        stored = self.base.stored(name)
        tensor = self.base.reader.read_finite(stored or name)
        if self.nf4_dtype is not None and name.removesuffix(".weight") in self.base.linears and tensor.ndim == 2:
            return nf4_round_trip(tensor, self.nf4_dtype)
        return tensor

    def _wholes(self, name: str) -> Iterator[tuple[Adapter, Whole]]:
        """Adapters that bring a parameter whole; what is not trained apart belongs to both of a tied pair."""
        twin = self.base.twin(name) if self.base.tied else None
        for adapter in self.adapters:
            if name in adapter.contents.whole:
                yield adapter, adapter.contents.whole[name]
            elif twin in adapter.contents.whole and not adapter.contents.whole[twin].trained:
                yield adapter, adapter.contents.whole[twin]

    def _check_places(self, adapter: Adapter) -> None:
        """Everything that the adapter holds has its place in the base."""
        contents, base = adapter.contents, self.base
        needed = {key: f"{module}.weight" for module, parts in contents.lora.items() for key in parts.values()}
        needed |= {key: f"{module}.weight" for module, key in contents.tokens.items()}
        needed |= {whole.key: name for name, whole in contents.whole.items()}
        for key, name in needed.items():
            if base.stored(name) is None and base.names.has(name):
                raise SourceError(
                    f"adapter {adapter.origin}: tensor '{key}' changes '{name}', which the base's file holds in "
                    f"'{base.names.sources(name)[0]}' in another form",
                    WITH_PEFT,
                )
            if base.stored(name) is None:
                raise SourceError(
                    f"adapter {adapter.origin}: tensor '{key}' fits no layer of the base, which has no '{name}'",
                    RIGHT_BASE,
                )
        self._check_shared(adapter)
        for name, whole in contents.whole.items():
            found, wanted = adapter.reader.shape(whole.key), base.reader.shape(base.stored(name) or name)
            if found != wanted and not (base.twin(name) and found[1:] == wanted[1:]):
                raise SourceError(
                    f"adapter {adapter.origin}: tensor '{whole.key}' has the shape {list(found)}, and the base's "
                    f"'{name}' {list(wanted)}",
                    RIGHT_BASE,
                )

    def _check_shared(self, adapter: Adapter) -> None:
        """No two layers that share a weight, other than a tied head and embedding, are changed each in its own way."""
        seen: dict[str | None, str] = {}
        for module in adapter.contents.lora:
            stored = self.base.stored(f"{module}.weight")
            other = seen.setdefault(stored, module)
            if other != module and self.base.twin(f"{module}.weight") != f"{other}.weight":
                raise SourceError(
                    f"adapter {adapter.origin} changes '{other}' and '{module}', which share a weight in the base, "
                    "each in its own way: no one weight can be both",
                    "serve the adapter beside its base",
                )

    def _check_complete(self, adapter: Adapter) -> None:
        """Every layer and parameter that the adapter's configuration targets has its tensors.

        A model that sees has several towers, and layers alike in each: those count in which the adapter holds some.
        """
        config, contents = adapter.config.lora, adapter.contents
        towers = {tower(module) for module in (*contents.lora, *(stack.module for stack in contents.stacks.values()))}
        targets = list(self.base.layers) if config.target_modules is not None and adapter.config.tells_layers else []
        missing = [
            module
            for module in targets
            if module not in contents.lora and bool(check_target_module_exists(config, module))
        ]
        missing += self._missing_parameters(adapter)
        self._check_saved(adapter)
        for name in missing:
            if tower(name) in towers or tower(name) == without_wrappers(name):
                raise SourceError(
                    f"adapter {adapter.origin} targets the layer '{name}' and holds no tensor for it",
                    f"the adapter is not whole, or the base is another model: save it again, or {RIGHT_BASE}",
                )

    def _check_saved(self, adapter: Adapter) -> None:
        """Every module that was trained whole has its tensors; of a tied pair one is enough."""
        whole = adapter.contents.whole
        for name in self.base.names.shapes():
            if adapter.config.saves(name.rpartition(".")[0]) and not {name, self.base.twin(name)} & whole.keys():
                wanted = ", ".join(adapter.config.lora.modules_to_save or ())
                raise SourceError(
                    f"adapter {adapter.origin}: its modules_to_save ({wanted}) were trained whole, and it holds no "
                    f"tensor for '{name}'",
                    "save it again with PEFT's save_pretrained; if that was not trained, take it out of "
                    "modules_to_save in adapter_config.json",
                )

    def _missing_parameters(self, adapter: Adapter) -> list[str]:
        """The parameters that the adapter's ``target_parameters`` mean and it holds nothing for.

        Raises:
            SourceError: the base has none of such names.
        """
        known, stacks = self.base.names.shapes(), adapter.contents.stacks
        held = {*stacks, *(f"{module}.weight" for module in adapter.contents.lora)}
        called = {f".{stack.module}.{name.rpartition('.')[2]}" for name, stack in stacks.items()}
        entries = list(adapter.config.lora.target_parameters or ())
        found, unknown = [], []
        for wanted in entries:
            meant = [name for name in known if f".{name}".endswith(f".{wanted}")]
            if not meant and not any(name.endswith(f".{wanted}") for name in called):
                unknown.append(wanted)
            found += [name for name in meant if name not in held]
        if entries and unknown == entries:  # PEFT itself names some that only similar models have
            raise SourceError(
                f"adapter {adapter.origin} adapts the parameter '{unknown[0]}', which the base does not have",
                RIGHT_BASE,
            )
        return found

    def _check_together(self) -> None:
        several = len(self.adapters) > 1
        brought: dict[str, str] = {}
        for adapter in self.adapters:
            if several and adapter.config.depends_on_base:
                raise SourceError(
                    f"adapter {adapter.origin} is a DoRA, or began in its base: it cannot be merged beside others",
                    "merge it alone first, then the others into the result",
                )
            for name in (*adapter.contents.whole, *adapter.contents.tokens):
                if name in brought:
                    raise SourceError(
                        f"adapters {brought[name]} and {adapter.origin} both replace '{name}'",
                        "merge one, then the other into the result",
                    )
                brought[name] = adapter.origin

    def _new_rows(self) -> int | None:
        """The rows of head and embedding where adapters give them others, which must be the same; else None."""
        base, rows = self.base, {}
        changed = False
        for module in (base.embedding, base.head):
            name = f"{module}.weight"
            stored = base.stored(name) if module else None
            if stored is not None:
                own = base.reader.shape(stored)[0]
                sizes = [adapter.reader.shape(whole.key)[0] for adapter, whole in self._wholes(name)]
                rows[name] = sizes[0] if sizes else own
                changed |= rows[name] != own
        if not changed:
            return None
        if len(set(rows.values())) > 1:
            (one, first), (other, second) = rows.items()
            raise SourceError(
                f"after the merge {one} would have {first} rows and {other} {second}",
                "the adapter was trained with a resized vocabulary and saved in part: "
                "save it again with save_embedding_layers=True",
            )
        return next(iter(rows.values()))

    def _stays_tied(self) -> bool:
        """Whether the adapters leave both of a tied pair with the same values."""
        embedding, head = f"{self.base.embedding}.weight", f"{self.base.head}.weight"
        touched = {name: self._is_touched(name) for name in (embedding, head)}
        if not any(touched.values()) or any(adapter.config.lora.ensure_weight_tying for adapter in self.adapters):
            return True
        if not all(touched.values()):
            return False
        return torch.equal(self._merged(embedding), self._merged(head))

    def _is_touched(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(module in adapter.contents.lora for adapter in self.adapters) or any(
            place.trained for _, place in self._wholes(name)
        )
