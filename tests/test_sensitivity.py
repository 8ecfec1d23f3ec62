"""What tokens and rows matter: second moments of gradients, the stage that has them, and what is done with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import Batch, make_batches, row_starts
from quantkit.engine.fisher import Fisher, FisherSweep, LayerFisher
from quantkit.engine.kept_calls import OnDisk
from quantkit.engine.sensitivity import Sensitivity, tempered
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError, QuantkitError
from quantkit.inspection import inspect_tables
from quantkit.quantization import Job, quantize
from quantkit.quantization import sensitivity as stage
from quantkit.quantization.job import Known
from quantkit.quantization.sensitivity import sensitivity
from quantkit.recipe import CalibrationSpec, VariantSpec
from quantkit.system.memory_bounds import MemoryBounds
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.tiny import make_model, tiny_rows

CPU = torch.device("cpu")
EMBEDDING = "model.embed_tokens"
ROWS = tiny_rows(4, 8, 16)
TOKENS = sum(map(len, ROWS))


def swept(folder: Path, batches: list[Batch], **settings: Any) -> Fisher:
    return FisherSweep(Skeleton(folder), CheckpointReader(folder), batches, CPU, torch.float32, **settings).run()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


def a_job(folder: Path, rows: list[list[int]] = ROWS, **changes: Any) -> Job:
    return Job(folder, {"model": str(folder)}, "float32", rows, "rows", device="cpu", **changes)


def known_of(job: Job, out: Path, notes: list[str] | None = None) -> Known:
    told = [] if notes is None else notes
    return sensitivity(job, out, on_segment=lambda _done, _total: None, on_note=told.append)


def test_moments_are_those_of_gradients(llama: Path) -> None:
    """Against the gradients of transformers, with the labels that the sweep drew."""
    from transformers import AutoModelForCausalLM

    batches = make_batches(ROWS, CPU, may_pad=True)
    found = swept(llama, batches)
    model = AutoModelForCausalLM.from_pretrained(llama)
    draws = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    name, total, at = "model.layers.0.mlp.up_proj", torch.zeros(128), 0
    moments, losses = [], 0.0
    for row in ROWS:
        kept: list[torch.Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        said = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        hook.remove()
        below = said.detach().double().exp().cumsum(-1)
        labels = torch.searchsorted(below, draws[at : at + len(row), None] * below[:, -1:])
        loss = -said.gather(1, labels).sum()
        (gradient,) = torch.autograd.grad(loss, kept[0])
        moments.append(gradient[0].square().mean(1))
        total += gradient[0].square().sum(0)
        losses += float(loss.detach())
        at += len(row)
    layer = found.layers[name]
    assert layer.tokens is not None
    assert layer.places is None
    torch.testing.assert_close(layer.tokens, torch.cat(moments), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(layer.rows, total / TOKENS, rtol=1e-3, atol=1e-9)
    assert found.loss == pytest.approx(losses / TOKENS, rel=1e-5)
    assert set(found.layers) == {EMBEDDING, *Skeleton(llama).all_linears()}


def test_neither_batches_nor_where_inputs_wait_matter(llama: Path, tmp_path: Path) -> None:
    wanted = swept(llama, make_batches(ROWS, CPU, may_pad=True))
    one_by_one = swept(llama, make_batches(ROWS, CPU, may_pad=False, limit=1), keep=OnDisk(tmp_path))
    for name, layer in wanted.layers.items():
        assert layer.tokens is not None
        torch.testing.assert_close(one_by_one.layers[name].tokens, layer.tokens, rtol=1e-3, atol=1e-9)
    assert not torch.equal(swept(llama, make_batches(ROWS, CPU, may_pad=True), seed=1).layers[name].rows, layer.rows)


def test_experts_have_the_moments_of_their_tokens(tmp_path: Path) -> None:
    make(tmp_path, "mixtral")
    rows = [row[:8] for row in ROWS]
    found = swept(tmp_path, make_batches(rows, CPU, may_pad=False))
    own = [found.layers[f"model.layers.0.block_sparse_moe.experts.{index}.w2"] for index in range(4)]
    assert sum(each.seen for each in own) == 2 * 32  # each token goes to two experts
    for each in own:
        assert each.tokens is not None
        assert each.places is None or len(each.places) == each.seen == len(each.tokens)


def test_errors_cost_what_is_predicted(llama: Path) -> None:
    """Small errors of one layer's outputs raise the divergence by about the predicted nats."""
    from transformers import AutoModelForCausalLM

    rows = tiny_rows(48, 24, 24)
    batches = make_batches(rows, CPU, may_pad=True)
    known = Sensitivity(swept(llama, batches), *row_starts(batches))
    model, name = AutoModelForCausalLM.from_pretrained(llama), "model.layers.1.mlp.down_proj"
    ids = torch.tensor(rows)
    noise = 0.02 * torch.randn(*ids.shape, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.log_softmax(-1)
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out: out + noise)
        found = model(input_ids=ids).logits.log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    predicted = known.nats(name, noise.square().mean((0, 1)))
    assert predicted is not None
    assert float(predicted) == pytest.approx(divergence, rel=0.2)


