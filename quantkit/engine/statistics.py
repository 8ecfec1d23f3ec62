"""Statistics of a layer's inputs, gathered as the tokens pass; inputs that are not finite are told by their row."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.routing import now_given
from quantkit.engine.sensitivity import TokenWeights
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.system.host import decide, numbers
from quantkit.system.products import add_product_, bfloat16_products, multiplies_by_amx

CHUNK_TOKENS = 512
"""Tokens multiplied at a time on a CPU: what its caches hold."""
SAMPLED_EACH, SAMPLED = 64, 512
"""Tokens whose inputs are kept of a batch, and in all, where a sample is asked for."""
TILE = 256
"""Columns of a tile of the upper triangle on a CPU at most."""
WHOLE_COLUMNS = 768
"""Up to this many columns a CPU with AMX multiplies the whole matrix faster than the tiles of its upper triangle."""
GPU_TILE = 4096
"""Rows of the matrix that a GPU multiplies at a time."""
MIRRORED = 256
"""Rows and columns of a tile that is mirrored at a time."""


@dataclass(slots=True)
class Sums:
    """What one batch adds to the statistics of an input; attributes as of :class:`Gatherer`."""

    sums: dict[Statistic, torch.Tensor]
    weight: torch.Tensor | int
    squares: torch.Tensor | int
    tokens: int
    seen: int
    largest: torch.Tensor | None = None
    sample: torch.Tensor | None = None


class Gatherer:
    """Accumulates what the methods of a walk ask to know of one input.

    The sums of a batch are taken by themselves and then added, in the order of the batches. So it does not matter who
    takes them: one process for all batches, or several that each have some.

    Args:
        needs: the union of their statistics.
        name: of the layer that reads the input, for messages.
        token_weights: how much each token counts; None if all alike.

    Attributes:
        tokens: that reached the layer.
        seen: tokens in the statistics: an expert may be shown more than the router sends it.
        sums: of each statistic over them, weighed; of the Gram matrix the upper triangle.
        largest: the largest magnitudes, where these are asked for.
        sample: inputs of some tokens, where these are asked for.
        weight: of all of them together.
        squares: of their weights together.
    """

    def __init__(self, needs: Set[Statistic], name: str = "", token_weights: TokenWeights | None = None) -> None:
        self._needs = needs
        self._name = name
        self.token_weights = token_weights
        self.forget()

    def forget(self) -> None:
        """Let go of everything that was gathered, and begin anew."""
        self._check = FiniteCheck(self._name)
        self.sums: dict[Statistic, torch.Tensor] = {}
        self.largest: torch.Tensor | None = None
        self.sample: torch.Tensor | None = None
        self.weight: torch.Tensor | int = 0
        self.squares: torch.Tensor | int = 0
        self.tokens = self.seen = 0

    def add(self, inputs: torch.Tensor, batch: Batch) -> None:
        """Take in the inputs of one batch, ``[..., in_features]``; those of padding are left out."""
        given = now_given(batch.token_ids.numel())
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        flat, places = batch.tokens_of(flat, None if given is None else given.positions)
        weights = None if self.token_weights is None else self.token_weights.of(batch, flat, places)
        self.seen += flat.shape[0]
        self.tokens += flat.shape[0] if given is None or given.is_routed else 0
        self.weight = self.weight + (flat.shape[0] if weights is None else weights.sum())
        self.squares = self.squares + (flat.shape[0] if weights is None else weights.square().sum())
        self._check.add(flat, batch, places)
        if Statistic.GRAM in self._needs:
            add_gram(self._sum(Statistic.GRAM, flat, flat.shape[1]), flat, weights)
        if Statistic.ABS_MEAN in self._needs:
            self._sum(Statistic.ABS_MEAN, flat).add_(_weighed(flat.abs().float(), weights).sum(0))
        if Statistic.SQUARE_MEAN in self._needs:
            squares = flat.to(torch.float32, copy=True).square_()
            self._sum(Statistic.SQUARE_MEAN, flat).add_(_weighed(squares, weights).sum(0))
        if Statistic.ABS_MAX in self._needs and len(flat):
            self.largest = _larger(self.largest, flat.abs().amax(0).float())
        if Statistic.SAMPLE in self._needs and len(flat):
            self.sample = _longer(self.sample, flat[:: -(-len(flat) // SAMPLED_EACH)])

    def of_batch(self, inputs: torch.Tensor, batch: Batch) -> Sums:
        """What a batch would add, which is left to :meth:`absorb`.

        Raises:
            QuantizationError: see :meth:`check`.
        """
        alone = Gatherer(self._needs, self._name, self.token_weights)
        alone.add(inputs, batch)
        alone.check()
        kept = alone.largest, alone.sample
        return Sums(alone.sums, alone.weight, alone.squares, alone.tokens, alone.seen, *kept)

    def absorb(self, part: Sums) -> None:
        """Add what :meth:`of_batch` of this gatherer, or of one like it in another process, gave."""
        for statistic, total in part.sums.items():
            if statistic in self.sums:
                self.sums[statistic].add_(total)
            else:
                self.sums[statistic] = total
        self.weight, self.squares = self.weight + part.weight, self.squares + part.squares
        self.tokens, self.seen = self.tokens + part.tokens, self.seen + part.seen
        self.largest, self.sample = _larger(self.largest, part.largest), _longer(self.sample, part.sample)

    def check(self) -> None:
        """Refuse an input that is not finite.

        Raises:
            QuantizationError: names the layer and the calibration row.
        """
        self._check.result()

    def result(self) -> InputStatistics:
        """The statistics over all tokens, weighed; a layer that no token reached has none.

        Raises:
            QuantizationError: see :meth:`check`.
        """
        if self.seen == 0:
            return InputStatistics()
        self.check()
        evenness = self.evenness()
        return _finished(self.tokens, _means(self), self, self.tokens / self.seen, evenness)

    def evenness(self) -> float:
        """As how many even tokens those in the statistics are worth, by how many there are."""
        if self.token_weights is None or self.seen == 0:
            return 1.0
        total, squares = numbers(torch.stack([torch.as_tensor(self.weight), torch.as_tensor(self.squares)]))
        return total**2 / (squares * self.seen) if squares else 1.0

    def _sum(self, statistic: Statistic, like: torch.Tensor, *rows: int) -> torch.Tensor:
        if statistic not in self.sums:
            self.sums[statistic] = torch.zeros(*rows, like.shape[1], device=like.device)
        return self.sums[statistic]


def _means(sums: Gatherer | Pool) -> dict[Statistic, torch.Tensor]:
    """Sums, which are taken out, to means, in place."""
    weight, found = sums.weight, sums.sums
    sums.sums = {}
    divisor = weight if isinstance(weight, int) else weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return {statistic: total.div_(divisor) for statistic, total in found.items()}


def _larger(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The larger of the magnitudes of two sets of tokens, either of which may be empty."""
    if one is None or other is None:
        return other if one is None else one
    return torch.maximum(one, other)


