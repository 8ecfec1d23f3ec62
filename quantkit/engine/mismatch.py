"""What a layer's inputs lost in the layers before it, gathered as a batch passes it twice.

The float model's pass of a batch comes first and leaves what a group of layers was given; then the pass through the
quantized layers comes to the same group. A quarter of the tokens is held out, for :mod:`quantkit.numerics.mismatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.groups import PreHook
from quantkit.engine.passes import AtSegment
from quantkit.engine.routing import now_given
from quantkit.engine.sensitivity import TokenWeights
from quantkit.engine.statistics import CHUNK_TOKENS, FiniteCheck
from quantkit.numerics.mismatch import Mismatch
from quantkit.system.host import decide, numbers
from quantkit.system.products import add_product_, bfloat16_products

HELD_OUT = 4
"""One in as many calibration rows is held out."""
FEWEST_ROWS = 8
"""With fewer calibration rows the end of each is held out in the place of whole rows."""
MOST_HELD = 2048
"""Tokens that are held out at most, as their inputs are kept; of more an even selection, and the others count."""

FEWEST_HELD = 64
"""Tokens that are held out, and four times as many in all, without which an expert is left as it is."""


def most_held(columns: int) -> int:
    """Tokens that are held out of an expert at most, as their inputs are kept for each."""
    return max(FEWEST_HELD, columns // HELD_OUT)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which tokens are held out, by rows as far as there are enough: int64 places among the tokens of each batch."""

    places: Mapping[int, torch.Tensor]
    step: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> HeldOut:
        """Of the batches of a walk; it depends on the places of rows and their lengths alone."""
        rows = sum(len(batch.token_ids) for batch in batches)
        found = {id(batch): _held(batch, by_rows=rows >= FEWEST_ROWS) for batch in batches}
        step = max(1, -(-sum(map(len, found.values())) // MOST_HELD))
        return cls({key: places[::step] for key, places in found.items()}, step)

    def has(self, batch: Batch) -> bool:
        """Whether it is one of the batches."""
        return id(batch) in self.places

    def among(self, flat: torch.Tensor, batch: Batch, places: torch.Tensor | None = None) -> torch.Tensor:
        """The places that are held out of what a layer is given; the end of it where that is no batch's tokens.

        Args:
            flat: ``[tokens, features]``.
            batch: whose tokens they are.
            places: which of them, for an expert.
        """
        if places is not None:
            return torch.isin(places, self.places[id(batch)]).nonzero().squeeze(1)
        if len(flat) == batch.tokens:
            return self.places[id(batch)]
        return torch.arange(len(flat) - len(flat) // HELD_OUT, len(flat), self.step, device=flat.device)


def _held(batch: Batch, *, by_rows: bool) -> torch.Tensor:
    """The places of a batch's tokens that may be held out."""
    count, length = batch.token_ids.shape
    places: list[int] = []
    stop = 0
    for row, tokens in zip(batch.rows, batch.lengths or [length] * count, strict=True):
        stop += tokens
        if not by_rows:
            places += range(stop - tokens // HELD_OUT, stop)
        elif row % HELD_OUT == HELD_OUT - 1:
            places += range(stop - tokens, stop)
    return torch.tensor(places, dtype=torch.int64).to(batch.token_ids.device)


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where the residual stream is read to which a layer adds.

    Attributes:
        argument: of the segment that is the stream, by its place or its name; where ``module`` is None.
        module: a module inside it that is given the stream.
    """

    argument: int | str = 0
    module: nn.Module | None = None

    def read(self, place: AtSegment) -> torch.Tensor:
        """What a pass that stands before the segment would give it."""
        found = place.args[self.argument] if isinstance(self.argument, int) else place.kwargs[self.argument]
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"argument {self.argument} is no tensor")
        return found


@dataclass(slots=True)
class _Seen:
    """What the float pass of a batch left at a group, and the residual streams of both passes."""

    values: torch.Tensor | None = None
    stream: torch.Tensor | None = None
    versions: tuple[int, int] = (0, 0)
    stream_now: torch.Tensor | None = None

    def is_overwritten(self) -> bool:
        """Whether the model's code has since computed in place of what was kept."""
        kept = zip((self.values, self.stream), self.versions, strict=True)
        return any(each is not None and each._version != version for each, version in kept)


@dataclass(frozen=True, slots=True)
class Lost:
    """What one batch adds to what a group is to make up for.

    Attributes:
        tokens: that the group was given.
        weight: of all of them together.
        products: ``XᵀZ`` of those that are not held out; None where the two passes of the batch do not pair up.
        kept: inputs, what was lost, and how much each counts, of those that are held out.
    """

    tokens: int = 0
    weight: torch.Tensor | float = 0.0
    products: torch.Tensor | None = None
    kept: tuple[torch.Tensor, ...] = ()


@dataclass(slots=True)
class MismatchGatherer:
    """Sums what a group of layers is to make up for.

    Args:
        name: of the group, for messages.
        held: the tokens that are held out.
        layer: the only one of the group, with its float weight, where outputs are compared, as where these are fewer
            than inputs or go into the residual stream; None where inputs are.
        stream: where the stream is read that it adds to; None if it adds to none.
        is_expert: the group is an expert's, which is given the same tokens in both passes, and needs enough of them.
        token_weights: how much each token counts; None if all alike.
    """

    name: str
    held: HeldOut
    layer: nn.Linear | None = None
    stream: StreamPlace | None = None
    is_expert: bool = False
    token_weights: TokenWeights | None = None
    _tokens: int = 0
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _sum: torch.Tensor | None = None
    _weight: torch.Tensor | float = 0.0
    _kept: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    _check: FiniteCheck = field(init=False)
    _paired: bool = True

    def __post_init__(self) -> None:
        self._check = FiniteCheck(self.name)

    # The float pass

    def see(self, values: torch.Tensor, batch: Batch) -> None:
        """Keep what the float model gives the group at its first call, or what its layer makes of it."""
        seen = self._of(batch)
        if seen.values is None:
            seen.values = values
            seen.versions = values._version, seen.versions[1]

    def see_stream(self, stream: torch.Tensor, batch: Batch) -> None:
        """Keep the residual stream of the float model."""
        seen = self._of(batch)
        seen.stream = stream
        seen.versions = seen.versions[0], stream._version

    # The pass through quantized layers

    def now_stream(self, stream: torch.Tensor, batch: Batch) -> None:
        """Keep the residual stream until the group is reached."""
        self._of(batch).stream_now = stream

    def add(self, inputs: torch.Tensor, batch: Batch) -> None:
        """Take in the inputs ``[..., in_features]`` of a batch, if it has a float pass."""
        part = self._part(inputs, batch, self._check)
        if part is not None:
            self.absorb(part)

    def of_batch(self, inputs: torch.Tensor, batch: Batch) -> Lost | None:
        """What a batch would add, which is left to :meth:`absorb`; None for nothing.

        Raises:
            QuantizationError: something was not finite.
        """
        check = FiniteCheck(self.name)
        part = self._part(inputs, batch, check)
        check.result()
        return part

    def _part(self, inputs: torch.Tensor, batch: Batch, check: FiniteCheck) -> Lost | None:
        given = now_given(batch.token_ids.numel())
        if given is not None and not given.is_routed:
            return None
        seen = self._seen.pop(id(batch), None)
        if not self.held.has(batch) or not self._paired:
            return None
        pairs = seen is not None and (given is None or given.is_replayed)
        lost = self._lost(inputs.detach(), seen) if pairs and seen is not None else None
        if lost is None:
            return Lost()
        positions = None if given is None else given.positions
        flat, places = batch.tokens_of(inputs.detach().reshape(-1, inputs.shape[-1]), positions)
        lost, _ = batch.tokens_of(lost.reshape(-1, lost.shape[-1]), positions)
        check.add(lost, batch, places)
        held, weights = self.held.among(flat, batch, places), self._weights_of(batch, flat, places)
        counts = torch.ones(len(flat), device=flat.device) if weights is None else weights
        products = torch.zeros(flat.shape[1], lost.shape[1], device=flat.device)
        _add_products(products, flat, lost.index_fill(0, held, 0.0), weights)
        kept = (flat.index_select(0, held), lost.index_select(0, held), counts.index_select(0, held))
        return Lost(len(flat), counts.sum(), products, kept)

    def absorb(self, part: Lost) -> None:
        """Add what :meth:`of_batch` of this gatherer, or of one like it in another process, gave, batch by batch.

        Of an expert only some tokens are held out; those of a batch that are too many then count.
        """
        self._paired = self._paired and part.products is not None
        if part.products is None or not self._paired:
            return
        kept, room = part.kept, len(part.kept[0])
        if self.is_expert:
            room = min(room, max(0, most_held(kept[0].shape[1]) - sum(len(each[0]) for each in self._kept)))
        if room < len(kept[0]):
            flat, lost, counts = (each[room:] for each in kept)
            _add_products(part.products, flat, lost, None if self.token_weights is None else counts)
        self._tokens += part.tokens
        self._kept.append(tuple(each[:room] for each in kept))
        self._weight = self._weight + part.weight
        self._sum = part.products if self._sum is None else self._sum.add_(part.products)

    def result(self) -> Mismatch | None:
        """What was summed; None where passes could not be paired or all that there is was held out.

        Raises:
            QuantizationError: something was not finite.
        """
        total, kept, self._sum, self._kept = self._sum, self._kept, None, []
        if total is None or not self._paired:
            return None
        self._check.result()
        inputs, targets, weights = (torch.cat(each) for each in zip(*kept, strict=True))
        if self.is_expert and (len(inputs) < FEWEST_HELD or self._tokens < inputs.shape[1]):
            return None
        held, whole = numbers(torch.stack([weights.sum(), torch.as_tensor(self._weight, device=weights.device)]))
        if not held < whole:
            return None
        parts = 1 if self.stream is None else 2
        return Mismatch(total.div_(whole - held), inputs, targets, weights, held / whole, self.layer is not None, parts)

    def size(self, rows: int, columns: int) -> int:
        """How many an expert has summed and kept, of layers with as many rows together.

        Args:
            rows: of its layers.
            columns: width of their input.
        """
        return lost_numbers(columns, columns if self.layer is None else rows, most_held(columns))

    def _weights_of(self, batch: Batch, flat: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor | None:
        return None if self.token_weights is None else self.token_weights.of(batch, flat, places)

    def _of(self, batch: Batch) -> _Seen:
        return self._seen.setdefault(id(batch), _Seen())

    def _lost(self, inputs: torch.Tensor, seen: _Seen) -> torch.Tensor | None:
        """What was lost of a batch, ``[..., k]``, that of the stream last; None where the two passes do not pair up."""
        values = seen.values
        if values is None or values.shape[:-1] != inputs.shape[:-1] or seen.is_overwritten():
            return None
        if self.layer is None:
            return values - inputs
        lost = values - nn.functional.linear(inputs, self.layer.weight, self.layer.bias)
        if self.stream is None:
            return lost
        if seen.stream is None or seen.stream_now is None or seen.stream.shape != seen.stream_now.shape:
            return None
        return torch.cat([lost, seen.stream - seen.stream_now], -1)


def lost_numbers(columns: int, width: int, held: int) -> int:
    """How many numbers there are of what an input lost: sums ``[columns, width]``, and the tokens that are held out."""
    return columns * width + held * (columns + width)


def stream_hooks(
    gatherers: Iterable[MismatchGatherer | None], take: Callable[[MismatchGatherer, torch.Tensor], None]
) -> list[tuple[nn.Module, PreHook]]:
    """Hooks by which gatherers take the residual stream where modules inside the segment are given it."""

    def hook(_: nn.Module, args: tuple[Any, ...], gatherer: MismatchGatherer) -> None:
        take(gatherer, args[0])

    return [
        (each.stream.module, partial(hook, gatherer=each))
        for each in gatherers
        if each is not None and each.stream is not None and each.stream.module is not None
    ]


def take_streams(
    gatherers: Iterable[MismatchGatherer | None],
    place: AtSegment,
    take: Callable[[MismatchGatherer, torch.Tensor], None],
) -> None:
    """Let gatherers take the residual stream where it is what the segment is given."""
    for each in gatherers:
        if each is not None and each.stream is not None and each.stream.module is None:
            take(each, each.stream.read(place))


def _add_products(
    total: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None
) -> None:
    """Add ``XᵀZ``, with weights ``Xᵀ diag(w) Z``, in float32 as :func:`quantkit.engine.statistics.add_gram` does."""
    chunk = CHUNK_TOKENS if total.device.type == "cpu" else max(1, len(inputs))
    for start in range(0, len(inputs), chunk):
        left, right = inputs[start : start + chunk].float(), values[start : start + chunk].float()
        if weights is None and inputs.dtype == torch.bfloat16:
            with bfloat16_products(inputs):
                total.addmm_(left.T, right)
        else:
            left = left if weights is None else left * weights[start : start + chunk, None]
            add_product_(total, left.T, right)


# Which layers add to the residual stream


def stream_places(segment: nn.Module, layers: Sequence[nn.Linear], place: AtSegment) -> dict[nn.Linear, StreamPlace]:
    """The layers of a segment whose output is added to the residual stream as it is, and where that is read before.

    Found by one run of the segment: ``q + output == p`` for what two places of it hold, element by element. Points that
    count are what the segment is given, what modules inside it are, and what it returns.

    Args:
        segment: loaded.
        layers: that are asked for.
        place: what the segment is given.
    """
    points: list[tuple[StreamPlace | None, torch.Tensor]] = []
    outputs: dict[nn.Linear, tuple[int, torch.Tensor]] = {}
    known: set[int] = set()

    def note(where: StreamPlace | None, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in known:
            known.add(id(value))
            points.append((where, value.clone()))
            kept.append(value)

    kept: list[torch.Tensor] = []  # a tensor that is let go could give its identity to another
    given: list[tuple[int | str, Any]] = [*enumerate(place.args), *place.kwargs.items()]
    for key, value in given:
        note(StreamPlace(key), value)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            note(StreamPlace(module=module), args[0])

    def after(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear) and module not in outputs:
            outputs[module] = len(points), output.clone()

    asked = set(layers)
    inside = [each for each in segment.modules() if each is not segment and each not in asked]
    hooks = [each.register_forward_pre_hook(before) for each in inside if not isinstance(each, nn.Linear)]
    hooks += [each.register_forward_hook(after) for each in layers]
    try:
        returned = segment(*place.args, **place.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    note(None, returned[0] if isinstance(returned, tuple | list) else returned)
    found: dict[nn.Linear, StreamPlace] = {}
    for layer, (first, output) in outputs.items():
        start = next((where for where, q in points[:first] if where and _adds_up(q, output, points[first:])), None)
        if start is not None:
            found[layer] = start
    return found


def _adds_up(
    before: torch.Tensor, output: torch.Tensor, after: Sequence[tuple[StreamPlace | None, torch.Tensor]]
) -> bool:
    if before.shape != output.shape:
        return False
    total = before + output
    return any(point.shape == total.shape and decide((total == point).all()) for _, point in after)
