"""What a transform is: it changes weights before they are solved, and says what that does to the inputs of layers.

A transform is asked twice: once for the whole model, of which only weights are known then, and once for each segment,
with the statistics of its inputs. What it answers is a change: it is applied to a weight whenever that is read, and to
the statistics of an input whenever they are of the model as it was. Any number of transforms come before a method; each
sees what those before it made of the model. Parameters are named as in the model. Importable without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from quantkit.methods.base import InputStatistics, Method, MethodOptions, Statistic
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch


class TransformOptions(MethodOptions):
    """A transform's own options: keys beside its name."""


class Change(ABC):
    """What a transform does to a model or to one segment of it."""

    @abstractmethod
    def touches(self) -> Iterable[str]:
        """Full names of the modules whose parameters it changes."""

    @abstractmethod
    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as it becomes; the tensor itself where it stays.

        Args:
            module: full name of its module.
            leaf: its name there, ``weight`` or ``bias``.
            parameter: float32, as it is without this change.
        """

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input as it becomes, from those of the input as it was; itself where it stays."""
        return found

    def mixes_outputs(self, module: str) -> bool:
        """Whether outputs of a layer are mixed, so that none is one of those before, times a number."""
        return False

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states between blocks, float32 ``[tokens, width]``, as they become; themselves where they stay."""
        return states

    def input_turn(self, module: str) -> int:
        """By Hadamard matrices of which size runtimes turn what a layer is given, piece by piece; 0 where they do not.

        The matrices are Sylvester's over the root of their size. What :meth:`apply` makes of the layer's weight is for
        inputs that were turned.
        """
        return 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors from which :meth:`Transform.restore` makes it again, by names of its own."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The rest that it is made of, and what the manifest says of it."""
        return {}


@dataclass(frozen=True, slots=True)
class Changes(Change):
    """Several changes one after another."""

    parts: tuple[Change, ...] = ()

    def touches(self) -> list[str]:
        """The modules that any of them touches, each once."""
        return list(dict.fromkeys(name for part in self.parts for name in part.touches()))

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as all of them make it."""
        for part in self.parts:
            parameter = part.apply(module, leaf, parameter)
        return parameter

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics as all of them make them."""
        for part in self.parts:
            found = part.statistics(layer, found)
        return found

    def mixes_outputs(self, module: str) -> bool:
        """Whether one of them does."""
        return any(part.mixes_outputs(module) for part in self.parts)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states as all of them make them."""
        for part in self.parts:
            states = part.hidden(states)
        return states

    def input_turn(self, module: str) -> int:
        """The size of the one that turns it; several do not."""
        return max((part.input_turn(module) for part in self.parts), default=0)


@dataclass(frozen=True, slots=True)
class SmoothingPlace:
    """An input whose channels can be scaled without changing the model.

    Attributes:
        balance_layers: the linear layers that read it; each column is multiplied by its channel's factor.
        smooth_layer: the module that makes it; each output channel is divided.
        offset: added to the smooth layer's weight before it is applied, as some norms add 1.
        channels: int64 ``[in_features]``, the smooth layer's channel of each input channel where several share one
            (as the heads of grouped-query attention do), or None where they are the same.
        width: the smooth layer's channels, where they are fewer.
    """

    balance_layers: tuple[str, ...]
    smooth_layer: str
    offset: float = 0.0
    channels: torch.Tensor | None = None
    width: int = 0

    def inside(self, prefix: str) -> SmoothingPlace:
        """The same with full names, from names relative to a segment."""
        layers = tuple(f"{prefix}.{layer}" for layer in self.balance_layers)
        return replace(self, balance_layers=layers, smooth_layer=f"{prefix}.{self.smooth_layer}")

    def of_smooth_layer(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors per input channel as factors per output channel of the smooth layer; those that share are equal."""
        if self.channels is None:
            return factors
        found = factors.new_ones(self.width)
        return found.index_copy_(0, self.channels.to(factors.device), factors)


