"""GPTQ: the textbook's codes, a refinement that never loses, and less error than rounding everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Solution
from quantkit.methods.gptq import Gptq, GptqOptions, damping_for
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.numerics import refine as refine_module
from quantkit.numerics.columns import solve_columns
from quantkit.numerics.factor import Curvature, damped, inverse_factor
from quantkit.numerics.grid_search import codes_of, encode, quantized, search_grid
from quantkit.numerics.refine import Problem, descend, refine, refit_scales
from quantkit.schemes import PER_CHANNEL, IntScheme, Mxfp4Scheme, Scheme
from quantkit.schemes.grids import Grid, Rounder
from tests.tiny import int_schemes, spread

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, COLUMNS = 24, 96
SCHEMES = int_schemes(32)
names = IntScheme.describe


def correlated_gram(columns: int = COLUMNS, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Inputs that share a few directions and differ in strength, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    inputs = shared + torch.randn(tokens, columns, generator=generator)
    inputs *= torch.randn(columns, generator=generator).exp()
    return inputs.T @ inputs / tokens


def random_weight(rows: int = ROWS, columns: int = COLUMNS, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05 + 0.02


def solved(
    weight: torch.Tensor, gram: torch.Tensor | None, scheme: IntScheme, dtype: torch.dtype, **options: float | str
) -> Solution:
    statistics = InputStatistics(tokens=400, gram=gram)
    return Gptq(GptqOptions.model_validate(options)).quantize(weight, statistics, scheme, dtype)


def layer_error(weight: torch.Tensor, solution: Solution, gram: torch.Tensor) -> torch.Tensor:
    """Per row, in float64, from the weight that the file will give."""
    difference = weight.double() - solution.weight.dequantize(torch.float32).double()
    return ((difference @ gram.double()) * difference).sum(1)


@dataclass
class Case:
    """A small layer with its grid, as the column solver and the refinement take it."""

    weight: torch.Tensor
    gram: torch.Tensor
    scheme: IntScheme
    damping: float = 0.01

    def __post_init__(self) -> None:
        self.hessian = damped(self.gram, self.damping)
        self.grid = search_grid(self.weight, self.gram.diagonal(), self.scheme, torch.float32, 8)
        self.columns = self.weight.shape[1]
        self.grids = self.scheme.grids()
        self.rounder = self.grids.rounder(self.grid, *self.weight.shape)
        self.scales = spread(self.grid.scales, self.columns)

    def problem(self) -> Problem:
        columns = self.weight.T.contiguous()
        return Problem(columns, self.gram, self.hessian, self.hessian @ columns, self.grids)

    def rounded_steps(self) -> torch.Tensor:
        codes = encode(self.weight, self.grid, self.scheme).float()
        return codes.T - spread(self.grid.zeros, self.columns)

    def objective(self, steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The damped layer error of each row, in float64."""
        missing = (self.weight.T - steps * scales).double()
        return ((self.hessian.double() @ missing) * missing).sum(0)


def case(scheme: IntScheme, columns: int = COLUMNS) -> Case:
    return Case(random_weight(columns=columns), correlated_gram(columns), scheme)


def textbook_codes(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scheme: IntScheme, order: torch.Tensor
) -> torch.Tensor:
    """GPTQ as its paper states it, in float64: quantize a column, push its error onto all that follow."""
    free = weight.double()[:, order]
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = weight.shape[1]
    scales = spread(grid.scales.double(), columns).T[:, order]
    zeros = spread(grid.zeros.double(), columns).T[:, order]
    codes = torch.empty_like(free)
    for column in range(columns):
        code = (free[:, column] / scales[:, column]).round() + zeros[:, column]
        codes[:, column] = code.clamp(0, scheme.levels - 1)
        value = (codes[:, column] - zeros[:, column]) * scales[:, column]
        error = (free[:, column] - value) / factor[column, column]
        free[:, column:] -= error.unsqueeze(1) * factor[column, column:]
    return codes[:, order.argsort()].to(torch.uint8)


