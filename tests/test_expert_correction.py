"""Experts make up for what their inputs lost, on the tokens that the float model's router gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.engine import batches as batches_module
from quantkit.engine import solve as solve_module
from quantkit.engine import steps as steps_module
from quantkit.engine import twins as twins_module
from quantkit.engine.batches import Batch
from quantkit.engine.experts import replayed_layers
from quantkit.engine.mismatch import MOST_HELD, MismatchGatherer
from quantkit.engine.routing import ExpertSettings, Routes, now_given, way_of
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.stacks import InputGroup
from quantkit.engine.statistics import Gatherer, Pool
from quantkit.engine.tasks import VariantTask
from quantkit.engine.twins import Twins
from quantkit.estimation import estimate, quantizing
from quantkit.estimation.lines import Line, Part
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.numerics.mismatch import Mismatch, corrected
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.schemes import IntScheme
from tests.architectures import make
from tests.test_experts import same_codes, solved
from tests.test_resume import cut_after, digests
from tests.test_walk import RoutedModel, routed_rows, write_routed
from tests.tiny import Collected, tiny_method, tiny_rows

ROWS = tiny_rows(64)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make(folder, "mixtral")
    return folder


def corrections(found: Collected) -> list[float | None]:
    """Of the experts."""
    return [each.correction for each in found.results.values() if each.experts]


@pytest.fixture(scope="module")
def whole(mixtral: Path) -> Collected:
    found = solved(mixtral, ROWS, tiny_method(), may_pad=True)
    assert any(corrections(found))
    return found


# The way of an earlier run


def test_a_run_is_sent_the_way_of_an_earlier_run_of_its_batch() -> None:
    routes, stack = Routes(), object()
    batch, other = (Batch(torch.zeros(1, 3, dtype=torch.int64), None) for _ in range(2))
    known = [(torch.tensor([[number, 1]] * 3), torch.rand(3, 2)) for number in range(2)]
    own = torch.tensor([[3, 2]] * 3), torch.rand(3, 2)
    with routes.recording(batch):
        assert [way_of(stack, *each) for each in known] == [(each, False) for each in known]
    with routes.replaying(batch):
        assert [way_of(stack, *own) for _ in range(3)] == [(known[0], True), (known[1], True), (own, False)]
        assert way_of(object(), *own) == (own, False)
    with routes.replaying(other):
        assert way_of(stack, *own) == (own, False)
    assert way_of(stack, *own) == (own, False)


Given = dict[tuple[str, int], torch.Tensor]


def test_experts_are_given_the_tokens_that_the_float_models_router_gives_them(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats: Given = {}
    quantized: Given = {}
    see, add = MismatchGatherer.see, Gatherer.add

    def note(known: Given, name: str, batch: Batch) -> None:
        given = now_given(batch.token_ids.numel())
        if given is not None:
            known[name, batch.rows[0]] = given.positions

    def seen(self: MismatchGatherer, values: torch.Tensor, batch: Batch) -> None:
        note(floats, self.name, batch)
        see(self, values, batch)

    def added(self: Gatherer, inputs: torch.Tensor, batch: Batch) -> None:
        note(quantized, self._name, batch)
        add(self, inputs, batch)

    monkeypatch.setattr(MismatchGatherer, "see", seen)
    monkeypatch.setattr(Gatherer, "add", added)
    solved(mixtral, ROWS, tiny_method(), may_pad=True)
    assert 0 < len(floats) < len(quantized), "some batches have no twin"
    assert all(torch.equal(quantized[key], positions) for key, positions in floats.items())
    quantized.clear()
    solved(mixtral, ROWS, tiny_method(correction=False), may_pad=True)
    own = [torch.equal(quantized[key], each) for key, each in floats.items() if key in quantized]
    assert not all(own), "the quantized model's own router sends some elsewhere"


def test_only_stacks_that_are_told_the_routers_choice_can_be_sent_another_way(tmp_path: Path) -> None:
    for name, wanted in (("mixtral", 24), ("dbrx", 24), ("longcat_flash", None), ("llama4_text", 0), ("jetmoe", 0)):
        make(tmp_path / name, name)
        segments = Skeleton(tmp_path / name).segments
        found = sum(len(replayed_layers(segment.module)) for segment in segments)
        assert found == wanted if wanted is not None else found > 0


# What it is worth


def put(model: Any, found: Collected) -> Any:
    """A Mixtral of transformers with solved weights."""
    for name, result in found.results.items():
        weight = result.weight.dequantize(torch.float32)
        block, _, rest = name.partition(".block_sparse_moe.experts.")
        if not rest:
            model.get_submodule(name).weight.data = weight
            continue
        number, leaf = rest.split(".")
        stack = model.get_submodule(f"{block}.mlp.experts")
        gate, up = stack.gate_up_proj.data[int(number)].chunk(2)
        {"w1": gate, "w3": up, "w2": stack.down_proj.data[int(number)]}[leaf].copy_(weight)
    return model


def lost(folder: Path, found: Collected) -> float:
    """What the last hidden states differ by from the float model's, on other tokens."""
    exact, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    put(other, found)
    total = 0.0
    with torch.no_grad():
        for row in tiny_rows(16, seed=1):
            first, second = (each.model(torch.tensor([row])).last_hidden_state for each in (exact, other))
            total += float((first - second).square().mean())
    return total


