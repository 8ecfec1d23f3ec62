"""AWQ: less output error than rounding on inputs with outliers, and a model that computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Inputs, Walk, WalkSettings
from quantkit.errors import RecipeError
from quantkit.methods.base import InputStatistics, Method, Statistic
from quantkit.numerics.factor import Curvature
from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
from quantkit.numerics.smoothing import Strength, candidate, pooled, sampled, search_factors
from quantkit.recipe import VariantSpec
from quantkit.recipe.steps import steps_of
from quantkit.schemes import IntScheme, Mxfp4Scheme, Nf4Scheme, Scheme
from quantkit.transforms.awq import AwqFactors, AwqFactorsOptions
from quantkit.transforms.base import SegmentView, SmoothingPlace
from quantkit.transforms.channel_scales import ChannelScales
from tests.tiny import Collected, make_model, tiny_method, tiny_rows, tiny_steps, tiny_task

SCHEME = IntScheme(4, 32)


def outlier_inputs(columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Inputs of which a few channels are far stronger than the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(500, columns, generator=generator)
    inputs[:, ::9] *= 12
    return inputs


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(len(inputs), inputs.abs().mean(0), inputs.square().mean(0), inputs.T @ inputs / len(inputs))


def factors_of(
    weight: torch.Tensor, scheme: Scheme, known: InputStatistics, method: Method | None = None
) -> torch.Tensor | None:
    """AWQ's factors for one layer that alone reads the output of a norm; without a method for rounding to nearest."""
    place, method = SmoothingPlace(("layer",), "norm"), method or tiny_method("rtn")
    view = SegmentView("", [place], {"layer": scheme}, torch.float32, lambda _: weight, {"layer": known}, method)
    return AwqFactors(AwqFactorsOptions()).factors(view, place)


def output_error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - found).T).square().sum())


@pytest.mark.parametrize(
    ("scheme", "share"),
    [(SCHEME, 0.7), (IntScheme(3, 32, False), 0.7), (Nf4Scheme(32, False), 0.8), (Mxfp4Scheme(), 0.95)],
    ids=["int4", "int3", "nf4", "mxfp4"],
)
def test_scaling_lowers_the_output_error_of_rounding_on_inputs_with_outliers(scheme: Scheme, share: float) -> None:
    """Least where levels are floats, which keep small weights beside large ones precise already."""
    weight, inputs = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), outlier_inputs()
    awq, known = tiny_method("awq", clip=False), statistics_of(inputs)
    factors = factors_of(weight, scheme, known)
    assert factors is not None
    scaled = awq.quantize(weight * factors, known, scheme, torch.float32).weight.dequantize(torch.float32) / factors
    grid = range_grid(weight, scheme, torch.float32)
    plain = quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)
    assert output_error(weight, scaled, inputs) < share * output_error(weight, plain, inputs)


def test_clipping_lowers_the_output_error_more_than_a_search_that_knows_no_correlations() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 64, generator=generator)
    halves = [torch.randn(500, 4, generator=generator) @ torch.randn(4, 32, generator=generator) for _ in range(2)]
    inputs = torch.cat(halves, 1) + 0.3 * torch.randn(500, 64, generator=generator)
    known = statistics_of(inputs)
    errors = []
    for importance in (None, known.square_mean, known.gram):
        grid = search_grid(weight, importance, SCHEME, torch.float32, 24)
        found = quantized(encode(weight, grid, SCHEME), grid, SCHEME).dequantize(torch.float32)
        errors.append(output_error(weight, found, inputs))
    assert errors[2] < 0.95 * min(errors[:2])


def test_channels_that_must_share_a_factor_do() -> None:
    channels = torch.arange(32).repeat(2)
    place = SmoothingPlace(("layer",), "norm", channels=channels, width=32)
    weight, known = torch.randn(48, 64), statistics_of(outlier_inputs())
    method = tiny_method("rtn")
    view = SegmentView("", [place], {"layer": SCHEME}, torch.float32, lambda _: weight, {"layer": known}, method)
    factors = AwqFactors(AwqFactorsOptions()).factors(view, place)
    assert factors is not None
    assert torch.equal(factors[:32], factors[32:])
    assert torch.equal(pooled(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])), torch.tensor([2.0, 2.0, 5.0]))


