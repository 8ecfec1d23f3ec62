"""An adapter on frozen codes: it brings the model closer to the float one, PEFT loads it, no other base takes it."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.adapter_folder import made_for
from quantkit.errors import QuantkitError
from quantkit.exports.adapter import FOLDER, base_digest, with_adapter
from quantkit.publishing.adapter_card import describe_adapter
from quantkit.recipe.adapting import AdapterOptions
from quantkit.recipe.recovering import RecoverOptions
from quantkit.recovery.adapter import AdapterJob, chosen_layers, fit_adapter, opened, target_names
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.system.artifacts import read_json
from tests.runs import Notebook
from tests.tiny import make_model, tiny_rows

FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 3, "group_size": 32, "symmetric": False},
    "bitsandbytes": {"scheme": "nf4", "format": "bitsandbytes"},
    "gguf": {"scheme": "q2_k", "format": "gguf"},
}
IDS = torch.arange(5, 45)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, wide enough for K-quants."""
    return make_model(tmp_path_factory.mktemp("models") / "float", hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module")
def int3(original: Path) -> Path:
    """It at 3 bits."""
    return quantkit.quantize(original, out=original.parent / "int3", method="rtn", bits=3, group_size=32, dtype="own")


@pytest.fixture(scope="module", params=FORMATS)
def adapted(request: pytest.FixtureRequest, original: Path) -> tuple[Path, Path]:
    """It in a format, calibrated on nothing, and an adapter for that."""
    out = original.parent / f"tiny-{request.param}"
    base = quantkit.quantize(original, out=out, method="rtn", dtype="own", **FORMATS[request.param])
    return base, made(base, original, original.parent / f"adapter-{request.param}", rank=32, alpha=128)


def made(base: Path, original: Path, out: Path, **options: Any) -> Path:
    """An adapter, in a folder of its own."""
    rows = tiny_rows(6, 40, 60)
    job = AdapterJob(base, original, {"name": "float"}, AdapterOptions(**options), rows, "rows", device="cpu")
    fit_adapter(job, out, Notebook(), describe_adapter)
    return out


def logits_of(checkpoint: Path, runtime: str = "reference") -> torch.Tensor:
    """After every token of a prompt."""
    options = LoadOptions(device="cpu", dtype="float32")
    return RUNTIMES.get(runtime).load(checkpoint, options).logits(IDS).float()


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The mean KL divergence in nats."""
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_model_comes_closer_and_peft_computes_what_the_decoder_does(
    adapted: tuple[Path, Path], original: Path
) -> None:
    base, adapter = adapted
    wanted, alone = logits_of(original), logits_of(base)
    with with_adapter(base, adapter) as folder:
        found = logits_of(folder)
        assert divergence(wanted, found) < 0.8 * divergence(wanted, alone)
        if "gguf" not in base.name:  # the format's own kernels may round more than the decoder
            allowed = 1.5 * float((logits_of(base, "transformers") - alone).abs().max()) + 1e-3
            torch.testing.assert_close(logits_of(folder, "transformers"), found, rtol=0, atol=allowed)
    decoded: Any = RUNTIMES.get("reference").load(base, LoadOptions(device="cpu", dtype="float32"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT and transformers about each other
        tuned = PeftModel.from_pretrained(decoded.model, str(adapter)).eval()
        torch.testing.assert_close(tuned(IDS.unsqueeze(0)).logits[0], found, rtol=1e-3, atol=2e-3)


def test_what_it_says_of_itself(int3: Path, original: Path, tmp_path: Path) -> None:
    adapter = made(int3, original, tmp_path / "adapter", rank=8)
    config, manifest = read_json(adapter / "adapter_config.json"), read_json(adapter / "manifest.json")
    assert config["base_model_name_or_path"] == "int3"
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"]) == (8, 8, "none", None)
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert manifest["base"] == {"name": "int3", "digest": base_digest(int3)}
    assert made_for(adapter) == base_digest(int3)
    assert all(after < before for before, after in manifest["errors"].values())
    for file in adapter.iterdir():
        assert str(tmp_path) not in file.read_text(encoding="latin-1")


def test_the_card_says_how_it_is_loaded(
    int3: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = made(int3, original, tmp_path / "adapter", rank=8, start="plain")
    text = (adapter / "README.md").read_text()
    assert f"digest of the tensors that it was made for: `{base_digest(int3)}`" in text
    assert "--max-lora-rank 8 " in text
    (tmp_path / "int3").symlink_to(int3)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    with warnings.catch_warnings(), torch.no_grad(), with_adapter(int3, adapter) as folder:
        warnings.simplefilter("ignore")
        exec(text.partition("```python\n")[2].partition("```")[0], scope)
        found = scope["model"].eval()(IDS.unsqueeze(0)).logits[0]
        torch.testing.assert_close(found, logits_of(folder), rtol=1e-3, atol=2e-3)


def test_the_same_job_gives_the_same_bytes_and_is_done_once(int3: Path, original: Path, tmp_path: Path) -> None:
    one, two = (made(int3, original, tmp_path / name, rank=8) for name in ("one", "two"))
    weights = [(folder / "adapter_model.safetensors") for folder in (one, two)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    before = weights[0].stat().st_mtime_ns
    made(int3, original, one, rank=8)
    assert weights[0].stat().st_mtime_ns == before
    made(int3, original, one, rank=16, start="plain")
    assert weights[0].stat().st_mtime_ns != before


def test_no_other_base_takes_it(int3: Path, original: Path, tmp_path: Path) -> None:
    other = quantkit.quantize(original, out=tmp_path / "int2", method="rtn", bits=2, group_size=32)
    adapter = made(int3, original, tmp_path / "adapter", rank=8, start="plain")
    with pytest.raises(QuantkitError, match="lost in 'int3'"), with_adapter(other, adapter):
        pass
    shutil.copytree(adapter, other / FOLDER)
    for runtime in ("reference", "transformers"):
        with pytest.raises(QuantkitError, match="holds other codes"):
            logits_of(other, runtime)


def test_it_is_merged_into_the_decoded_codes_and_into_nothing_else(int3: Path, original: Path, tmp_path: Path) -> None:
    adapter = made(int3, original, tmp_path / "adapter", rank=8, start="plain")
    for any_base in (False, True):
        with pytest.raises(QuantkitError, match="takes up what quantization lost in 'int3'"):
            quantkit.merge(original, adapter, out=tmp_path / "wrong", any_base=any_base)
    merged = quantkit.merge(int3, adapter, out=tmp_path / "merged", decode=True, dtype="float32")
    with with_adapter(int3, adapter) as folder:
        torch.testing.assert_close(logits_of(Path(merged["folder"])), logits_of(folder), rtol=1e-3, atol=2e-3)
    with pytest.raises(QuantkitError, match="give the quantized checkpoint that it was made for, int3"):
        quantkit.evaluate(adapter)


def test_a_weighted_start_leaves_less_of_the_outputs_error(int3: Path, original: Path, tmp_path: Path) -> None:
    rows = tiny_rows(6, 40, 60)
    job = AdapterJob(int3, original, {}, AdapterOptions(rank=16), rows, "rows", device="cpu")
    facts = fit_adapter(job, tmp_path / "weighted", Notebook(), lambda folder, name: None)
    assert facts["error_left"] < 0.8 * facts["error"]
    without_rows = replace(job, options=AdapterOptions(rank=16, start="plain"), rows=())
    plain = fit_adapter(without_rows, tmp_path / "plain", Notebook(), lambda folder, name: None)
    assert plain["error_left"] < plain["error"]
    with pytest.raises(QuantkitError, match="needs calibration rows"):
        fit_adapter(replace(job, rows=()), tmp_path / "none", Notebook(), lambda folder, name: None)


def test_training_brings_it_closer_and_a_killed_one_goes_on(
    int3: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [tiny_rows(1, 32, 32, seed=seed)[0] for seed in range(12)]
    options = RecoverOptions(steps=6, batch_tokens=64, evaluations=3, held_out=0.3)
    job = AdapterJob(int3, original, {}, AdapterOptions(rank=8, start="plain", rate=0.05), rows, "rows", options, "cpu")
    facts = fit_adapter(job, tmp_path / "whole", Notebook(), lambda folder, name: None)
    assert facts["after"] < facts["before"]
    assert read_json(tmp_path / "whole" / "manifest.json")["trained"]["steps"] == 6

    class Stop(Notebook):
        def progress(self, step: str, done: int, total: int) -> None:
            if step == "step" and done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_adapter(job, tmp_path / "cut", Stop(), lambda folder, name: None)
    resumed = Notebook()
    fit_adapter(job, tmp_path / "cut", resumed, lambda folder, name: None)
    assert next(done for step, done, _ in resumed.steps if step == "step") > 1
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in tmp_path.glob(".*.training")] == []


def test_factors_of_awq_are_no_error(records: Path, tmp_path: Path) -> None:
    original = make_model(tmp_path / "float")
    calibration = {"dataset": str(records), "samples": 8, "max_length": 64}
    base = quantkit.quantize(
        original, out=tmp_path / "base", method="awq", bits=4, group_size=32, calibration=calibration, dtype="own"
    )
    stored, scaled = CheckpointReader(base), CheckpointReader(original)
    norms = [name for name in stored.names() if name.endswith("layernorm.weight")]
    assert any(not torch.equal(stored.read(name), scaled.read(name)) for name in norms)
    adapter = made(base, original, tmp_path / "adapter", rank=16)
    wanted, alone = logits_of(original), logits_of(base)
    with with_adapter(base, adapter) as folder:
        assert divergence(wanted, logits_of(folder)) < 0.9 * divergence(wanted, alone)


def test_a_float_model_of_another_kind_is_refused(int3: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5, hidden_size=256, intermediate_size=256)
    with pytest.raises(QuantkitError, match="nothing to do with those of the float model"):
        made(int3, other, tmp_path / "adapter")
    narrow = make_model(tmp_path / "narrow")
    with pytest.raises(QuantkitError, match="in the float model"):
        made(int3, narrow, tmp_path / "adapter")


def test_layers_are_chosen_by_pattern(int3: Path, original: Path) -> None:
    with opened(int3, original, torch.device("cpu"), trust_remote_code=False) as found:
        layers, notes = chosen_layers(found, AdapterOptions(layers=(r"layers\.0\..*q_proj", "down_proj$")))
        paths = [layer.path for layer in layers]
        assert notes == []
        assert paths == [
            "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
        ]  # fmt: skip
        assert target_names(paths, found.modules) == tuple(paths)
        assert target_names(paths[1:], found.modules) == ("down_proj",)
        with pytest.raises(QuantkitError, match="no quantized layer of"):
            chosen_layers(found, AdapterOptions(layers=("nowhere",)))


def test_a_rotated_base_is_told_from_the_turned_float_model(original: Path, tmp_path: Path) -> None:
    """Its weights have nothing to do with the float ones as these lie."""
    rotated = quantkit.quantize(
        original, out=tmp_path / "rotated", method="rtn", bits=2, group_size=32, dtype="own", transforms=["rotate"]
    )
    adapter = made(rotated, original, tmp_path / "adapter", rank=32)
    wanted = logits_of(original)
    with with_adapter(rotated, adapter) as folder:
        assert divergence(wanted, logits_of(folder)) < 0.8 * divergence(wanted, logits_of(rotated))
