"""GPTQ: columns are quantized one after another, and the free ones make up for what each loses.

Over the paper's solver this adds a search for the scales, of each group before the solve or when the solver comes to
it, and a refinement of scales and codes after the solve that lowers the same layer error further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.methods.ggml import importance_of
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.factor import Curvature
    from quantkit.schemes.grids import Grid, Grids, Rounder


CANDIDATES = 6
CANDIDATES_IN_TURN = 9
"""More than beforehand, where each is given the scale that suits its codes best."""


LEAST_DAMPING, MOST_DAMPING = 0.05, 0.25
DAMPED = 2.0
"""Damping times tokens by columns, between the least and the most."""


def damping_for(tokens: int, columns: int) -> float:
    """The damping of a Gram matrix by the tokens that it is of.

    Of few tokens for a column correlations are partly chance, and damping is what keeps the solver from relying on them
    (ridge regression). The figures come from errors of layers on text that was held out, see ``docs/methods.md``.
    """
    return min(max(DAMPED * columns / max(tokens, 1), LEAST_DAMPING), MOST_DAMPING)


class GptqOptions(MethodOptions):
    """Options of GPTQ.

    Attributes:
        damping: fraction of the Gram matrix's mean diagonal that is added to its diagonal; by default the more the
            fewer tokens there are for a column, see :func:`damping_for`.
        shrinkage: share of the Gram matrix off its diagonal that is taken away before: correlations between inputs
            are trusted less, for other texts than those of the calibration have others.
        activation_order: solve the columns with the strongest inputs first. Groups stay where they are,
            so the file needs no ``g_idx``.
        search: ranges tried per group for its scale, by default 9 in turn and 6 before; 1 takes the full range.
        scales: ``in_turn`` chooses the scale of a group when the solver comes to the first of its columns, among those
            tried by solving the group for each; ``before`` chooses all beforehand, by rounding. By default in turn
            for nvfp4. Groups of more than 128 columns, scales that groups share and ``search: 1`` take
            ``before`` in any case.
        range_weights: how the search before weighs the error of a column: ``inputs`` by the mean square of its input,
            ``solver`` by that and by what the columns after it cannot make up for.
        refinements: rounds of refitting the scales and descending over the codes after the solve.
        negative_scales: let a symmetric grid, which reaches one step further on one side, turn that side to the
            weight of largest magnitude. Runtimes that decode to 16 bits take it; turn it off for kernels that
            quantize activations to 8 bits as well (vLLM's opt-in W4A8 reads scales as unsigned).
        correction: with quantized inputs, let each layer make up for what its inputs lost in the layers before it, as
            far as a quarter of the calibration tokens that is held out says that this generalizes.
    """

    damping: Annotated[float, Field(gt=0, le=10)] | None = None
    shrinkage: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation_order: bool = True
    search: Annotated[int, Field(ge=1, le=200)] | None = None
    scales: Literal["in_turn", "before"] | None = None
    range_weights: Literal["solver", "inputs"] = "solver"
    refinements: Annotated[int, Field(ge=0, le=20)] = 1
    negative_scales: bool = True
    correction: bool = True


@METHODS.register
class Gptq(Method):
    """GPTQ with static groups, a weighted scale search and refinement."""

    name = "gptq"
    summary = "column by column with error compensation, then refined"
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
    def corrects(self) -> bool:
        """On request."""
        return self.options.correction

    def for_embeddings(self) -> Method:
        """Without inputs no column can make up for another: round to nearest on the grid of least square error."""
        options = self.options
        tried = options.search or CANDIDATES
        return Rtn(RtnOptions(range="search", search=tried, negative_scales=options.negative_scales))

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Solve, then refine; see :meth:`Method.quantize`."""
        return self.quantize_alike([(weight, statistics)], scheme, scale_dtype)[0]

    def quantize_alike(
        self, given: Sequence[tuple[torch.Tensor, InputStatistics]], scheme: Scheme, scale_dtype: torch.dtype
    ) -> list[Solution]:
        """Solve the columns of all together; see :meth:`Method.quantize_alike`."""
        posed = [self._pose(weight, statistics, scheme) for weight, statistics in given]
        in_turn = self._is_in_turn(scheme, given[0][0].shape[1])
        solved = self._solve_in_turn(posed, scale_dtype) if in_turn else self._solve_before(posed, scale_dtype)
        return [self._finish(each, *found) for each, found in zip(posed, solved, strict=True)]

    def trial_errors(
        self,
        weight: torch.Tensor,
        statistics: InputStatistics,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        factors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The expected cost of each column's error once the later ones made up for it; :meth:`Method.trial_errors`.

        One factorization serves all: ``(S⁻¹ H S⁻¹)⁻¹ = S H⁻¹ S``, so that a column's cost is divided by the square of
        its factor. Damping and order are those of the input without factors.
        """
        from quantkit.numerics.smoothing import expected_errors

        options = self.options
        damping = self._damping(statistics, weight)
        key = ("column costs", damping, options.activation_order, options.shrinkage)
        if key not in statistics.derived:  # the factor itself, as large as the Gram matrix, is not kept
            alone = InputStatistics(statistics.tokens, gram=statistics.gram, evenness=statistics.evenness)
            curvature = alone.curvature(damping, options.activation_order, weight, options.shrinkage)
            statistics.derived[key] = curvature.column_costs()
        return expected_errors(weight, statistics.derived[key], scheme, scale_dtype, factors)

    def _is_in_turn(self, scheme: Scheme, columns: int) -> bool:
        """Whether scales are chosen as the columns are solved."""
        from quantkit.numerics.in_turn import is_in_turn

        options = self.options
        asked = options.scales or ("in_turn" if scheme.grids().whole else "before")
        return asked == "in_turn" and options.search != 1 and is_in_turn(scheme.grids(), columns)

    def _damping(self, statistics: InputStatistics, weight: torch.Tensor) -> float:
        """As asked for, or by the tokens of the statistics."""
        return self.options.damping or damping_for(statistics.effective_tokens, weight.shape[1])

    def _pose(self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme) -> _Posed:
        """A weight with what is known of its inputs."""
        from quantkit.numerics.factor import Curvature
        from quantkit.numerics.in_turn import order_of_groups

        options, grids, damping = self.options, scheme.grids(), self._damping(statistics, weight)
        if grids.whole and options.activation_order and self._is_in_turn(scheme, weight.shape[1]):
            gram = statistics.gram_for(weight)
            order = order_of_groups(weight, gram.diagonal(), grids)
            curvature = Curvature.of(gram, damping, order, options.shrinkage)
        else:
            curvature = statistics.curvature(damping, options.activation_order, weight, options.shrinkage)
        strength = None if statistics.gram is None else statistics.gram.diagonal().clone()
        return _Posed(weight, curvature, grids, importance_of(scheme, strength))

    def _solve_in_turn(self, posed: Sequence[_Posed], scale_dtype: torch.dtype) -> list[tuple[torch.Tensor, Grid]]:
        """Levels ``[columns, rows]`` in the checkpoint's order of columns, and grids, chosen on the way."""
        from quantkit.numerics.in_turn import OpenLayer, Search, solve_in_turn

        options = self.options
        search = Search(scale_dtype, options.search or CANDIDATES_IN_TURN, options.negative_scales)
        layers = [
            OpenLayer(each.in_order(each.weight.T), each.curvature.factor, each.curvature.order, each.fitted(), search)
            for each in posed
        ]
        levels = solve_in_turn(layers)
        return [(each.in_place(found), layer.grid()) for each, found, layer in zip(posed, levels, layers, strict=True)]

    def _solve_before(self, posed: Sequence[_Posed], scale_dtype: torch.dtype) -> list[tuple[torch.Tensor, Grid]]:
        """The same on grids that are chosen before."""
        from quantkit.numerics.columns import solve_columns
        from quantkit.numerics.grid_search import search_grid

        options = self.options
        by_solver = options.range_weights == "solver"
        grids = [
            search_grid(
                each.weight,
                each.curvature.column_weights() if by_solver else each.curvature.hessian.diagonal(),
                each.grids.scheme,
                scale_dtype,
                options.search or CANDIDATES,
                negative_scales=options.negative_scales,
            )
            for each in posed
        ]
        first, *others = (each.rounder(grid) for each, grid in zip(posed, grids, strict=True))
        levels = solve_columns(
            _together([each.in_order(each.weight.T) for each in posed]),
            _together([each.curvature.factor for each in posed]),
            _together([each.in_order(each.spread(grid)) for each, grid in zip(posed, grids, strict=True)]),
            first.beside(others),
        )
        return [(each.in_place(found), grid) for each, found, grid in zip(posed, levels, grids, strict=True)]

    def _finish(self, posed: _Posed, levels: torch.Tensor, grid: Grid) -> Solution:
        """Refine what the column solver found, and judge it."""
        from quantkit.numerics.grid_search import codes_of, quantized
        from quantkit.numerics.refine import Problem, refine
        from quantkit.system.products import product

        grids, curvature, columns = posed.grids, posed.curvature, posed.weight.T.contiguous()
        hessian = curvature.hessian
        response = product(hessian, columns)
        problem = Problem(columns, curvature.gram, hessian, response, grids, self.options.shrinkage)
        solved = problem.attempt(levels, grid)
        refined = refine(problem, solved, self.options.refinements)
        weight = quantized(codes_of(refined.levels, refined.grid, grids.scheme), refined.grid, grids.scheme)
        return Solution(
            replace(weight, parts={**weight.parts, **posed.importance}),
            error=refined.error,
            energy=problem.energy(),
            error_before=solved.error,
            notes=curvature.notes(),
        )


@dataclass(frozen=True, slots=True)
class _Posed:
    """A weight, float32 ``[rows, columns]``, whose scales and codes are to be found."""

    weight: torch.Tensor
    curvature: Curvature
    grids: Grids
    importance: Mapping[str, torch.Tensor]

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[columns, rows]`` in the order of solving, a new tensor."""
        import torch

        order = self.curvature.order
        return values.clone(memory_format=torch.contiguous_format) if order is None else values[order]

    def fitted(self) -> Grids:
        """The grids of this weight."""
        return self.grids.fitted(self.grids.grouped(self.weight))

    def rounder(self, grid: Grid) -> Rounder:
        """The nearest levels in the order of solving."""
        rounder = self.grids.rounder(grid, *self.weight.shape)
        return rounder if self.curvature.order is None else rounder.ordered(self.curvature.order)

    def spread(self, grid: Grid) -> torch.Tensor:
        """The scale of each weight, float32 ``[columns, rows]``."""
        return self.grids.spread(grid.scales.float(), *self.weight.shape)

    def in_place(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels ``[columns, rows]`` in the checkpoint's order of columns."""
        if self.curvature.order is None:
            return levels
        found = levels.new_empty(levels.shape)
        found[self.curvature.order] = levels
        return found


def _together(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors as one, with a first dimension for each; a single one, which may be large, is not copied."""
    import torch

    return torch.stack(list(values)) if len(values) > 1 else values[0].unsqueeze(0)
