"""How AffineQuant learns: gradients through a block whose weights are rounded, and judges on batches held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from quantkit.methods.base import InputStatistics, Method
from quantkit.schemes import Scheme
from quantkit.transforms.affine_change import Affine
from quantkit.transforms.awq import AwqFactorsOptions
from quantkit.transforms.base import BlockRuns, SegmentView, SmoothingPlace, ValueHeads
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch

HELD_OUT = 0.125
TRIALS = 4
"""How often the held-out batches judge in all steps."""
DOMINATED = 0.9
"""What the other elements of a row may come to in all, of its diagonal."""
BETAS, WARM_UP = (0.9, 0.95), 5
SHARED = (0.3, 1.2)
"""What shares of the range of a group lie between."""


class AffineOptions(AwqFactorsOptions):
    """Options of learned affine transforms, beside those of AWQ's factors, from which they start.

    Attributes:
        steps: of the optimizer for a block; each takes a batch.
        learning_rate: of the logarithms of factors, and of the other elements relative to the diagonal.
        stability: by how much the other elements count, as the paper calls it.
        matrices: learn full matrices for heads of values; without, diagonals alone.
    """

    steps: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.005
    stability: Annotated[float, Field(gt=0, le=1)] = 1.0
    matrices: bool = True


class Learning:
    """What is learned of a block.

    Args:
        options: of the transform.
        segment: the block.
        runs: of it.
        places: inputs that a quantized layer reads.
        start: AWQ's factors.
    """

    def __init__(
        self,
        options: AffineOptions,
        segment: SegmentView,
        runs: BlockRuns,
        places: Sequence[SmoothingPlace],
        start: ChannelScales,
    ) -> None:
        self._options, self._segment, self._runs, self._start = options, segment, runs, start
        heads = {each.values: each for each in segment.heads} if options.matrices else {}
        self._heads = {place.smooth_layer: heads[place.smooth_layer] for place in places if _has(heads, place)}
        self._places = list(places)
        self._shares: dict[str, torch.Tensor] = {}
        self._logs = {place.smooth_layer: self._log(place).requires_grad_() for place in places}
        self._mixes = {name: self._mix(name, each).requires_grad_() for name, each in self._heads.items()}
        names = {module for place in places for module in (*place.balance_layers, place.smooth_layer)}
        names |= set(segment.schemes)
        self._parameters = {
            f"{name}.{leaf}": value for name in sorted(names) for leaf, value in segment.floats(name).items()
        }

    def _log(self, place: SmoothingPlace) -> torch.Tensor:
        """The logarithm of the factor of each channel of the smooth layer, float32."""
        import torch

        rows = self._start.rows.get(place.smooth_layer)
        width = place.width or len(self._segment.parameter(f"{place.smooth_layer}.weight"))
        device = self._segment.parameter(f"{place.smooth_layer}.weight").device
        return torch.zeros(width, device=device) if rows is None else -rows[0].log()

    def _mix(self, name: str, heads: ValueHeads) -> torch.Tensor:
        import torch

        count = len(self._logs[name]) // heads.size
        return torch.zeros(count, heads.size, heads.size, device=self._logs[name].device)

    def run(self) -> Affine:
        """Learn, and give the best that the held-out batches have seen, AWQ's factors among it."""
        import torch

        from quantkit.system.host import decide

        held, train = self._runs.divided(HELD_OUT)
        best = self._change(0.0)
        self._refresh(best)
        before = least = self._judged(held, best)
        leaves = [*self._logs.values(), *self._mixes.values()]
        adam, steps = torch.optim.Adam(leaves, betas=BETAS, eps=1e-12), self._options.steps
        trials = {-(-steps * number // TRIALS) for number in range(1, TRIALS + 1)}
        for step in range(1, steps + 1) if train and before > 0 else ():
            rate = min(1.0, step / WARM_UP) * (1 - (step - 1) / steps)
            adam.param_groups[0]["lr"] = rate * self._options.learning_rate
            loss = self._runs.error(train[(step - 1) % len(train)], self._rounded(self._change(step / steps))) / before
            if not decide(loss.detach().isfinite()):
                break
            torch.autograd.backward(loss)
            adam.step()
            adam.zero_grad()
            self._dominate(step / steps)
            if step in trials:
                found = self._change(step / steps)
                self._refresh(found)
                error = self._judged(held, found)
                if error < least:
                    best, least = found, error
        return replace(best.detached(), told={"before": before, "after": least})

    def _change(self, share: float) -> Affine:
        """The transform as it is now, with the other elements let in as far from the diagonal as a share of all."""
        import torch

        change = Affine(ChannelScales(places=self._start.places))
        for place in self._places:
            factors = self._logs[place.smooth_layer].exp()
            if place.smooth_layer not in self._heads:
                read = factors if place.channels is None else factors[place.channels.to(factors.device)]
                change.scales.columns.update(dict.fromkeys(place.balance_layers, read))
                change.scales.rows[place.smooth_layer] = (1 / factors, place.offset)
                continue
            heads = self._heads[place.smooth_layer]
            mixed = self._masked(place.smooth_layer, share) + torch.eye(heads.size, device=factors.device)
            change.matrices[heads.values] = factors.view(-1, heads.size, 1) * mixed
            change.readers[heads.reader] = heads.values
            change.index[heads.reader] = _index(
                place, heads, self._segment.parameter(f"{heads.reader}.weight").shape[1]
            )
        return change

    def _masked(self, name: str, share: float) -> torch.Tensor:
        """The elements beside the diagonal, relative to it: nought outside the band."""
        import torch

        mixes = self._mixes[name]
        places = torch.arange(mixes.shape[1], device=mixes.device)
        distance = (places[:, None] - places).abs()
        band = (distance > 0) & (distance <= share * mixes.shape[1])
        return self._options.stability * mixes * band

    def _dominate(self, share: float) -> None:
        """Keep each row strictly dominated by its diagonal."""
        import torch

        with torch.no_grad():
            for name, mixes in self._mixes.items():
                sums = self._masked(name, share).abs().sum(-1, keepdim=True)
                mixes.mul_((DOMINATED / sums.clamp(min=1e-12)).clamp(max=1.0))

    def _judged(self, places: Sequence[int], change: Affine) -> float:
        import torch

        from quantkit.system.host import number

        with torch.no_grad():
            rounded = self._rounded(change)
            return sum(number(self._runs.error(place, rounded)) for place in places) / max(1, len(places))

    def _rounded(self, change: Affine) -> dict[str, torch.Tensor]:
        """All parameters of the block that are another, its quantized layers rounded."""
        found = {}
        for name, value in self._parameters.items():
            module, _, leaf = name.rpartition(".")
            made = change.apply(module, leaf, value)
            scheme = self._segment.schemes.get(module) if leaf == "weight" else None
            dtype = self._segment.scale_dtype
            found[name] = made if scheme is None else rounded(made, scheme, dtype, self._shares[module])
        return found

    def _refresh(self, change: Affine) -> None:
        """Find the ranges that the method would choose, with the transform as it is now."""
        import torch

        segment, method = self._segment, self._segment.method.for_embeddings()
        with torch.no_grad():
            for layer, scheme in segment.schemes.items():
                known = InputStatistics()
                if layer in segment.statistics:
                    known = change.statistics(layer, segment.statistics[layer])
                if known.gram is not None:
                    known = replace(known, square_mean=known.gram.diagonal().clone(), derived={})
                weight = change.apply(layer, "weight", self._parameters[f"{layer}.weight"])
                self._shares[layer] = shares_of(weight, known, scheme, segment.scale_dtype, method)


def rounded(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, shares: torch.Tensor) -> torch.Tensor:
    """A weight on a grid that spans a share of its groups, with gradients to it and to the range of each group.

    Args:
        weight: float32 ``[out_features, in_features]``.
        scheme: of the grid.
        scale_dtype: dtype in which scales are stored.
        shares: of the range of each group, see :func:`shares_of`.
    """
    import torch

    grids = scheme.grids()
    groups = grids.grouped(weight)
    with torch.no_grad():
        fixed = groups.detach()
        grid = grids.spanning(fixed * shares, scale_dtype)
        scales = grid.scales.float().unsqueeze(-1)
        levels = grids.nearest_(fixed / scales, grid.zeros)
        is_inside = (levels - fixed / scales).abs() <= 0.5 + (levels.abs() < 1)  # of a table, neighbours may be far
    span = groups.abs().amax(-1, True) if scheme.symmetric else groups.amax(-1, True) - groups.amin(-1, True)
    relative = span / span.detach().clamp(min=torch.finfo(torch.float32).tiny)
    steps = scales * torch.where(span.detach() > 0, relative, 1.0)
    places = groups / steps
    through = torch.where(is_inside, places + (levels - places).detach(), levels)
    return grids.ungrouped(steps * through, weight.shape)


def shares_of(
    weight: torch.Tensor, known: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype, method: Method
) -> torch.Tensor:
    """The share of the range of each group that a method has its grid span, float32 ``[out_features, groups, 1]``.

    Args:
        weight: float32 ``[out_features, in_features]``.
        known: of the input.
        scheme: of the grid.
        scale_dtype: dtype in which scales are stored.
        method: of which the ranges are; it rounds to nearest, see :meth:`Method.for_embeddings`.
    """
    import torch

    grids = scheme.grids()
    spanning = grids.spanning(grids.grouped(weight), scale_dtype).scales.float()
    found = method.quantize(weight, known.only(method.needs), scheme, scale_dtype).weight.scales.float()
    shares = (found.abs() / spanning.abs()).nan_to_num(1.0, 1.0, 1.0).clamp(*SHARED)
    return torch.where(spanning == 0, 1.0, shares).unsqueeze(-1)


def _has(heads: Mapping[str, ValueHeads], place: SmoothingPlace) -> bool:
    return place.smooth_layer in heads and place.balance_layers == (heads[place.smooth_layer].reader,)


def _index(place: SmoothingPlace, heads: ValueHeads, width: int) -> torch.Tensor:
    """Of each head that the reader reads, which of the values it is."""
    import torch

    channels = torch.arange(width) if place.channels is None else place.channels.cpu()
    return channels[:: heads.size] // heads.size
