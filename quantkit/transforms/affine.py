"""AffineQuant: invertible affine transforms of the inputs of layers, learned block by block on the error of its output.

``X W = (X A⁻¹)(A W)``, and what is rounded is ``A W``. ``A`` is learned by gradients through a block whose weights are
rounded as they would be. It starts from a diagonal, and its other elements come in from the diagonal outward (the
gradual mask of the paper); each row stays strictly dominated by its diagonal, so that ``A`` is invertible (Levy and
Desplanques).

Here ``A`` is what goes into plain weights: a diagonal between a norm and the layers that read it and between ``up`` and
``down``, and a full matrix for each head of values. It starts from AWQ's factors, and these are kept where batches that
are held out see no gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from quantkit.methods.base import InputStatistics, Method
from quantkit.schemes import Scheme
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.awq import AwqFactors, AwqFactorsOptions
from quantkit.transforms.base import BlockRuns, Change, SegmentView, SmoothingPlace, TransformOptions, ValueHeads
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch

MATRICES, INDEX = "matrices of ", "heads of "
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


@dataclass(slots=True)
class Affine(Change):
    """Factors of channels, and matrices of heads of values.

    Attributes:
        scales: the factors; those of values with matrices are in these.
        matrices: by layers of values ``A`` of each head, float32 ``[heads, size, size]``: columns of the reader are
            multiplied by it, and values by its inverse.
        readers: layers that read values, with these.
        index: of each head that a reader reads, int64 ``[heads read]``, which of the values it is.
        told: the block's error before and after, relative to no transform.
    """

    scales: ChannelScales = field(default_factory=ChannelScales)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    index: dict[str, torch.Tensor] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)

    def touches(self) -> list[str]:
        """What is scaled, and layers of values with their readers."""
        return list(dict.fromkeys([*self.scales.touches(), *self.matrices, *self.readers]))

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as it becomes."""
        import torch

        parameter = self.scales.apply(module, leaf, parameter)
        if leaf == "weight" and module in self.readers:
            matrices = self._read(module).to(parameter)
            heads = parameter.view(len(parameter), len(matrices), -1)
            parameter = torch.einsum("rhi,hij->rhj", heads, matrices).reshape(parameter.shape)
        if module in self.matrices:
            matrices = self.matrices[module].to(parameter)
            rows = parameter.reshape(len(matrices), matrices.shape[1], -1)
            parameter = torch.linalg.solve(matrices, rows).reshape(parameter.shape)
        return parameter

    def _read(self, reader: str) -> torch.Tensor:
        """``A`` of each head that a layer reads."""
        values = self.readers[reader]
        return self.matrices[values][self.index[reader].to(self.matrices[values].device)]

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input as it becomes; magnitudes of mixed inputs are those of the sample."""
        import torch

        found = self.scales.statistics(layer, found)
        if layer not in self.readers or found.is_empty():
            return found
        mixed = torch.block_diag(*torch.linalg.inv(self._read(layer)))  # type: ignore[no-untyped-call]  # torch's
        gram = None if found.gram is None else mixed @ found.gram @ mixed.T
        sample = None if found.sample is None else found.sample @ mixed.T
        held = {name: self.statistics(layer, each) for name, each in found.held_out.items()}
        return replace(
            found,
            gram=gram,
            sample=sample,
            square_mean=None if found.square_mean is None or gram is None else gram.diagonal().clone(),
            abs_mean=None if found.abs_mean is None or sample is None else sample.abs().mean(0),
            abs_max=None if found.abs_max is None or sample is None else sample.abs().amax(0),
            derived={},
            held_out=held,
        )

    def mixes_outputs(self, module: str) -> bool:
        """Those of layers of values are."""
        return module in self.matrices

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors, matrices, and which head is which."""
        own = {f"{MATRICES}{name}": each for name, each in self.matrices.items()}
        return self.scales.tensors() | own | {f"{INDEX}{name}": each for name, each in self.index.items()}

    def to_json(self) -> dict[str, Any]:
        """What is scaled and mixed, and the block's errors."""
        return {**self.scales.to_json(), "readers": self.readers, **self.told}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Affine:
        """From :meth:`tensors` and :meth:`to_json`."""

        def named(start: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}

        told = {key: data[key] for key in ("before", "after") if key in data}
        return cls(ChannelScales.of(tensors, data), named(MATRICES), dict(data["readers"]), named(INDEX), told)


@TRANSFORMS.register
class AffineQuant(AwqFactors):
    """Learned affine transforms."""

    name = "affine"
    summary = "learns factors of channels and matrices of heads on the error of each block's output; takes minutes"
    source = "AffineQuant, Ma et al. 2024, arXiv:2403.12544"
    Options: ClassVar[type[TransformOptions]] = AffineOptions
    learns = True
    options: AffineOptions

    def of_segment(self, segment: SegmentView) -> Change | None:
        """Learn from AWQ's factors on."""
        import torch

        start = AwqFactors.of_segment(self, segment)
        places = [each for each in segment.places if any(layer in segment.schemes for layer in each.balance_layers)]
        if not isinstance(start, ChannelScales):
            return None
        if segment.runs is None or not places:
            return Affine(start)
        with torch.enable_grad():
            return _Learning(self.options, segment, segment.runs, places, start).run()

    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Change:
        """What was learned of a segment, as it was stored."""
        return Affine.of(tensors, data)

    def notes(self, done: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
        """How many blocks learned something, and what they came to."""
        told = [each for each in done if each is not None and "after" in each]
        better = [each for each in told if each["after"] < each["before"]]
        if not told:
            return ("affine learned nothing in this model: no input of it can be scaled",)
        left = sum(each["after"] / each["before"] for each in told if each["before"]) / len(told)
        return (f"affine bettered {len(better)} of {len(told)} blocks, to {left:.2f} of the error with AWQ's factors",)


class _Learning:
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
        return replace(_detached(best), told={"before": before, "after": least})

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


def _detached(change: Affine) -> Affine:
    scales = change.scales
    return Affine(
        ChannelScales(
            {name: each.detach().clone() for name, each in scales.columns.items()},
            {name: (each.detach().clone(), offset) for name, (each, offset) in scales.rows.items()},
            scales.places,
        ),
        {name: each.detach().clone() for name, each in change.matrices.items()},
        change.readers,
        change.index,
    )