def compensated_inputs() -> torch.Tensor:
    """Strong channels that say much the same, so that what one of them loses the others make up for, and weak ones."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(2000, 64, generator=generator)
    inputs[:, ::4] = 12 * torch.randn(2000, 1, generator=generator) + 0.3 * inputs[:, ::4]
    return inputs


def test_the_exponent_is_judged_by_the_method_that_follows() -> None:
    """Rounding loses by strong channels; GPTQ does not where they make up for each other, and by scaling them does."""
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    known, gptq = statistics_of(compensated_inputs()), tiny_method("gptq")
    errors = []
    for judge in (tiny_method("rtn"), gptq):
        factors = factors_of(weight, SCHEME, known, judge)
        factors = torch.ones(64) if factors is None else factors
        scaled = ChannelScales({"layer": factors}).statistics("layer", known)
        errors.append(float(gptq.quantize(weight * factors, scaled, SCHEME, torch.float32).error.sum()))
    assert errors[1] < 0.9 * errors[0]


def test_what_is_known_of_an_expert_without_tokens_follows_factors() -> None:
    """It is that of all experts of its layer, whose input is divided."""
    known = replace(statistics_of(outlier_inputs()), tokens=0)
    factors = torch.linspace(0.5, 2, 64)
    found = ChannelScales({"layer": factors}).statistics("layer", known)
    assert found.gram is not None
    assert known.gram is not None
    torch.testing.assert_close(found.gram, known.gram / factors.outer(factors))
    assert ChannelScales({"layer": factors}).statistics("layer", InputStatistics()).is_empty()


def test_awq_judges_factors_by_the_ranges_that_it_would_clip() -> None:
    weight, known = torch.randn(40, 64, generator=torch.Generator().manual_seed(6)), statistics_of(outlier_inputs())
    tried = [torch.ones(64), candidate(known.abs_mean, None, 0.4)]  # type: ignore[arg-type]  # it is there
    wanted = []
    for factors in tried:
        scaled = ChannelScales({"layer": factors}).statistics("layer", known)
        solved = tiny_method("awq", search=3).quantize(weight * factors, scaled, SCHEME, torch.float32)
        wanted.append(float(solved.error.sum()))
    found = tiny_method("awq").trial_errors(weight, known, SCHEME, torch.float32, tried)
    assert found.tolist() == pytest.approx(wanted, rel=1e-3)
    spanning = tiny_method("awq", clip=False).trial_errors(weight, known, SCHEME, torch.float32, tried)
    assert bool((spanning > 1.05 * found).all())


def test_what_a_column_costs_the_solver_follows_factors() -> None:
    """Whatever the order, it is the Schur complement of the columns that come later."""
    gram = statistics_of(compensated_inputs()).gram
    assert gram is not None
    for order in (True, False):
        place = gram.diagonal().argsort(descending=True, stable=True) if order else torch.arange(64)
        curvature = Curvature.of(gram, 1e-4, place if order else None)
        last, first = int(place[-1]), int(place[0])
        costs, damped = curvature.column_costs(), curvature.hessian.double()
        assert float(costs[last]) == pytest.approx(float(damped[last, last]), rel=1e-3)
        assert float(costs[first]) == pytest.approx(1 / float(damped.inverse()[first, first]), rel=1e-2)


def test_exponents_are_found_from_coarse_to_fine_and_the_mildest_wins_a_tie() -> None:
    strength, size = torch.rand(16) + 0.1, torch.rand(16) + 0.1
    asked: list[torch.Tensor] = []

    def nearest_to(wanted: torch.Tensor | None) -> torch.Tensor | None:
        asked.clear()

        def trial(factors: Sequence[torch.Tensor]) -> torch.Tensor:
            asked.extend(factors)
            if wanted is None:  # the differences of rounding on another machine
                return 1 + 1e-4 * torch.rand(len(factors))
            return torch.stack([(each / wanted).log().square().sum() for each in factors])

        return search_factors(trial, Strength(strength, size), 20)

    for of, step in ((size, 7), (size, 0), (None, 3), (None, 20)):
        wanted = candidate(strength, of, step / 20)
        found = nearest_to(wanted)
        assert found is not None
        assert torch.equal(found, wanted)
        assert len(asked) <= 14
    assert nearest_to(candidate(strength, None, 0.0)) is None
    assert nearest_to(None) is None


def test_rows_are_sampled_evenly_over_all_layers_of_an_input() -> None:
    rows = torch.arange(600.0).unsqueeze(1).expand(-1, 64)
    (sample,) = sampled([(rows[:100], SCHEME), (rows[100:101], SCHEME), (rows[101:], SCHEME)])
    assert (sample.stands_for, sample.weight[:, 0].tolist()) == (3, list(range(0, 600, 3)))
    parts = sampled([(rows[:400], SCHEME), (rows[400:], IntScheme(4, 64, False, axis=0))])
    assert [(len(each.weight), each.stands_for) for each in parts] == [(134, 3), (200, 1)]


def test_means_of_channels_do_not_depend_on_the_order_of_summation() -> None:
    """As a GPU's would, in which every run adds in another order."""
    draw = torch.Generator().manual_seed(3)
    values = torch.rand(96, generator=draw) * 10 ** torch.randint(-3, 8, (96,), generator=draw).float()
    channels = torch.arange(4).repeat(24)
    once = pooled(values, channels)
    for _ in range(20):
        order = torch.randperm(96, generator=draw)
        assert torch.equal(pooled(values[order], channels[order]), once[order])