def test_corrected_experts_come_closer_to_the_float_model_on_other_tokens(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins_module, "EVERY", 1)
    rows = tiny_rows(192, seed=2)
    corrected = solved(mixtral, rows, tiny_method(damping=0.03), may_pad=True)
    assert all(each is not None and 0 <= each <= 1 for each in corrections(corrected))
    monkeypatch.setattr(Twins, "prepare_experts", lambda *_: None)
    plain = solved(mixtral, rows, tiny_method(damping=0.03), may_pad=True)
    assert set(corrections(plain)) == {None}
    assert any(each.correction for each in plain.results.values()), "the other layers are corrected in both"
    assert lost(mixtral, corrected) < 0.98 * lost(mixtral, plain)


def test_an_expert_makes_up_for_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of statistics that are half others' tokens, which lost nothing, it makes up for half of what its own lost."""
    torch.manual_seed(0)
    weight, inputs, missing = torch.randn(32, 32), torch.randn(2000, 32), torch.randn(32, 32) / 10
    others = torch.randn(2000, 32)
    gram, lost = (inputs.T @ inputs + others.T @ others) / 4000, inputs @ missing
    mismatch = Mismatch(inputs[500:].T @ lost[500:] / 1500, inputs[:500], lost[:500], None, 0.25, knows_outputs=False)
    found: list[torch.Tensor] = []

    def kept(*given: Any) -> tuple[torch.Tensor, tuple[float, ...]]:
        found.append(corrected(*given)[0])
        return found[-1], (1.0,)

    monkeypatch.setattr(solve_module, "corrected", kept)
    task = VariantTask("variant", tiny_method(), {"layer": IntScheme(4, 32, True)}, torch.float16, Collected())
    statistics = InputStatistics(2000, None, None, gram, mismatch=mismatch, own=0.5)
    solve_module.solve_groups(task, [InputGroup({"layer": weight}, statistics, "experts")])
    wanted = weight @ missing.T / 2
    assert (found[0] - weight - wanted).norm() < 0.3 * wanted.norm()


def test_the_share_of_an_experts_own_tokens_is_told() -> None:
    parts = [Gatherer({Statistic.GRAM}) for _ in range(3)]
    for part, tokens in zip(parts, (30, 6), strict=False):
        part.add(torch.randn(tokens, 8), Batch(torch.zeros(1, tokens, dtype=torch.int64), None))
    pool = Pool()
    for part in parts:
        pool.add(part)
    assert [pool.blended(part, 0.5).own for part in parts] == [30 / 34, 6 / 10, 0.0]


# When and how