@dataclass(frozen=True, slots=True)
class StreamNorm:
    """A norm that reads the residual stream.

    Attributes:
        name: of the module.
        readers: what reads its output: linear layers and routers.
        offset: added to its weight before that is applied, as some norms add 1.
        takes_mean: it takes the mean over the channels away, as LayerNorm does.
    """

    name: str
    readers: tuple[str, ...]
    offset: float = 0.0
    takes_mean: bool = False


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """What reads and writes the stream of hidden states that goes through all blocks; full names.

    Attributes:
        width: its channels.
        tables: embeddings, whose rows are written to it before the first block.
        writers: linear layers whose outputs are added to it.
        norms: that read it, the last one before the head among them.
        readers: linear layers that read it as it is.
    """

    width: int
    tables: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[StreamNorm, ...]
    readers: tuple[str, ...] = ()

    @property
    def takes_mean(self) -> bool:
        """Whether some norm takes the mean over the channels away."""
        return any(norm.takes_mean for norm in self.norms)


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """A layer of values whose heads pass through attention unmixed to the layer that reads them; full names.

    Attributes:
        values: each head of its output is ``size`` channels.
        reader: its input is such heads, each of one of these, in the same order of channels.
        size: channels of a head.
    """

    values: str
    reader: str
    size: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What a trial run shows of how a model is put together.

    Attributes:
        stream: its residual stream; None where that cannot be turned.
        why: the reason for that, which names the module.
        heads: of values, in every block that has some.
    """

    stream: ResidualStream | None
    why: str = ""
    heads: tuple[ValueHeads, ...] = ()


class ModelView(Protocol):
    """The whole model before the first segment is read."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by its full name; both of a tied head and embedding."""

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter in float32, as the transforms before left it."""

    def structure(self) -> Structure:
        """What reads and writes the residual stream, and where heads of values are; found by a run of a few tokens."""


class BlockRuns(Protocol):
    """Runs of a block on calibration batches with other parameters, compared with what it gives as it is."""

    def divided(self, share: float) -> tuple[list[int], list[int]]:
        """The places of batches of which a share is held out, at least one, and of those to learn from."""

    def error(self, place: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean square of what the output of a batch is off by, 0-d, with a graph back to the parameters.

        Args:
            place: of the batch.
            parameters: that are others, by their full names.
        """


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment whose inputs are known and of which nothing is solved.

    Attributes:
        prefix: its full name.
        places: where inputs can be scaled; full names. Empty for a transform that does not smooth.
        schemes: of the layers that the variant quantizes, by their full names.
        scale_dtype: dtype in which scales are stored.
        parameter: a parameter by its full name in float32, as the transforms before left it.
        statistics: of the input of each layer, as the transforms before left it; what the transform needs of them.
        method: what will choose the codes, to be asked what it would lose: :meth:`Method.trial_errors`.
        heads: of values in it; empty for a transform that does not learn.
        runs: of it, for a transform that learns; None where no batch comes to it.
        leaves: the names of the parameters of a module, such as ``weight``, by its full name.
    """

    prefix: str
    places: Sequence[SmoothingPlace]
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    parameter: Callable[[str], torch.Tensor]
    statistics: Mapping[str, InputStatistics]
    method: Method
    heads: Sequence[ValueHeads] = ()
    runs: BlockRuns | None = None
    leaves: Callable[[str], Sequence[str]] = lambda _: ("weight",)

    def floats(self, module: str) -> dict[str, torch.Tensor]:
        """The parameters of a module, by their names in it; see :attr:`parameter`."""
        return {leaf: self.parameter(f"{module}.{leaf}") for leaf in self.leaves(module)}


class Transform(ABC):
    """Changes the weights of a variant before they are solved.

    A subclass is one file: it sets the class attributes and writes :meth:`of_model` or :meth:`of_segment`, and
    :meth:`restore` with the latter.

    Attributes:
        name: what recipes call it.
        summary: one line for ``quantkit methods``.
        source: the paper that it follows.
        Options: its own options.
        mixes: it mixes channels, so that statistics of the float model do not tell those of what it makes: passes run
            through that, whatever layers are calibrated on.
        learns: it asks for runs of each block, by which it learns; its batches are as small as those of tuning.
        needs: the statistics of inputs that it asks for; without any, :meth:`of_segment` is not asked.
        smooths: whether it asks where inputs can be scaled, which is then looked for.
        online: runtimes must turn what some layers are given, see :meth:`Change.input_turn`; formats say which do.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[TransformOptions]] = TransformOptions
    mixes: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    needs: frozenset[Statistic] = frozenset()
    smooths: ClassVar[bool] = False
    online: ClassVar[bool] = False

    def __init__(self, options: TransformOptions) -> None:
        self.options = options

    @property
    def parts_tied(self) -> bool:
        """Whether it may change a head and an embedding that share a weight each in its way, so that they are two.

        What is not told here is found out when the file is written, and not counted in estimates.
        """
        return False

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse a scheme before which this transform cannot stand.

        Raises:
            SchemeError: it cannot.
        """

    def of_model(self, model: ModelView) -> Change | None:
        """What it does to the whole model; None for nothing.

        A walk that goes on where another was cut short asks again, so the answer must follow from weights and options.
        """
        return None

    def of_segment(self, segment: SegmentView) -> Change | None:
        """What it does to a segment besides, from the statistics of its inputs; None for nothing."""
        return None

    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Change:
        """A change of a segment from its :meth:`Change.tensors` and its :meth:`Change.to_json`."""
        raise TypeError(f"transform {self.name} changes no segment")

    def turned(self, done: Mapping[str, Any] | None) -> Mapping[str, int]:
        """Layers, by their full names, whose inputs runtimes turn; see :meth:`Change.input_turn`.

        Args:
            done: the JSON of what it did to the whole model; None where it did nothing.
        """
        return {}

    def notes(self, done: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
        """What the user should know of what was done.

        Args:
            done: the JSON of the change of each segment that holds quantized layers; None where it made none.
        """
        return ()

    def model_notes(self, done: Mapping[str, Any] | None) -> tuple[str, ...]:
        """The same of what was done to the whole model, the JSON of that change; None where there was none."""
        return ()