def test_where_nothing_is_gained_nothing_is_scaled() -> None:
    """Weights on the grid already: any factor would only harm."""
    weight = torch.randint(-7, 8, (32, 64)).float()
    weight[:, ::32] = 7.5
    known = statistics_of(torch.randn(300, 64))
    assert factors_of(weight, SCHEME, known) is None


def test_candidates_are_positive_and_centred() -> None:
    for alpha in (0.0, 0.3, 1.0):
        factors = candidate(torch.rand(64) * 5, torch.rand(64), alpha)
        assert bool((factors > 0).all())
        assert float(factors.amax() * factors.amin()) == pytest.approx(1, rel=1e-4)
    assert torch.equal(candidate(torch.rand(8), None, 0.0), torch.ones(8))


def walked(folder: Path, method: str, inputs: Inputs, scheme: Scheme = SCHEME, skip: str = "nothing") -> Collected:
    skeleton, cpu = Skeleton(folder), torch.device("cpu")
    task, sink = tiny_task(skeleton, tiny_steps(method), scheme)
    task = replace(task, schemes={name: each for name, each in task.schemes.items() if skip not in name})
    batches = make_batches(tiny_rows(), cpu, may_pad=True)
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(cpu, inputs=inputs)).run()
    return sink


@pytest.mark.parametrize("inputs", ["float", "quantized"])
@pytest.mark.parametrize(("family", "skip"), [("llama", "nothing"), ("qwen2", "v_proj"), ("gemma", "up_proj")])
def test_the_factors_leave_the_model_as_it_was(tmp_path: Path, inputs: Inputs, family: str, skip: str) -> None:
    """At 8 bits rounding hardly shows: what differs from the float model would be a factor that went astray."""
    folder = make_model(tmp_path, family, shards=2)
    with torch.no_grad():  # outliers, so that there is something to scale
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::7] += 8.0
        model.save_pretrained(folder)
    sink = walked(folder, "awq", inputs, IntScheme(8, 32), skip)
    assert any(name.endswith("input_layernorm.weight") for name in sink.replaced)
    if skip != "nothing":
        assert any(name.endswith(f"{skip}.weight") for name in sink.replaced), "a float layer must be scaled too"
    tokens = torch.tensor([tiny_rows()[0]])
    with torch.no_grad():
        before = model(tokens).logits.log_softmax(-1)
        parameters = dict(model.named_parameters())
        for name, result in sink.results.items():
            parameters[f"{name}.weight"].data = result.weight.dequantize(torch.float32)
        for name, tensor in sink.replaced.items():
            assert not torch.equal(parameters[name], tensor)
            parameters[name].data = tensor
        after = model(tokens).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)
    assert float(divergence.mean()) < 2e-3


def test_a_float_tensor_that_no_factor_touches_is_not_replaced(tmp_path: Path) -> None:
    sink = walked(make_model(tmp_path, "qwen2"), "awq", "float")
    allowed = ("layernorm.weight", "v_proj.bias")
    assert all(name.endswith(allowed) for name in sink.replaced)


def test_a_method_behind_a_transform_takes_the_options_of_both_and_asks_for_what_both_need() -> None:
    found = VariantSpec.model_validate({"name": "v", "method": "awq+gptq", "alphas": 5, "damping": 0.1})
    assert found.needs() == {Statistic.ABS_MEAN, Statistic.GRAM, Statistic.SAMPLE}
    options = found.method_options().model_dump()
    assert (options["alphas"], options["damping"]) == (5, 0.1)
    assert "clip" not in options, "the method chooses the ranges"
    (awq,), gptq = found.build_transforms(), found.build_method()
    assert (awq.options.model_dump()["alphas"], gptq.name) == (5, "gptq")
    assert set(awq.options.model_dump()) & set(gptq.options.model_dump()) == set()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptq+awq", r"gptq chooses codes, .* \(put a transform there: .*awq"),
        ("awq+awq", r"awq brings the transform awq itself \(write awq\)"),
        ("awq+nothing", "unknown method 'nothing'"),
        ("aqw+gptq", r"unknown transform 'aqw' \(did you mean 'awq'"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        steps_of(name)


@pytest.mark.parametrize(
    "scheme",
    [IntScheme(4, 64, False, axis=0), IntScheme(3, 64, False, "float"), Nf4Scheme()],
    ids=lambda s: s.describe(),
)
def test_factors_are_found_for_schemes_whose_scales_reach_over_rows(scheme: Scheme) -> None:
    weight = torch.randn(700, 64, generator=torch.Generator().manual_seed(3))
    known = statistics_of(outlier_inputs())
    assert factors_of(weight, scheme, known) is not None
