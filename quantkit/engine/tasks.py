"""What a walk solves, one task a variant: what it is given, where its results go, and what an earlier walk left of it.

A segment that is remembered is not solved again. With quantized inputs what its transforms and its method made of it
then is put back, so that the passes see what they saw, bit by bit; with float inputs there is nothing to put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quantkit.methods.base import Method, Statistic, input_needs
from quantkit.methods.tuning import TuneOptions
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.rounding import CacheRounding, InputRounding
from quantkit.transforms.base import Change, Transform

MODEL = ""
"""In the place of a segment's prefix: the whole model."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A solved layer.

    Attributes:
        name: full name of the Linear or Embedding.
        weight: its codes, on the device of the walk.
        error: 0-d float32, the mean square of the output error relative to that of the output.
        error_before: the same before the method's refinement; equal to ``error`` if it has none.
        tokens: calibration tokens that reached the layer; 0 for a variant that needs none.
        notes: what the user should know.
        experts: of a layer of an expert what the names of it and its like begin with; else empty.
        correction: by how much the layer was corrected for what its input lost in the layers before it, from 0 to 1;
            None where that was not looked at. The errors are then those of the corrected weight.
        nats: by how much its error is predicted to raise the model's divergence, 0-d float32, in nats a token; None
            where that is not known.
        effective_tokens: as how many tokens that count alike those that reached it are worth; None where they do.
    """

    name: str
    weight: QuantizedWeight
    error: torch.Tensor
    error_before: torch.Tensor
    tokens: int
    notes: tuple[str, ...]
    experts: str = ""
    correction: float | None = None
    nats: torch.Tensor | None = None
    effective_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SavedChange:
    """What a transform did, as it is stored: see :meth:`quantkit.transforms.base.Transform.restore`."""

    tensors: Mapping[str, torch.Tensor]
    data: Mapping[str, Any]

    @classmethod
    def of(cls, change: Change | None) -> SavedChange | None:
        """What a change is stored as; None for none."""
        return None if change is None else cls(change.tensors(), change.to_json())


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning made of a segment.

    Attributes:
        before: the error of its outputs on the rows that are held out, relative to what it adds, as the method left it.
        after: the same as it is now; no more than ``before``.
        steps: that were taken.
        weights: the layers that changed, by their full names; none where tuning did not pay.
        floats: the float parameters that changed, by their names in the model, as the passes compute with them.
        note: what the user should know, such as why it ended early; may be empty.
    """

    before: float
    after: float
    steps: int
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    floats: Mapping[str, torch.Tensor] = field(default_factory=dict)
    note: str = ""

    @property
    def paid(self) -> bool:
        """Whether the segment is another than the method left."""
        return bool(self.weights or self.floats)


class Sink(Protocol):
    """Takes the layers of a task as they are solved."""

    def take(self, result: LayerResult) -> None:
        """One layer."""

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """A float tensor of the checkpoint that the variant changes, such as the weight of a norm."""

    def tuned(self, prefix: str, done: Tuned) -> None:
        """What tuning made of a segment all of whose layers were given; those that it changed are in their place."""

    def segment_done(self, prefix: str) -> None:
        """All layers of a segment have been given."""


class Memory(Protocol):
    """The finished segments of a task, by their prefixes; an input embedding counts as one."""

    def has(self, prefix: str) -> bool:
        """Whether a segment is finished."""

    def weight(self, layer: str) -> QuantizedWeight:
        """A layer of a finished segment as the method returned it, by its full name; on the CPU."""

    def changes(self, prefix: str) -> Sequence[SavedChange | None]:
        """What each transform of the task did to a finished segment, on the CPU."""

    def floats(self, prefix: str) -> Mapping[str, torch.Tensor]:
        """The float parameters that tuning changed in a finished segment, see :class:`Tuned`; on the CPU."""

    def remember_changes(self, prefix: str, changes: Sequence[SavedChange | None]) -> None:
        """Keep what each transform did to the segment at which the walk stands, or to the whole :data:`MODEL`."""

    def remember_seconds(self, own: float, shared: float) -> None:
        """Keep what the segment at which the walk stands took: the task's own work, and what all tasks share."""


@dataclass(frozen=True, slots=True)
class VariantTask:
    """One variant of a walk.

    Attributes:
        name: of the variant, for messages.
        method: chooses the codes.
        schemes: full name of each layer that is quantized, and its scheme.
        scale_dtype: dtype in which scales are stored.
        sink: takes the results.
        fused: full names of layers that runtimes load as one matrix, which are solved together.
        memory: what an earlier walk left of it, and where this one leaves its own; None for a task that forgets.
        transforms: change the weights before they are solved, in this order.
        tune: how each segment is tuned when its layers are solved; None leaves it as the method solved it.
        cache: how runtimes store keys and values, whose scales are calibrated; None for as usual.
        roundings: how runtimes round the inputs of layers, by their schemes; of those that are left out as these say.
    """

    name: str
    method: Method
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    sink: Sink
    fused: tuple[tuple[str, ...], ...] = ()
    memory: Memory | None = None
    transforms: tuple[Transform, ...] = ()
    tune: TuneOptions | None = None
    cache: CacheRounding | None = None
    roundings: Mapping[Scheme, InputRounding | None] = field(default_factory=dict)

    def rounding_of(self, layer: str) -> InputRounding | None:
        """How a layer's inputs are rounded, by its full name; None where they are left as they are."""
        scheme = self.schemes.get(layer)
        return None if scheme is None else self.roundings.get(scheme, scheme.input_rounding)

    @property
    def calibrated(self) -> bool:
        """Whether it asks for calibration tokens, for statistics, to tune with, or for scales of the KV cache."""
        return bool(self.needs) or self.tune is not None or self.cache is not None

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics of inputs that its method and its transforms ask for, and static scales of inputs."""
        own = self.method.needs.union(*(transform.needs for transform in self.transforms))
        return own | input_needs(self.schemes.values())

    @property
    def observes(self) -> bool:
        """Whether a transform is to see the statistics of a segment before the first layer of it is solved."""
        return any(transform.needs for transform in self.transforms)

    @property
    def mixing(self) -> tuple[Transform, ...]:
        """The transforms through which passes are to run whatever layers are calibrated on."""
        return tuple(transform for transform in self.transforms if transform.mixes)

    @property
    def learns(self) -> bool:
        """Whether a transform learns from runs of each segment."""
        return any(transform.learns for transform in self.transforms)

    @property
    def smooths(self) -> bool:
        """Whether a transform asks where inputs can be scaled."""
        return any(transform.smooths for transform in self.transforms)

    def lacks(self, prefix: str, layers: Sequence[str]) -> bool:
        """Whether it quantizes some of these layers of a segment, and the segment is still to be solved."""
        wanted = any(layer in self.schemes for layer in layers)
        return wanted and (self.memory is None or not self.memory.has(prefix))