def one_by_itself(weight: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, rounder: Rounder) -> torch.Tensor:
    """The column solver with a single layer."""
    levels: torch.Tensor
    (levels,) = solve_columns(weight.unsqueeze(0), factor.unsqueeze(0), scales.unsqueeze(0), rounder)
    return levels


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_column_solver_gives_the_codes_of_the_textbook(scheme: IntScheme, ordered: bool) -> None:
    """One row may differ: where float32 breaks a near tie the other way, the rest of its row follows."""
    given = case(scheme)
    order = given.gram.diagonal().argsort(descending=True) if ordered else torch.arange(COLUMNS)
    factor, used = inverse_factor(given.gram[order][:, order], given.damping)
    assert used == given.damping
    steps = torch.empty(COLUMNS, ROWS)
    steps[order] = one_by_itself(
        given.weight.T[order].contiguous(), factor, given.scales[order], given.rounder.ordered(order)
    )
    found = codes_of(steps, given.grid, scheme)
    expected = textbook_codes(given.weight, given.hessian, given.grid, scheme, order)
    assert int((found != expected).any(1).sum()) <= 1
    assert int((expected != encode(given.weight, given.grid, scheme)).sum()) > ROWS, "rounding would have done"


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64])
def test_blocks_of_columns_join_without_a_seam(columns: int) -> None:
    given = case(IntScheme(4, PER_CHANNEL), columns)
    factor, _ = inverse_factor(given.gram, given.damping)
    steps = one_by_itself(given.weight.T.contiguous(), factor, given.scales, given.rounder)
    order = torch.arange(columns)
    expected = textbook_codes(given.weight, given.hessian, given.grid, given.scheme, order)
    assert int((codes_of(steps, given.grid, given.scheme) != expected).any(1).sum()) <= 1


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=names)
def test_plain_it_is_the_textbook_on_the_searched_grid(scheme: IntScheme, ordered: bool) -> None:
    given = case(scheme)
    plain = {"damping": given.damping, "shrinkage": 0, "refinements": 0}
    solution = solved(given.weight, given.gram, scheme, torch.float32, activation_order=ordered, **plain)
    grid = Grid(solution.weight.scales, solution.weight.zeros.float())
    order = given.gram.diagonal().argsort(descending=True) if ordered else torch.arange(COLUMNS)
    expected = textbook_codes(given.weight, given.hessian, grid, scheme, order)
    assert int((solution.weight.codes != expected).any(1).sum()) <= 1
    assert solution.notes == ()


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_refitted_scales_solve_the_least_squares_problem(scheme: IntScheme) -> None:
    given = case(scheme)
    steps, groups = given.rounded_steps(), scheme.groups(COLUMNS)
    found = refit_scales(given.hessian @ given.weight.T, steps, given.hessian, groups)
    root = torch.linalg.cholesky(given.hessian.double()).T  # H = rootᵀ root, so the error is |root (w - S s)|²
    for row in range(ROWS):
        blocks = spread(torch.eye(groups), COLUMNS).double() * steps[:, row].double().unsqueeze(1)
        best = torch.linalg.lstsq(root @ blocks, (root @ given.weight[row].double()).unsqueeze(1)).solution
        torch.testing.assert_close(found[:, row].double(), best[:, 0], rtol=1e-3, atol=1e-5)