def test_an_expert_that_saw_few_tokens_is_left_as_it_is(mixtral: Path) -> None:
    found = solved(mixtral, tiny_rows(8), tiny_method(), may_pad=True)
    assert set(corrections(found)) == {None}
    assert any(each.correction is not None for each in found.results.values())


def test_without_correction_nothing_is_replayed(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Routes, "replaying", lambda *_: pytest.fail("replayed"))
    monkeypatch.setattr(Routes, "recording", lambda *_: pytest.fail("recorded"))
    for settings in ({"inputs": "float"}, {}):
        found = solved(mixtral, ROWS[:8], tiny_method(correction=bool(settings)), may_pad=True, **settings)
        assert set(corrections(found)) == {None}


def test_neither_strategy_nor_room_changes_a_byte(
    mixtral: Path, whole: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_codes(solved(mixtral, ROWS, tiny_method(), may_pad=True, strategy="recompute"), whole)
    monkeypatch.setitem(steps_module.BATCH_WEIGHTS, "cpu", 1)
    found = solved(mixtral, ROWS, tiny_method(), may_pad=True, room=1)
    same_codes(found, whole)
    assert corrections(found) == corrections(whole)


def test_the_sums_of_few_experts_are_alive_at_a_time(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps_module.BATCH_WEIGHTS, "cpu", 1)
    add, most, known = MismatchGatherer.add, 0, set()

    def counted(self: MismatchGatherer, inputs: torch.Tensor, batch: Batch) -> None:
        nonlocal most
        add(self, inputs, batch)
        if self.is_expert:
            known.add(self.name)
            alive[self.name] = self
            most = max(most, sum(each._sum is not None for each in alive.values()))

    alive: dict[str, MismatchGatherer] = {}
    monkeypatch.setattr(MismatchGatherer, "add", counted)
    solved(mixtral, ROWS, tiny_method(), may_pad=True, room=2 * 4 * (2 * 64**2 + 64 * 128))
    assert len(known) == 16
    assert most == 2


def test_experts_that_are_shown_all_tokens_are_compared_on_their_own(mixtral: Path, whole: Collected) -> None:
    found = solved(mixtral, ROWS, tiny_method(), may_pad=True, experts=ExpertSettings("all"))
    assert any(corrections(found))
    assert [each.tokens for name, each in found.results.items() if "layers.0" in name and each.experts] == [
        each.tokens for name, each in whole.results.items() if "layers.0" in name and each.experts
    ]


def test_experts_of_a_models_own_code_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_routed(tmp_path, RoutedModel(), monkeypatch)
    found = solved(tmp_path, routed_rows([(30, [0, 1, 2, 3])] * 6), tiny_method())
    assert set(corrections(found)) == {None}


def test_a_mixture_goes_on_where_it_was_cut_short(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(batches_module.BATCH_TOKENS, "cpu", 512)
    job = Job(mixtral, {"reference": "tiny"}, "float32", ROWS, "0" * 64, device="cpu", inputs="quantized")
    spec = VariantSpec.model_validate({"name": "v", "method": "gptq", "group_size": 32})
    quantize(job, spec, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(job, spec, tmp_path / "cut", on_segment=cut_after(1))
    done = quantize(job, spec, tmp_path / "cut")
    assert done.facts["resumed"] == 1
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    (note,) = (each for each in done.facts["notes"] if each.startswith("correction: "))
    assert "as they are" not in note


def test_estimates_count_what_the_inputs_of_experts_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an expert's last projection in Mixtral 8x7B: sums, tokens that are held out, and its own Gram matrix."""
    known: list[Line] = []
    part = quantizing._part

    def seen(run: Any, when: str, lines: list[Line]) -> Part:
        known.extend(line for line in lines if line.name == "what inputs lost")
        return part(run, when, lines)

    monkeypatch.setattr(quantizing, "_part", seen)
    estimate("mixtral-8x7b", method="gptq")
    hidden, columns = 4096, 14336
    held = min(columns // 4, MOST_HELD)
    wanted = 4 * (columns * hidden + held * (columns + hidden) + columns**2)
    assert wanted in [line.nbytes for line in known]