def test_weights_are_tempered_clipped_and_of_mean_one() -> None:
    moments = torch.ones(2000)
    moments[0], moments[1] = 1e6, 0.0
    weights = tempered(moments, 0.5)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights.max()) < 2
    assert float(weights[1]) == 0
    spread = torch.arange(1.0, 1001.0)
    assert float(tempered(spread, 0.5)[399] / tempered(spread, 0.5)[99]) == pytest.approx(2.0)


def test_rows_that_were_added_count_as_the_mean() -> None:
    layer = LayerFisher(torch.ones(2), 4, torch.tensor([1.0, 1.0, 4.0, 4.0]))
    batches = make_batches([[1, 2], [3, 4], [5, 6]], CPU, may_pad=False)
    weights = Sensitivity(Fisher({"a": layer}, 0.0, 4), *row_starts(batches), 0.5).weights(["a", "b"])
    assert weights is not None
    torch.testing.assert_close(weights.values, torch.tensor([2 / 3, 2 / 3, 4 / 3, 4 / 3, 1, 1]))
    assert Sensitivity(Fisher({"a": layer}, 0.0, 4), *row_starts(batches)).weights(["a"]) is None


def test_the_stage_is_reused_and_made_anew_for_other_rows(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(llama)
    known = known_of(job, tmp_path / "known")
    before = (tmp_path / "known" / stage.TENSORS).read_bytes()
    layers = json.loads((tmp_path / "known" / stage.FACTS).read_text())["layers"]
    assert set(layers) == {EMBEDDING, *Skeleton(llama).all_linears()}
    monkeypatch.setattr(stage, "free_bytes", lambda *_: 0)  # inputs wait on disk
    with monkeypatch.context() as patch:
        patch.setattr(FisherSweep, "run", lambda _self: pytest.fail("it was there"))
        assert known_of(job, tmp_path / "known") == known
    notes: list[str] = []
    again = known_of(a_job(llama), tmp_path / "again", notes)
    assert again.fingerprint == known.fingerprint
    assert (tmp_path / "again" / stage.TENSORS).read_bytes() == before
    assert any("wait in" in note for note in notes)
    assert not (tmp_path / "again" / "inputs").exists()
    disk = tmp_path / "disk" / "scratch"
    notes.clear()
    known_of(replace(a_job(llama), bounds=MemoryBounds({}, disk)), tmp_path / "on disk", notes)
    assert (tmp_path / "on disk" / stage.TENSORS).read_bytes() == before
    assert any(note.endswith(f"wait in {disk}") for note in notes)
    assert not any(disk.iterdir())
    assert known_of(replace(job, calibration_sha256="other"), tmp_path / "known").fingerprint != known.fingerprint
    (tmp_path / "known" / stage.TENSORS).write_bytes(b"")
    with pytest.raises(QuantizationError, match="not a whole stage"):
        stage.load(tmp_path / "known")


def test_variants_weigh_tokens_and_tell_what_errors_cost(llama: Path, tmp_path: Path) -> None:
    job = a_job(llama, tiny_rows(8, 32, 32))
    variant = parse_section(VariantSpec, {"name": "v", "method": "gptq", "bits": 3, "group_size": 32}, "variant")
    known = known_of(job, tmp_path / "known")
    plain, told, weighed = (
        quantize(replace(job, sensitivity=each), variant, tmp_path / name)
        for name, each in {"plain": None, "told": known, "weighed": replace(known, token_weights=0.5)}.items()
    )
    assert not any("nats" in layer or "effective_tokens" in layer for layer in plain.facts["layers"])
    codes = [(each.folder / "model.safetensors").read_bytes() for each in (plain, told, weighed)]
    assert codes[0] == codes[1] != codes[2]
    assert all(layer["nats"] > 0 and "effective_tokens" not in layer for layer in told.facts["layers"])
    assert any(note.startswith("sensitivity: errors of layers are predicted") for note in told.facts["notes"])
    assert all(0 < layer["effective_tokens"] < layer["tokens"] for layer in weighed.facts["layers"])
    assert any("raises damping" in note for note in weighed.facts["notes"])


def test_a_recipe_asks_for_it(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "some words " * 4}] * 4))
    keys = {"dataset": str(tmp_path / "texts.json"), "samples": 4, "max_length": 32, "token_weights": 0.5}
    out = quantkit.quantize(llama, out=tmp_path / "out", method="gptq", calibration=keys, device="cpu")
    facts = json.loads((out / "stage.json").read_text())
    assert facts["made_from"]["sensitivity"]["token_weights"] == 0.5
    found = quantkit.inspect(out, deep=False)
    assert {each["name"]: each["nats"] for each in found["layers"]} == {
        each["name"]: each["nats"] for each in facts["facts"]["layers"]
    }
    console = Console(record=True, width=200)
    for each in inspect_tables(found):
        console.print(each)
    assert "Nats a" in console.export_text()
    assert not CalibrationSpec().wants_sensitivity
    with pytest.raises(QuantkitError, match="token_weights"):
        parse_section(CalibrationSpec, {"token_weights": 2}, "calibration")
