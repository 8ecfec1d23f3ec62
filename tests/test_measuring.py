"""What each choice costs each layer, told by rows that no statistics have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.allocation import measuring
from quantkit.allocation.measuring import held_out_rows, measured
from quantkit.allocation.table import Unit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.fisher import Fisher, FisherSweep
from quantkit.engine.routing import ExpertSettings
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.solver import Solver
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics
from quantkit.quantization import Job
from quantkit.quantization.job import Known
from quantkit.quantization.sensitivity import load
from quantkit.recipe.mixing import AutoSpec
from quantkit.schemes import make_scheme
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.test_rotate import with_norms
from tests.tiny import make_model, tiny_rows

CPU = torch.device("cpu")
ROWS = tiny_rows(8, 8, 16)
DOWN = "model.layers.1.mlp.down_proj"
ATTENTION = tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


def a_job(folder: Path, rows: list[list[int]] = ROWS, **changes: Any) -> Job:
    return Job(folder, {"model": str(folder)}, "float32", rows, "rows", device="cpu", **changes)


def a_spec(**keys: Any) -> AutoSpec:
    given = {"name": "mix", "bits": "auto", "budget": 4.0, "method": "rtn", "group_size": 32}
    return parse_section(AutoSpec, {**given, "choices": ["int2", "int4", "int8", "float"], **keys}, "variant")


def a_unit(*layers: str, choices: tuple[str, ...] = ("int2", "int4", "int8", "float")) -> Unit:
    return Unit(layers, 1, {}, dict.fromkeys(choices, 1))


UNITS = [a_unit(*ATTENTION), a_unit(DOWN)]


def costs_of(job: Job, spec: AutoSpec, out: Path, units: list[Unit] = UNITS) -> list[Unit]:
    return measured(job, spec, units, out, on_segment=lambda _done, _total: None, on_note=lambda _text: None)


def test_costs_are_the_gradients_times_the_errors_of_rows_that_are_held_out(llama: Path, tmp_path: Path) -> None:
    """Against transformers' own activations, for plain rounding, which nothing is fitted for."""
    job = a_job(llama)
    (_, unit) = costs_of(job, a_spec(), tmp_path / "costs")
    seen = [ROWS[place] for place in held_out_rows(job, calibrates=False)]
    moments = FisherSweep(
        Skeleton(llama), CheckpointReader(llama), make_batches(seen, CPU, may_pad=True), CPU, torch.float32
    ).run()
    model = AutoModelForCausalLM.from_pretrained(llama)
    layer = model.get_submodule(DOWN)
    weight = layer.weight.detach()
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _module, given: inputs.append(given[0][0].detach()))
    for row in seen:
        model(input_ids=torch.tensor([row]))
    scheme: Any = make_scheme("int", {"bits": 2, "group_size": 32})
    rounded = a_spec().uniform("int2").build_method().quantize(weight, InputStatistics(), scheme, torch.float32)
    missing = weight - rounded.weight.dequantize(torch.float32)
    layer_moments = moments.layers[DOWN]
    assert layer_moments.tokens is not None
    weights = layer_moments.tokens / layer_moments.tokens.mean()
    error = (weights[:, None] * (torch.cat(inputs) @ missing.T).square()).mean(0)
    assert unit.costs["int2"] == pytest.approx(float((layer_moments.rows * error).sum() / 2), rel=1e-3)
    assert unit.costs["float"] == 0