def _longer(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The inputs of more tokens, float32; no more than :data:`SAMPLED`."""
    if other is None or (one is not None and len(one) >= SAMPLED):
        return one
    return torch.cat([*([] if one is None else [one]), other.float()])[:SAMPLED]


def _finished(
    tokens: int,
    means: Mapping[Statistic, torch.Tensor],
    kept: Gatherer | Pool,
    own: float,
    evenness: float = 1.0,
) -> InputStatistics:
    if Statistic.GRAM in means:
        mirror_(means[Statistic.GRAM])
    found: dict[str, Any] = {statistic.value: mean for statistic, mean in means.items()}
    return InputStatistics(tokens, **found, abs_max=kept.largest, sample=kept.sample, own=own, evenness=evenness)


@dataclass(slots=True)
class Pool:
    """The statistics of all experts of a layer together, each token counted as often as it is sent to one.

    Where every token goes to as many experts, those of what the experts have in common to read are those of all
    tokens.
    """

    sums: dict[Statistic, torch.Tensor] = field(default_factory=dict)
    largest: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    weight: torch.Tensor | int = 0
    tokens: int = 0
    _found: InputStatistics | None = None

    def add(self, part: Gatherer) -> None:
        """Count an expert's. Sums are taken in the order of these calls."""
        part.check()
        for statistic, total in part.sums.items():
            if statistic in self.sums:
                self.sums[statistic].add_(total)
            else:
                self.sums[statistic] = total.clone()
        self.largest = _larger(self.largest, part.largest)
        self.sample = _longer(self.sample, part.sample)
        self.weight = self.weight + part.weight
        self.tokens += part.seen

    def blended(self, part: Gatherer, prior: float) -> InputStatistics:
        """The statistics of an expert as if it had seen tokens like those of all experts beside its own.

        ``(n G + k P) / (n + k)``, where ``G`` are its own, of ``n`` tokens, ``P`` those of all, and ``k`` is ``prior``
        times the width of the input; the largest magnitudes and the sample are its own. One that saw none has those of
        all, and shares what is derived from them.

        Args:
            part: what was gathered of the expert; its sums are taken out.
            prior: 0 takes an expert's own alone.
        """
        if prior == 0 or self.tokens == 0:
            return part.result()
        if self._found is None:
            self._found = _finished(0, _means(self), self, 0.0)
        if part.seen == 0:
            return self._found
        part.check()
        evenness = part.evenness()
        means, share = _means(part), 1.0
        for statistic, own in means.items():
            known: torch.Tensor = getattr(self._found, statistic.value)
            share = part.seen / (part.seen + prior * own.shape[-1])
            own.mul_(share).add_(known, alpha=1 - share)
        return _finished(part.tokens, means, part, share * part.tokens / part.seen, evenness)


def add_gram(total: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Add ``XᵀX``, or with weights ``Xᵀ diag(w) X``, to the upper triangle of ``total``; below it nothing is defined.

    The sums are float32 whatever the inputs are. Those of the inputs are taken from zero, a tile of the matrix at a
    time, and then added. On CPU only the tiles of the upper triangle are multiplied,
    and inputs that are bfloat16 go through the processor's bfloat16 units without being rounded again; weighed ones,
    which bfloat16 could not hold, do not.

    Args:
        total: float32 ``[in_features, in_features]``.
        inputs: ``[tokens, in_features]``.
        weights: float32 ``[tokens]``, how much each token counts.
    """
    columns = inputs.shape[1]
    if inputs.device.type != "cpu":
        inputs = inputs.float()
        left = _weighed(inputs, weights)
        for start in range(0, columns, GPU_TILE):
            total[start : start + GPU_TILE].add_(left[:, start : start + GPU_TILE].T @ inputs)
        return
    rounds = inputs.dtype == torch.bfloat16 and weights is None
    tile = _tile(columns, wide=multiplies_by_amx() and rounds)
    with bfloat16_products(inputs) if rounds else nullcontext():
        for start in range(0, columns, tile):
            stop = min(start + tile, columns)
            found = torch.zeros(stop - start, columns - start)
            for first in range(0, len(inputs), CHUNK_TOKENS):
                part = inputs[first : first + CHUNK_TOKENS, start:].float()
                left = _weighed(part, None if weights is None else weights[first : first + CHUNK_TOKENS])
                if rounds:
                    found.addmm_(left[:, : stop - start].T, part)
                else:
                    add_product_(found, left[:, : stop - start].T, part)
            total[start:stop, start:].add_(found)


def _tile(columns: int, *, wide: bool) -> int:
    """Columns of a tile: even ones of :data:`TILE` at most, or wide ones, at most two, where products take no time."""
    parts = (1 if columns <= WHOLE_COLUMNS else 2) if wide else -(-columns // TILE)
    return -(-columns // parts)


def _weighed(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values if weights is None else values * weights.unsqueeze(1)


def mirror_(matrix: torch.Tensor) -> None:
    """Put the upper triangle of a square matrix below its diagonal too, without a second matrix."""
    for start in range(0, len(matrix), MIRRORED):
        stop = min(start + MIRRORED, len(matrix))
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


@dataclass(slots=True)
class FiniteCheck:
    """Looks at one input of a layer as the batches pass; the device is asked once, when all have.

    Args:
        name: of the layer that reads the input.
    """

    name: str
    _seen: list[tuple[torch.Tensor, Batch, torch.Tensor | None]] = field(default_factory=list)

    def add(self, flat: torch.Tensor, batch: Batch, places: torch.Tensor | None = None) -> None:
        """Look at the inputs of one batch, ``[tokens, in_features]`` without padding; see :meth:`Batch.tokens_of`."""
        finite = flat.abs().amax(1).isfinite()  # in a ninth of the time of asking each number
        self._seen.append((finite, batch, places))

    def result(self) -> None:
        """Refuse an input that was not finite.

        Raises:
            QuantizationError: names the layer and the row.
        """
        seen, self._seen = self._seen, []
        if not seen or decide(torch.stack([finite.all() for finite, *_ in seen]).all()):
            return
        finite, batch, places = next(each for each in seen if not decide(each[0].all()))
        raise QuantizationError(
            f"{self.name}: its input is NaN or infinite for {_row(finite, batch, places)}",
            "the activations of the model overflow: give a model in bfloat16 or float32, or leave out that record",
        )


def _row(finite: torch.Tensor, batch: Batch, places: torch.Tensor | None) -> str:
    """The calibration row of the first token that is not finite, counted from 0."""
    length = batch.token_ids.shape[1]
    positions = torch.arange(batch.token_ids.numel()) if batch.valid is None else batch.valid.cpu()
    positions = positions if places is None else positions[places.cpu()]
    if len(finite) != len(positions):  # a layer that is given some tokens only, and nobody tells which
        return f"one of the calibration rows {', '.join(map(str, sorted(batch.rows)))}"
    first = int(positions[int((~finite).nonzero()[0].item())])
    return f"token {first % length} of calibration row {batch.rows[first // length]}"