def test_scales_of_many_rows_are_refitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one system of all rows would be too large; a part has 128 rows at least."""
    generator = torch.Generator().manual_seed(0)
    gram = torch.randn(200, 32, generator=generator)
    hessian = gram.T @ gram / 200 + 0.1 * torch.eye(32)
    weight, levels = torch.randn(32, 300, generator=generator), torch.randint(-8, 8, (32, 300)).float()
    whole = refit_scales(hessian @ weight, levels, hessian, 4)
    solved: list[int] = []
    solve = torch.linalg.solve_ex
    monkeypatch.setattr(refine_module, "SYSTEM", 4 * 4 * 130)

    def counted(system: torch.Tensor, target: torch.Tensor) -> Any:
        solved.append(len(system))
        return solve(system, target)

    monkeypatch.setattr(torch.linalg, "solve_ex", counted)
    torch.testing.assert_close(refit_scales(hessian @ weight, levels, hessian, 4), whole, rtol=1e-5, atol=1e-6)
    assert solved == [128, 128, 44]


def test_a_group_without_a_step_is_left_out_of_the_refit_and_keeps_its_scale() -> None:
    given = case(IntScheme(4, 32))
    steps = given.rounded_steps()
    steps[32:64] = 0
    steps[:, 3] = 0
    found = refit_scales(given.hessian @ given.weight.T, steps, given.hessian, 3)
    assert bool(found.isfinite().all())
    assert bool((found[1] == 0).all())
    assert bool((found[:, 3] == 0).all())
    problem = given.problem()
    start = problem.attempt(steps, given.grid)
    refined = refine(problem, start, 1)
    assert bool((refined.error < start.error).all()), "the scales that were kept let the codes come back"
    torch.testing.assert_close(refined.grid.scales[:, 1], given.grid.scales[:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_descent_never_raises_the_error_and_ends_where_no_single_code_is_better(scheme: IntScheme) -> None:
    given = case(scheme, columns=64)
    steps = given.rounded_steps()
    energy = given.objective(steps, given.scales)
    first = energy
    for _ in range(60):
        before = steps.clone()
        descend(given.weight.T.contiguous(), steps, given.scales, given.rounder, given.hessian)
        now = given.objective(steps, given.scales)
        assert bool((now <= energy * (1 + 1e-6)).all())
        energy = now
        if torch.equal(before, steps):
            break
    assert torch.equal(before, steps), "the descent has not come to rest"
    assert float(energy.sum()) < 0.9 * float(first.sum())
    assert _best_single_move(given, steps) > -1e-4 * float(energy.min())


@pytest.mark.parametrize("columns", [31, 32, 33, 96])
@pytest.mark.parametrize("scheme", SCHEMES[1::6], ids=names)
def test_a_sweep_of_descent_is_that_of_one_code_after_another(scheme: IntScheme, columns: int) -> None:
    """Written out in float64; one row may differ, where float32 breaks a near tie the other way."""
    scheme = IntScheme(scheme.bits, PER_CHANNEL, scheme.symmetric)
    given = case(scheme, columns)
    steps = given.rounded_steps()
    expected, scales, hessian = steps.double(), given.scales.double(), given.hessian.double()
    zeros = spread(given.grid.zeros, columns).double()
    for column in range(columns):
        pull = hessian[column] @ (given.weight.T.double() - expected * scales) / hessian[column, column]
        wanted = (expected[column] + pull / scales[column]).round() + zeros[column]
        expected[column] = wanted.clamp(0, scheme.levels - 1) - zeros[column]
    descend(given.weight.T.contiguous(), steps, given.scales, given.rounder, given.hessian)
    assert int((steps != expected).any(0).sum()) <= 1


def _best_single_move(given: Case, steps: torch.Tensor) -> float:
    """The change of the objective by the best move of any one code to any other, over all rows."""
    missing = (given.weight.T - steps * given.scales).double()
    slope = given.hessian.double() @ missing
    zeros = spread(given.grid.zeros, given.columns)
    best = float("inf")
    for code in range(given.scheme.levels):
        move = (code - zeros - steps).double() * given.scales.double()
        change = given.hessian.diagonal().double().unsqueeze(1) * move.square() - 2 * move * slope
        best = min(best, float(change.min()))
    return best


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_refinement_never_raises_the_error_of_a_row(scheme: IntScheme, rounds: int) -> None:
    given = case(scheme)
    problem = given.problem()
    start = problem.attempt(given.rounded_steps(), given.grid)
    refined = refine(problem, start, rounds)
    assert bool((refined.error <= start.error).all())
    assert float(refined.error.sum()) < float(start.error.sum())
    checked = problem.attempt(refined.levels, refined.grid)
    torch.testing.assert_close(refined.error, checked.error, rtol=1e-4, atol=1e-12)


def test_scales_that_cannot_be_refitted_stay_and_spoil_no_other_row() -> None:
    """The scales of row 0 are refitted to NaN; it keeps those that it had, and the other rows must not notice."""
    given = case(IntScheme(4, 32))
    problem = given.problem()
    start = problem.attempt(given.rounded_steps(), given.grid)
    expected = refine(problem, start, 1)
    problem.response[:, 0] = float("nan")
    found = refine(problem, start, 1)
    torch.testing.assert_close(found.grid.scales[0], start.grid.scales[0], rtol=0, atol=0)
    assert float(found.error[0]) <= float(start.error[0])
    torch.testing.assert_close(found.levels[:, 1:], expected.levels[:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_gptq_loses_less_than_rounding_and_refinement_less_still(scheme: IntScheme, dtype: torch.dtype) -> None:
    weight, gram = random_weight(), correlated_gram()
    rtn = Rtn(RtnOptions()).quantize(weight, InputStatistics(), scheme, dtype)
    searched = Rtn(RtnOptions(range="search")).quantize(weight, InputStatistics(), scheme, dtype)
    plain = solved(weight, gram, scheme, dtype, refinements=0)
    refined = solved(weight, gram, scheme, dtype, refinements=2)
    rounding, clipping, solving, refining = (
        layer_error(weight, solution, gram) for solution in (rtn, searched, plain, refined)
    )
    assert float(solving.sum()) < float(torch.minimum(rounding.sum(), clipping.sum()))
    assert bool((refining <= solving * (1 + 1e-3)).all())
    assert float(refining.sum()) < float(solving.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_errors_told_are_those_of_the_stored_weight(scheme: IntScheme, dtype: torch.dtype) -> None:
    weight, gram = random_weight(), correlated_gram()
    solution = solved(weight, gram, scheme, dtype)
    assert solution.weight.scales.dtype == dtype
    torch.testing.assert_close(solution.error.double(), layer_error(weight, solution, gram), rtol=2e-2, atol=1e-9)
    energy = ((weight.double() @ gram.double()) * weight.double()).sum(1)
    torch.testing.assert_close(solution.energy.double(), energy, rtol=1e-3, atol=1e-9)
    before = solved(weight, gram, scheme, dtype, refinements=0)
    assert solution.error_before is not None
    torch.testing.assert_close(solution.error_before, before.error, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_stacked_layers_are_solved_as_each_by_itself(scheme: IntScheme) -> None:
    """Matrix products of other shapes may sum in another order, so one near tie is let off."""
    weight, gram = random_weight(rows=40), correlated_gram()
    together = solved(weight, gram, scheme, torch.float16)
    differing = 0
    for start, stop in ((0, 16), (16, 17), (17, 40)):
        alone = solved(weight[start:stop], gram, scheme, torch.float16)
        rows = together.weight.rows(start, stop)
        differing += int((alone.weight.codes != rows.codes).any(1).sum())
        torch.testing.assert_close(alone.error.sum(), together.error[start:stop].sum(), rtol=2e-2, atol=1e-9)
    assert differing <= 1


@pytest.mark.parametrize("group_size", [32, PER_CHANNEL])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_were_never_active_are_rounded_and_disturb_nothing(group_size: int, symmetric: bool) -> None:
    """A whole group of them, and some beside others."""
    scheme, weight, gram = IntScheme(4, group_size, symmetric), random_weight(), correlated_gram()
    dead = [*range(32, 64), 3, 90]
    gram[dead] = gram[:, dead] = 0
    solution = solved(weight, gram, scheme, torch.float16)
    found = solution.weight
    assert bool(solution.error.isfinite().all())
    assert bool(found.scales.isfinite().all())
    nearest = encode(weight, Grid(found.scales, found.zeros.float()), scheme)
    assert float((found.codes[:, dead] != nearest[:, dead]).float().mean()) < 0.01
    loss = (weight - found.dequantize(torch.float32))[:, 32:64].square().sum() / weight[:, 32:64].square().sum()
    assert float(loss) < 0.02


def test_inactive_inputs_beside_one_weak_active_one_are_not_clipped_to_its_range() -> None:
    scheme, weight, gram = IntScheme(4, 32), random_weight(), correlated_gram()
    dead = list(range(1, 32))
    gram[dead] = gram[:, dead] = 0
    weight[:, 0] *= 0.01
    found = solved(weight, gram, scheme, torch.float16).weight.dequantize(torch.float32)
    loss = (weight - found)[:, dead].square().sum() / weight[:, dead].square().sum()
    assert float(loss) < 0.02


@pytest.mark.parametrize("gram", [None, torch.zeros(COLUMNS, COLUMNS)], ids=["no token", "zeros"])
def test_a_layer_without_any_input_is_rounded_to_nearest(gram: torch.Tensor | None) -> None:
    scheme, weight = IntScheme(4, 32, symmetric=False), random_weight()
    solution = solved(weight, gram, scheme, torch.float16, search=24)
    searched = Rtn(RtnOptions(range="search")).quantize(weight, InputStatistics(), scheme, torch.float16)
    ours, theirs = (weight - each.weight.dequantize(torch.float32) for each in (solution, searched))
    assert float(ours.square().sum()) <= 1.001 * float(theirs.square().sum())


def test_correlations_of_few_tokens_are_trusted_less() -> None:
    """The error on tokens of the same kind that were not seen; with none taken away it is what shrinkage is for."""
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=draw) * torch.rand(COLUMNS, generator=draw)
    seen, unseen = (torch.randn(count, COLUMNS, generator=draw) @ mix for count in (COLUMNS, 50 * COLUMNS))
    weight, held_out = random_weight(), unseen.T @ unseen / len(unseen)
    gram = seen.T @ seen / len(seen)
    found = [
        solved(weight, gram, IntScheme(4, 32), torch.float16, shrinkage=share, damping=0.03) for share in (0.0, 0.2)
    ]
    plain, shrunk = (float(layer_error(weight, each, held_out).sum()) for each in found)
    assert shrunk < 0.95 * plain
    assert float(found[0].error.sum()) < float(found[1].error.sum()), "on the tokens that were seen it is the reverse"


def test_damping_that_had_to_be_raised_is_noted() -> None:
    gram = torch.full((COLUMNS, COLUMNS), 1e4)
    solution = solved(random_weight(), gram, IntScheme(4, 32), torch.float16, damping=1e-12, shrinkage=0)
    assert len(solution.notes) == 1
    assert solution.notes[0].startswith("damping raised from 1e-12 to ")
    assert bool(solution.error.isfinite().all())


def test_statistics_with_nan_are_refused() -> None:
    gram = correlated_gram()
    gram[4, 4] = float("nan")
    with pytest.raises(QuantizationError, match="check the model and the calibration texts"):
        solved(random_weight(), gram, IntScheme(4, 32), torch.float16)


def test_a_scale_beyond_float16_is_refused_with_the_remedy() -> None:
    with pytest.raises(QuantizationError, match=r"model\.dtype to bfloat16 or float32"):
        solved(random_weight() * 1e8, correlated_gram(), IntScheme(4, 32), torch.float16)


def test_the_weight_and_the_statistics_are_not_changed() -> None:
    weight, gram = random_weight(), correlated_gram()
    solved(weight, gram, IntScheme(4, 32), torch.float16)
    torch.testing.assert_close(weight, random_weight(), rtol=0, atol=0)
    torch.testing.assert_close(gram, correlated_gram(), rtol=0, atol=0)


LIKE = [IntScheme(4, 16, True), IntScheme(4, 16, False), IntScheme(3, 16, False, zeros="float"), Mxfp4Scheme()]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", LIKE, ids=lambda scheme: scheme.describe())
def test_weights_that_are_alike_are_solved_as_each_by_itself(scheme: Scheme, ordered: bool) -> None:
    method = Gptq(GptqOptions(activation_order=ordered, refinements=1))
    given = [
        (random_weight(seed=seed), InputStatistics(tokens=300, gram=correlated_gram(seed=seed))) for seed in range(5)
    ]
    given[3] = (given[3][0], InputStatistics())
    together = method.quantize_alike(given, scheme, torch.float16)
    for (weight, statistics), found in zip(given, together, strict=True):
        alone = method.quantize(weight, statistics, scheme, torch.float16)
        assert torch.equal(found.weight.codes, alone.weight.codes)
        assert torch.equal(found.weight.scales, alone.weight.scales)
        torch.testing.assert_close(found.error, alone.error)


@pytest.mark.parametrize("ordered", [False, True])
def test_the_search_weighs_a_column_by_what_the_solver_cannot_make_up_for(ordered: bool) -> None:
    """By the mean of its input's strength and of what is left of it when the columns after it have explained it."""
    gram = correlated_gram().double()
    order = gram.diagonal().argsort(descending=True) if ordered else torch.arange(COLUMNS)
    curvature = Curvature.of(gram.float(), 1e-6, order if ordered else None)
    column = 40
    place = int((order == column).nonzero())
    after = order[place + 1 :]
    unexplained = gram[column, column] - gram[column, after] @ torch.linalg.solve(
        gram[after][:, after], gram[after, column]
    )
    expected = (unexplained * gram[column, column]).sqrt()
    torch.testing.assert_close(curvature.column_weights()[column].double(), expected, rtol=1e-2, atol=0)