def test_more_bits_cost_less_and_fitted_codes_are_judged_by_rows_that_they_did_not_see(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    solve = Solver.solve

    def told(self: Solver, segment: Any, groups: Any, *rest: Any, **more: Any) -> None:
        tokens.extend(found.tokens for _, found in groups)
        solve(self, segment, groups, *rest, **more)

    monkeypatch.setattr(Solver, "solve", told)
    job = a_job(llama)
    found = costs_of(job, a_spec(method="gptq"), tmp_path / "costs")
    for unit in found:
        assert unit.costs["int2"] > unit.costs["int4"] > unit.costs["int8"] > unit.costs["float"] == 0
    held = held_out_rows(job, calibrates=True)
    assert held == [3, 7]
    assert set(tokens) == {sum(len(row) for place, row in enumerate(ROWS) if place not in held)}


def test_a_choice_that_suits_no_layer_is_not_solved(llama: Path, tmp_path: Path) -> None:
    spec = a_spec(format="gguf", choices=["q4_k", "iq4_nl", "q8_0"], group_size=None)
    (unit,) = costs_of(a_job(llama), spec, tmp_path / "costs", [a_unit(DOWN, choices=("iq4_nl", "q8_0"))])
    assert unit.costs["iq4_nl"] > unit.costs["q8_0"] > 0


def test_a_budget_and_a_name_change_nothing_and_another_method_does(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = a_job(llama), tmp_path / "costs"
    first = costs_of(job, a_spec(), out)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "Walk", lambda *_: pytest.fail("it was there"))
        assert costs_of(job, a_spec(name="other", budget=3.0), out) == first
        with pytest.raises(pytest.fail.Exception):
            costs_of(job, a_spec(method="hqq"), out)


def test_a_run_that_was_cut_short_goes_on(llama: Path, tmp_path: Path) -> None:
    job, spec = a_job(llama), a_spec(method="gptq")
    wanted = costs_of(job, spec, tmp_path / "whole")
    walked: list[int] = []

    def stopping(at: int) -> Callable[[int, int], None]:
        def done(segments: int, total: int) -> None:
            if total == 2:  # of the walk, not of the sensitivity, which counts forward and backward
                walked.append(segments)
                if segments == at:
                    raise KeyboardInterrupt

        return done

    with pytest.raises(KeyboardInterrupt):
        measured(job, spec, UNITS, tmp_path / "cut", on_segment=stopping(1), on_note=lambda _text: None)
    assert not (tmp_path / "cut").exists()
    assert measured(job, spec, UNITS, tmp_path / "cut", on_segment=stopping(0), on_note=lambda _text: None) == wanted
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == []


def test_scaled_inputs_and_experts_are_judged_as_they_are_stored(llama: Path, tmp_path: Path) -> None:
    scaled = costs_of(a_job(llama), a_spec(method="awq"), tmp_path / "awq")
    plain = costs_of(a_job(llama), a_spec(range="search"), tmp_path / "plain")
    for one, other in zip(scaled, plain, strict=True):
        assert 0.2 < one.costs["int4"] / other.costs["int4"] < 2
    make(tmp_path / "mixtral", "mixtral")
    stack = "model.layers.0.block_sparse_moe.experts"
    unit = a_unit(*(f"{stack}.{index}.{leaf}" for index in range(4) for leaf in ("w1", "w2", "w3")))
    (found,) = costs_of(a_job(tmp_path / "mixtral"), a_spec(method="gptq"), tmp_path / "costs", [unit])
    assert found.costs["int2"] > found.costs["int4"] > found.costs["int8"] > 0


def test_an_embedding_is_judged_by_the_tokens_that_look_rows_up(tmp_path: Path) -> None:
    """Gemma multiplies the rows that are looked up, which gradients at its outputs do not tell."""
    make(tmp_path / "gemma", "gemma2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")
    batches = make_batches(ROWS, CPU, may_pad=False)
    skeleton = Skeleton(tmp_path / "gemma")
    moments = FisherSweep(skeleton, CheckpointReader(tmp_path / "gemma"), batches, CPU, torch.float32).run()
    embedding = model.get_input_embeddings()
    assert skeleton.embedding is not None
    name = skeleton.embedding.linears[0]
    draws = torch.rand(sum(map(len, ROWS)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, total = 0, torch.zeros(embedding.weight.shape[1])
    for row in ROWS:
        rows = embedding.weight[torch.tensor(row)].detach().requires_grad_()
        scaled = rows * embedding.embed_scale
        said = model(inputs_embeds=scaled[None]).logits[0].log_softmax(-1)
        below = said.detach().double().exp().cumsum(-1)
        labels = torch.searchsorted(below, draws[at : at + len(row), None] * below[:, -1:])
        (gradient,) = torch.autograd.grad(-said.gather(1, labels).sum(), rows)
        total += gradient.square().sum(0)
        at += len(row)
    torch.testing.assert_close(moments.layers[name].rows, total / at, rtol=2e-3, atol=1e-9)


def test_rows_are_held_out_as_far_as_there_are_some(llama: Path, tmp_path: Path) -> None:
    job = a_job(llama)
    for count, method, warned in ((1, "gptq", True), (2, "gptq", False), (1, "rtn", False)):
        notes: list[str] = []
        few, out = replace(job, rows=ROWS[:count]), tmp_path / f"{method}-{count}"
        measured(few, a_spec(method=method), UNITS, out, on_segment=lambda _done, _total: None, on_note=notes.append)
        assert (measuring.ONE_ROW in notes) == warned
    assert held_out_rows(replace(job, rows=ROWS[:1]), calibrates=True) == [0]
    assert held_out_rows(replace(job, rows=ROWS[:3]), calibrates=True) == [2]
    assert len(held_out_rows(job, calibrates=False)) == len(ROWS)
    many = replace(job, rows=[[1] * 4096] * 40)
    assert held_out_rows(many, calibrates=True) == [3, 7]
    with pytest.raises(QuantizationError, match="needs calibration rows"):
        costs_of(replace(job, rows=[]), a_spec(), llama / "costs")


def test_choices_of_layers_that_were_left_out_before_are_measured_and_what_judges_counts(
    llama: Path, tmp_path: Path
) -> None:
    """Named choices are tried on layers on which usual ones of the same names are not."""
    job, spec, out = a_job(llama), a_spec(), tmp_path / "costs"
    costs_of(job, spec, out, [a_unit(DOWN, choices=("int4", "int8"))])
    (unit,) = costs_of(job, spec, out, [a_unit(DOWN)])
    assert unit.costs["int2"] > unit.costs["int4"] > 0
    asked = measuring._asked_for(job, spec, ["int2"], UNITS)
    for other in (a_job(llama, experts=ExpertSettings(tokens="all")), replace(job, calibration_sha256="others")):
        assert measuring._asked_for(other, spec, ["int2"], UNITS) != asked
    known = replace(job, sensitivity=Known(out, "mark", 0.5), inputs="float", generated=64)
    assert measuring._asked_for(known, spec, ["int2"], UNITS) == asked


def test_a_layer_that_no_gradient_reaches_costs_as_much_as_its_kind(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, odd = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    units, lost = [a_unit(DOWN), a_unit(other), a_unit(odd), a_unit(*ATTENTION)], {DOWN, odd, ATTENTION[0]}
    whole = load

    def partly(folder: Path) -> Fisher:
        found = whole(folder)
        return replace(found, layers={name: each for name, each in found.layers.items() if name not in lost})

    monkeypatch.setattr(measuring, "load", partly)
    down, known, alone, tied = costs_of(a_job(llama), a_spec(), tmp_path / "costs", units)
    assert known.costs["int2"] > known.costs["int4"] > 0
    assert down.costs == known.costs
    others = tied.costs["int2"] * 2 / 3
    assert alone.costs["int2"] == pytest.approx((known.costs["int2"] + others) / 3)
    assert alone.costs["float"] == 0
    lost |= {other, *ATTENTION}
    with pytest.raises(QuantizationError, match="nothing is known of what int2 costs any layer"):
        costs_of(a_job(llama), a_spec(), tmp_path / "none", units)


def test_behind_a_rotation_errors_are_told_by_turned_inputs(tmp_path: Path) -> None:
    """Also of a method that is not calibrated, and of the embedding, whose rows are turned."""
    job, spec = a_job(with_norms(make_model(tmp_path / "model"))), a_spec(choices=["int4", "int8"])
    units = [a_unit(*ATTENTION, choices=("int4", "int8"))]
    (plain,) = costs_of(job, spec, tmp_path / "plain", units)
    (turned,) = costs_of(job, a_spec(choices=["int4", "int8"], transforms=["rotate"]), tmp_path / "turned", units)
    assert turned.costs["int8"] == pytest.approx(plain.costs["int8"], rel=0.3)
    embedding = [a_unit("model.embed_tokens", choices=("q4_0", "q8_0"))]
    keys: dict[str, Any] = {"format": "gguf", "choices": ["q4_0", "q8_0"], "group_size": None}
    (plain,) = costs_of(job, a_spec(**keys), tmp_path / "rows", embedding)
    (turned,) = costs_of(job, a_spec(**keys, transforms=["rotate"]), tmp_path / "turned-rows", embedding)
    assert turned.costs == {name: pytest.approx(cost, rel=0.5) for name, cost in plain.costs.items()}
