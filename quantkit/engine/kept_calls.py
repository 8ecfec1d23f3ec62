"""Calls of segments that are kept, so that each can be run again for gradients when the model has run forward.

A segment runs without a graph, on copies, so that its code may write into what it is given. What lies between segments
runs with a graph, in which each segment is a boundary that holds no activation: its outputs are ports, at which
gradients arrive, and its inputs are slots, which know where they came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from quantkit.engine.batches import Batch
from quantkit.engine.passes import CPU, AtEnd, AtHead, AtSegment, Pass
from quantkit.errors import OutputError, QuantizationError
from quantkit.system.os_errors import translated_os_errors

LEFT_ALONE = "see that nothing else takes files from there, or name another folder as max_memory.disk"
Fetch = Callable[[], torch.Tensor]
Keep = Callable[[torch.Tensor], Fetch]
"""Keeps a tensor until it is fetched, once."""


# Where what segments are given is kept


def on_device(tensor: torch.Tensor) -> Fetch:
    """Keep a tensor as it is."""
    kept, version = tensor.detach(), tensor._version

    def fetch() -> torch.Tensor:
        if kept._version != version:
            raise QuantizationError(
                "the model's code writes into what it gave a block, so that the block cannot be run again on it",
                "keep the inputs of blocks on the CPU or on disk",
            )
        return kept

    return fetch


def on_cpu(tensor: torch.Tensor) -> Fetch:
    """Keep a copy of a tensor in the memory of the CPU."""
    device, kept = tensor.device, tensor.detach().to(CPU, copy=True)
    return lambda: kept.to(device)


@dataclass(slots=True)
class OnDisk:
    """Keeps tensors in files of a scratch folder, each gone when it was fetched.

    Args:
        folder: takes the files.
    """

    folder: Path
    _numbers: Iterator[int] = field(default_factory=count)

    def __call__(self, tensor: torch.Tensor) -> Fetch:
        """Keep a tensor.

        Raises:
            OutputError: the disk is full, or, when it is fetched, the file is gone or cut off.
        """
        file, device, shape, dtype = self.folder / str(next(self._numbers)), tensor.device, tensor.shape, tensor.dtype
        with translated_os_errors(file), file.open("wb") as written:
            written.write(tensor.detach().to(CPU).contiguous().view(-1).view(torch.uint8).numpy().data)

        def fetch() -> torch.Tensor:
            found = torch.empty(shape, dtype=dtype)
            values = found.view(-1).view(torch.uint8).numpy().data
            try:
                with file.open("rb") as stored:
                    is_whole = stored.readinto(values) == values.nbytes
                file.unlink()
            except OSError as error:
                raise OutputError(f"what waited in {file} cannot be read: {error.strerror}", LEFT_ALONE) from error
            if not is_whole:
                raise OutputError(f"{file} is shorter than what waited in it", LEFT_ALONE)
            return found.to(device)

        return fetch


# A call of a segment, kept


@dataclass(slots=True)
class _Port:
    """An output of a segment, and the gradient that has come back to it."""

    gradient: torch.Tensor | None = None


class _Boundary(torch.autograd.Function):
    """A segment's output in the model's graph: the graph ends here, and the gradient is left at the port."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, value: torch.Tensor, port: _Port) -> torch.Tensor:
        ctx.port = port
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        (gradient,), port = gradients, ctx.port
        port.gradient = gradient if port.gradient is None else port.gradient + gradient
        return None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Stands for a tensor with a gradient that a segment was given."""

    fetch: Fetch
    edge: GradientEdge


@dataclass(slots=True)
class _Call:
    """A call of a segment, kept.

    Attributes:
        arguments: ``(args, kwargs)``, with a slot in the place of each tensor with a gradient.
        outputs: of the tensors that it made, in their order.
        held: what stood in the slots and what was made of it, with the graph between them; None where the segment is
            run again.
    """

    arguments: Any
    outputs: list[_Port] = field(default_factory=list)
    held: tuple[dict[_Slot, torch.Tensor], list[torch.Tensor]] | None = None

    @classmethod
    def of(cls, arguments: Any, keep: Keep) -> tuple[_Call, dict[_Slot, torch.Tensor]]:
        """A call with these arguments, and what stands in its slots."""
        slots: dict[int, _Slot] = {}
        values: dict[_Slot, torch.Tensor] = {}

        def kept(tensor: torch.Tensor) -> torch.Tensor | _Slot:
            if not tensor.requires_grad:
                return tensor
            if id(tensor) not in slots:
                slot = slots[id(tensor)] = _Slot(keep(tensor), get_gradient_edge(tensor))
                values[slot] = tensor
            return slots[id(tensor)]

        return cls(_mapped(arguments, kept)), values

    def run(self, module: Callable[..., Any], values: Mapping[_Slot, torch.Tensor]) -> tuple[Any, list[dict[Any, Any]]]:
        """What a segment returns, and what it writes into each mapping that it was given.

        Args:
            module: the segment; it may write into its arguments.
            values: of the slots.
        """
        copies = {slot: value.clone() for slot, value in values.items()}
        args, kwargs = _mapped(self.arguments, lambda each: copies[each] if isinstance(each, _Slot) else each)
        known = {id(each) for each in _leaves((args, kwargs))}
        returned = module(*args, **kwargs)
        return returned, [_written(each, known) for each in _mappings((args, kwargs))]

    def hold(
        self, module: Callable[..., Any], values: Mapping[_Slot, torch.Tensor]
    ) -> tuple[Any, list[dict[Any, Any]]]:
        """What :meth:`run` gives, with a graph that is held until :meth:`backward`."""
        inputs = {slot: value.detach().requires_grad_() for slot, value in values.items()}
        with torch.enable_grad():
            found = self.run(module, inputs)
        self.held = inputs, self._made(found)
        return found

    def _made(self, found: tuple[Any, list[dict[Any, Any]]]) -> list[torch.Tensor]:
        return [each for each in _leaves(found) if self.crosses(each)]

    def crosses(self, made: torch.Tensor) -> bool:
        """Whether a tensor that the segment made can have a gradient; a mask that it passes on cannot."""
        return made.is_floating_point() and all(made is not each for each in _leaves(self.arguments))

    def backward(self, module: nn.Module) -> None:
        """Run the gradients that came to the outputs back to what made the arguments; the segment is run again first.

        Where its graph is held it is not.
        """
        inputs, made = self.held or self._again(module)
        self.held = None
        pairs = [
            (each, port.gradient)
            for each, port in zip(made, self.outputs, strict=True)
            if port.gradient is not None and each.requires_grad
        ]
        if pairs:
            torch.autograd.backward([each for each, _ in pairs], [gradient for _, gradient in pairs])
        _back({slot.edge: each.grad for slot, each in inputs.items() if each.grad is not None})

    def _again(self, module: nn.Module) -> tuple[dict[_Slot, torch.Tensor], list[torch.Tensor]]:
        slots = dict.fromkeys(each for each in _leaves(self.arguments) if isinstance(each, _Slot))
        inputs = {slot: slot.fetch().requires_grad_() for slot in slots}
        with torch.enable_grad():
            return inputs, self._made(self.run(module, inputs))


def _back(gradients: Mapping[GradientEdge, torch.Tensor]) -> None:
    """Run gradients back through what lies between segments; it stays, as segments may share it."""
    if gradients:
        torch.autograd.backward(list(gradients), list(gradients.values()), retain_graph=True)


def _mappings(arguments: Any) -> list[MutableMapping[Any, Any]]:
    args, kwargs = arguments
    return [each for each in [*args, *kwargs.values()] if isinstance(each, MutableMapping)]


def _written(mapping: Mapping[Any, Any], known: set[int]) -> dict[Any, Any]:
    """The entries of a mapping with tensors that are not known by their identities."""
    return {key: value for key, value in mapping.items() if any(id(each) not in known for each in _leaves(value))}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and mappings with another value for each tensor and slot; containers are new ones."""
    if isinstance(value, torch.Tensor | _Slot):
        return change(value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, each in value.items():
            changed[key] = _mapped(each, change)
        return changed
    if isinstance(value, list | tuple):
        inner = [_mapped(each, change) for each in value]
        return inner if isinstance(value, list) else type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


def _leaves(value: Any) -> list[Any]:
    """All tensors and slots in nested tuples, lists and mappings."""
    found: list[Any] = []

    def note(each: Any) -> Any:
        found.append(each)
        return each

    _mapped(value, note)
    return found


# Passes


class KeepingPass(Pass):
    """A batch's forward that keeps its calls of segments.

    Attributes:
        calls: in their order.
        holds: the segment before which it stands keeps its graph, and is not run again.
        hidden: what the head is given, ``[rows, length, width]``.
        edge: where that comes from; None without a graph.
        proves: it runs through the head, which is loaded for it, to the model's own ``logits``.
        logits: of one that does, ``[rows, length, vocabulary]``.
    """

    def __init__(self, model: nn.Module, batch: Batch, keep: Keep | None) -> None:
        super().__init__(model, batch)
        self.calls: list[_Call] = []
        self.holds = False
        self.hidden = torch.empty(0)
        self.edge: GradientEdge | None = None
        self.proves = False
        self.logits = torch.empty(0)
        self._keep = keep
        self._anchor = torch.empty(0, requires_grad=True)
        self._waiting: list[tuple[torch.Tensor, Fetch]] = []

    def through(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand before a segment until it is loaded, and go through it."""
        self.parent.switch(AtSegment(index, args, kwargs))
        if self._keep is None:
            return forward(*args, **kwargs)
        call, values = _Call.of((args, kwargs), on_device if self.holds else self._keep)
        with torch.no_grad():
            found = (call.hold if self.holds else call.run)(forward, values)

        def bounded(made: torch.Tensor) -> torch.Tensor:
            if not call.crosses(made):
                return made
            call.outputs.append(_Port())
            cross: Any = _Boundary.apply  # torch gives it no types
            own = made.detach().clone() if self.holds else made  # what comes next may write into it
            crossed: torch.Tensor = cross(self._anchor, own, call.outputs[-1])
            return crossed

        returned, written = _mapped(found, bounded)
        for mapping, entries in zip(_mappings((args, kwargs)), written, strict=True):
            mapping.update(entries)
        self.calls.append(call)
        return returned

    def run(self) -> AtEnd:
        """The body of the coroutine: the model's forward, without a cache."""
        self.logits = self._model(input_ids=self.batch.token_ids, use_cache=False, **self.batch.inputs).logits
        return AtEnd()

    def ends(self, hidden: torch.Tensor) -> None:
        """Stand before the head, and go no further but to prove."""
        self.edge = get_gradient_edge(hidden) if hidden.requires_grad else None
        self.hidden = hidden.detach()
        self.parent.switch(AtHead() if self.proves else AtEnd())

    def park(self, keep: Keep, shared: Collection[int]) -> None:
        """Have what is as long as the batch wait elsewhere until :meth:`fetch`, without a graph.

        Args:
            keep: where.
            shared: by their identities the tensors that belong to the model.
        """
        place = self.place
        held = _leaves((place.args, place.kwargs)) if isinstance(place, AtSegment) else [self.hidden]
        for tensor in {id(each): each for each in held if id(each) not in shared}.values():
            if tensor.is_floating_point() and tensor.ndim == 3 and tensor.shape[:2] == self.batch.token_ids.shape:
                self._waiting.append((tensor, keep(tensor)))
                tensor.data = tensor.data.new_empty(0)

    def fetch(self) -> None:
        """Have it back."""
        for tensor, fetch in self._waiting:
            tensor.data = fetch()
        self._waiting = []

    def read(self) -> torch.Tensor:
        """What the head is given of each token, ``[tokens, width]``, padding left out.

        Raises:
            QuantizationError: these are not the tokens of the batch.
        """
        if self.hidden.shape[:-1] != self.batch.token_ids.shape:
            raise QuantizationError(
                f"{type(self._model).__name__} gives its head {list(self.hidden.shape[:-1])} positions for "
                f"{list(self.batch.token_ids.shape)} tokens",
                "it cannot be run backward",
            )
        return self.batch.tokens_of(self.hidden.flatten(0, 1))[0]

    def back(self, gradient: torch.Tensor) -> None:
        """Run the gradient of what :meth:`read` gave back to the last segment."""
        whole = torch.zeros_like(self.hidden).flatten(0, 1)
        if self.batch.valid is None:
            whole = gradient
        else:
            whole[self.batch.valid] = gradient
        if self.edge is not None:
            _back({self.edge: whole.view_as(self.hidden)})