def test_scales_searched_by_the_solvers_weights_leave_less_error() -> None:
    scheme = IntScheme(3, 32)
    lost = {"solver": 0.0, "inputs": 0.0}
    for seed in range(4):
        weight, gram = random_weight(rows=64, seed=seed), correlated_gram(seed=seed)
        for weights in lost:
            solution = solved(weight, gram, scheme, torch.float16, range_weights=weights, refinements=0, damping=0.03)
            lost[weights] += float(layer_error(weight, solution, gram).sum())
    assert lost["solver"] < 0.99 * lost["inputs"]


def test_zero_points_beside_the_best_range_are_tried() -> None:
    """A group whose best whole zero is not the one that its shrunk range rounds to."""
    scheme, weight = IntScheme(3, 32, symmetric=False), random_weight(rows=64)
    alone = search_grid(weight, None, scheme, torch.float32, 1)
    found = search_grid(weight, None, scheme, torch.float32, 12)
    low = torch.minimum(weight.view(64, -1, 32).amin(-1), torch.zeros(()))
    high = torch.maximum(weight.view(64, -1, 32).amax(-1), torch.zeros(()))
    proportional = (-low / ((high - low) / 7)).round()
    assert torch.equal(alone.zeros, proportional), "a single range is taken as it is"
    assert bool(((found.zeros - proportional).abs() >= 1).any())
    ours, theirs = (
        (weight - quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)).square().sum()
        for grid in (found, Grid(found.scales, proportional))
    )
    assert float(ours) < float(theirs)


def test_the_fewer_tokens_a_column_has_the_more_it_is_damped() -> None:
    """And what is asked for is taken."""
    assert damping_for(COLUMNS, COLUMNS) == 0.25
    assert damping_for(20 * COLUMNS, COLUMNS) == pytest.approx(0.1)
    assert damping_for(1000 * COLUMNS, COLUMNS) == 0.05
    weight, gram = random_weight(), correlated_gram()
    few, many = (
        Gptq(GptqOptions()).quantize(weight, InputStatistics(tokens, gram=gram), IntScheme(4, 32), torch.float16)
        for tokens in (COLUMNS, 1000 * COLUMNS)
    )
    asked = solved(weight, gram, IntScheme(4, 32), torch.float16, damping=0.05)
    assert torch.equal(asked.weight.codes, many.weight.codes)
    assert not torch.equal(asked.weight.codes, few.weight.codes)
