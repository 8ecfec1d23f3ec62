"""GPTQ: columns are quantized one after another, and the free ones make up for what each loses.

Over the paper's solver this adds a search for the scales that weighs each column by the mean square of its
input, and on request a refinement of scales and codes after the solve that lowers the same layer error further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.factor import Curvature
    from quantkit.numerics.refine import Problem
    from quantkit.schemes.grids import Grid, Rounder


class GptqOptions(MethodOptions):
    """Options of GPTQ.

    Attributes:
        damping: fraction of the Gram matrix's mean diagonal that is added to its diagonal.
        activation_order: solve the columns with the strongest inputs first. Groups stay where they are,
            so the file needs no ``g_idx``.
        search: ranges tried per group for its scale; 1 takes the full range.
        refinements: rounds of refitting the scales and descending over the codes after the solve; the first takes
            about a fifth of the whole time and lowers the divergence by a few hundredths of it.
        negative_scales: let a symmetric grid, which reaches one step further on one side, turn that side to the
            weight of largest magnitude. Runtimes that decode to 16 bits take it; turn it off for kernels that
            quantize activations to 8 bits as well (vLLM's opt-in W4A8 reads scales as unsigned).
        correction: with quantized inputs, let each layer make up for what its inputs lost in the layers before it, as
            far as a quarter of the calibration tokens that is held out says that this generalizes.
    """

    damping: Annotated[float, Field(gt=0, le=10)] = 0.03
    activation_order: bool = True
    search: Annotated[int, Field(ge=1, le=200)] = 6
    refinements: Annotated[int, Field(ge=0, le=20)] = 0
    negative_scales: bool = True
    correction: bool = False


@METHODS.register
class Gptq(Method):
    """GPTQ with static groups, a weighted scale search and refinement."""

    name = "gptq"
    summary = "column by column with error compensation, refined on request"
    source = "Frantar et al. 2022, arXiv:2210.17323"
    cost = "minutes"
    Options: ClassVar[type[MethodOptions]] = GptqOptions
    needs = frozenset({Statistic.GRAM})
    factorizes = True
    options: GptqOptions

    def working_copies(self, scheme: Scheme) -> float:
        """As ``benchmarks/quantizing_peak.py`` finds for the solver of columns."""
        return 7 if scheme.symmetric else 11

    @property
    def correction(self) -> float | None:
        """With the damping of the solver."""
        return self.options.damping if self.options.correction else None

    def for_embeddings(self) -> Method:
        """Without inputs no column can make up for another: round to nearest, unless scales are to be refined."""
        searched = RtnOptions(range="search", search=self.options.search, negative_scales=self.options.negative_scales)
        return self if self.options.refinements else Rtn(searched)

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Solve, then refine; see :meth:`Method.quantize`."""
        return self.quantize_alike([(weight, statistics)], scheme, scale_dtype)[0]

    def quantize_alike(
        self, given: Sequence[tuple[torch.Tensor, InputStatistics]], scheme: Scheme, scale_dtype: torch.dtype
    ) -> list[Solution]:
        """Solve the columns of all together; see :meth:`Method.quantize_alike`."""
        posed = [self._pose(weight, statistics, scheme, scale_dtype) for weight, statistics in given]
        return [self._finish(each, levels) for each, levels in zip(posed, _solve(posed), strict=True)]

    def _pose(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> _Posed:
        """Look for the scales of a weight."""
        from quantkit.numerics.grid_search import search_grid
        from quantkit.numerics.refine import Problem

        options, grids = self.options, scheme.grids()
        curvature = statistics.curvature(options.damping, options.activation_order, weight)
        hessian, columns = curvature.hessian, weight.T.contiguous()
        grid = search_grid(
            weight, hessian.diagonal(), scheme, scale_dtype, options.search, negative_scales=options.negative_scales
        )
        return _Posed(Problem(columns, curvature.gram, hessian, hessian @ columns, grids), curvature, grid)

    def _finish(self, posed: _Posed, levels: torch.Tensor) -> Solution:
        """Refine what the column solver found, and judge it."""
        from quantkit.numerics.grid_search import codes_of, quantized
        from quantkit.numerics.refine import refine

        problem, scheme = posed.problem, posed.problem.grids.scheme
        solved = problem.attempt(levels, posed.grid)
        refined = refine(problem, solved, self.options.refinements)
        return Solution(
            quantized(codes_of(refined.levels, refined.grid, scheme), refined.grid, scheme),
            error=refined.error,
            energy=problem.energy(),
            error_before=solved.error,
            notes=posed.curvature.notes(),
        )


@dataclass(frozen=True, slots=True)
class _Posed:
    """A weight whose scales are found and whose codes are not."""

    problem: Problem
    curvature: Curvature
    grid: Grid

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[columns, rows]`` in the order of solving, a new tensor."""
        order = self.curvature.order
        return values.clone() if order is None else values[order]

    def rounder(self) -> Rounder:
        """The nearest levels in the order of solving."""
        order, rounder = self.curvature.order, self.problem.rounder(self.grid)
        return rounder if order is None else rounder.ordered(order)

    def in_place(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels ``[columns, rows]`` in the checkpoint's order of columns."""
        if self.curvature.order is None:
            return levels
        found = levels.new_empty(levels.shape)
        found[self.curvature.order] = levels
        return found


def _solve(posed: Sequence[_Posed]) -> list[torch.Tensor]:
    """The levels of the column solver for weights of one shape, in the checkpoint's order of columns."""
    from quantkit.numerics.columns import solve_columns

    first, *others = (each.rounder() for each in posed)
    levels = solve_columns(
        _together([each.in_order(each.problem.weight) for each in posed]),
        _together([each.curvature.factor for each in posed]),
        _together([each.in_order(each.problem.spread(each.grid.scales)) for each in posed]),
        first.beside(others),
    )
    return [each.in_place(found) for each, found in zip(posed, levels, strict=True)]


def _together(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors as one, with a first dimension for each; a single one, which may be large, is not copied."""
    import torch

    return torch.stack(list(values)) if len(values) > 1 else values[0].unsqueeze(0)
