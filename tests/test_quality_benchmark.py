"""The benchmarks that measure what methods lose: how cases are read and compared, and the models made for them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM

from quantkit.allocation.table import Allocation, Unit
from quantkit.errors import QuantkitError
from quantkit.methods.tuning import TuneOptions
from quantkit.recipe import LibrarySpec, RecoverOptions, VariantSpec
from quantkit.recipe.mixing import AutoSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.llama_cpp import LlamaCpp
from quantkit.runtimes.reference import Reference
from quantkit.schemes import IntScheme
from tests.tiny import tiny_config, tiny_rows


@pytest.fixture
def benchmark_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def quality(benchmark_folder: None) -> ModuleType:
    return importlib.import_module("quality")


def test_a_case_says_method_scheme_and_options(quality: ModuleType) -> None:
    ours = quality.read_case("awq+gptq-int3-g128-asym:damping=0.1:activation_order=false").variant
    assert isinstance(ours, VariantSpec)
    assert (ours.chain, ours.base_scheme()) == ("awq+gptq", IntScheme(3, 128, False))
    assert ours.options == {"damping": 0.1, "activation_order": False}
    tuned = quality.read_case("gptq+tune-int4-g64-sym:tune.steps=16:tune.train=[scales,norms]:damping=0.1").variant
    assert (tuned.chain, tuned.options) == ("gptq+tune", {"damping": 0.1})
    assert tuned.tune == TuneOptions(steps=16, train=("scales", "norms"))
    trained = "gptq-int2-g64-sym=>recover:steps=60:train=[scales,norms]"
    assert (quality.read_case(trained).variant.base_scheme(), quality.read_recovery("gptq-int2-g64-sym")) == (
        IntScheme(2),
        None,
    )
    assert quality.read_recovery(trained) == RecoverOptions(steps=60, train=("scales", "norms"))
    theirs = quality.read_case("autoround/autoround-int4-g128-sym:iters=50").variant
    assert isinstance(theirs, LibrarySpec)
    assert (theirs.library, theirs.method, theirs.bits, theirs.group_size, theirs.symmetric) == (
        "autoround", "autoround", 4, 128, True,
    )  # fmt: skip
    assert theirs.options == {"iters": 50}
    assert quality.read_case("llama.cpp-q4_k_m").variant.format == "gguf"
    weighed = quality.read_case("gptq-int4-g64-sym:token_weights=0.5")
    assert weighed.token_weights == 0.5
    assert weighed.variant == quality.read_case("gptq-int4-g64-sym").variant
    mix = quality.read_case("gptq-auto:budget.size=130MB:choices=[int2,int4]:random=3")
    assert isinstance(mix.variant, AutoSpec)
    assert mix.variant.budget is not None
    assert (mix.variant.budget.size, list(mix.variant.choice_patches()), mix.random) == (
        130_000_000, ["int2", "int4"], 3,
    )  # fmt: skip
    turned = quality.read_case("gptq-int4-g64-sym:transforms=[{name: rotate, seed: 1}]:damping=0.1").variant
    assert ([each.name for each in turned.transforms], turned.options) == (["rotate"], {"damping": 0.1})
    cases = ["rtn-int4", "gptq-int4:transforms=[{name: rotate, seed: 1}]", "gptq-auto:choices=[int2,int4]"]
    assert quality.split_cases(",".join(cases)) == cases
    with pytest.raises(QuantkitError, match="no YAML"):
        quality.read_case("rtn-int4-g64-sym:transforms=[{name:")
    with pytest.raises(QuantkitError, match="nothing"):
        quality.read_case("nothing-int4-g64-sym")


def test_gguf_files_are_scored_in_llama_cpp_where_that_is_asked_for(quality: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    asked, other = quality.runtime_of(tmp_path, llama_cpp=True), quality.runtime_of(tmp_path, llama_cpp=False)
    assert (RUNTIMES.get(asked), RUNTIMES.get(other)) == (LlamaCpp, Reference)
    assert RUNTIMES.get(quality.runtime_of(tmp_path / "none", llama_cpp=True)) is Reference


def test_differences_are_paired_by_row(quality: ModuleType) -> None:
    result = {"model": "m", "samples": 16, "case": "a", "seconds": 1.0, "cpu_seconds": 2.0, "bits_per_weight": 4.25}
    base = {**result, "case": "b", "kl": {"like": [0.1, 0.5, 0.9]}}
    (line,) = quality.compared({**result, "kl": {"like": [0.2, 0.6, 1.0]}}, base)
    assert line["kl"] == pytest.approx(0.6)
    assert line["ratio"] == pytest.approx(1.2)
    assert line["shift"] == pytest.approx(0.1)
    assert line["shift_stderr"] == pytest.approx(0, abs=1e-9)
    assert line["stderr"] == pytest.approx(0.4 / 3**0.5)


def test_results_that_are_there_are_not_run_again_and_another_label_is_a_baseline(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "gptq-int4-g64-sym"
    keys = {"model": "m", "case": case, "samples": 16, "rows": 12, "length": 256, "inputs": "quantized"}
    keys |= {"llama_cpp": False, "seconds": 1.0, "cpu_seconds": 2.0, "bits_per_weight": 4.25}
    rows = [
        {**keys, "label": "old", "kl": {"like": [0.2, 0.4], "unlike": [0.4, 0.8]}},
        {**keys, "label": "new", "kl": {"like": [0.1, 0.3], "unlike": [0.2, 0.4]}},
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["--records", "none.json", "--text", "none.txt", "--models", "m=nowhere", "--cases", case]
    monkeypatch.setattr(
        "sys.argv", ["quality.py", *given, "--results", str(results), "--label", "new", "--before", "old"]
    )
    quality.main()
    like, unlike = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert (like["text"], unlike["text"]) == ("like", "unlike")
    assert like["shift"] == pytest.approx(-0.1)
    assert (like["ratio"], unlike["ratio"]) == pytest.approx((2 / 3, 0.5))
    assert results.read_text(encoding="utf-8").count("\n") == 2


def test_a_model_of_its_own_width_and_heads_is_the_same_and_a_narrow_one_is_near(benchmark_folder: None) -> None:
    narrowing = importlib.import_module("narrow_model").Narrowing
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config("llama")).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter, std=0.15)
    model.model.embed_tokens.weight[:, 56:] *= 0.02
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight[56:] *= 0.02
    rows = torch.tensor(tiny_rows(24, 48, 48))
    wanted = model(rows).logits
    with torch.no_grad():
        same = narrowing(model, rows, 64, 4).make(rows)
        narrow = narrowing(model, rows, 56, 4).make(rows)
        fewer = narrowing(model, rows, 64, 3).make(rows)
    errors = [float((each(rows).logits - wanted).norm() / wanted.norm()) for each in (same, narrow, fewer)]
    assert narrow.config.hidden_size == 56
    assert fewer.config.num_attention_heads == fewer.config.num_key_value_heads == 3
    assert errors[0] < 1e-5
    assert errors[1] < 0.05
    assert errors[1] < errors[2] < 0.7


def test_mixes_are_ranked_by_what_they_were_predicted_to_lose(quality: ModuleType) -> None:
    def of(predicted: float, measured: float, model: str = "a") -> dict[str, object]:
        return {"model": model, "predicted": predicted, "kl": {"like": [measured, measured]}}

    rising = [of(0.1, 0.2), of(0.3, 0.5), of(0.2, 0.4), {"model": "a", "kl": {"like": [9.0]}}]
    assert quality.rank_correlation(rising) == {"a like": pytest.approx(1)}
    assert quality.rank_correlation([of(0.1, 0.5), of(0.2, 0.4), of(0.3, 0.3)]) == {"a like": pytest.approx(-1)}
    assert quality.rank_correlation([of(0.1, 0.5), of(0.2, 0.4), of(0.3, 0.3, "b")]) == {}


def test_a_mix_at_random_has_a_choice_for_every_unit(quality: ModuleType) -> None:
    spec = quality.read_case("gptq-auto:budget=4:choices=[int2,int4,int8]").variant
    units = [
        Unit((f"model.layers.{place}.mlp.down_proj",), 1, {}, {"int2": 1, "int4": 2, "int8": 4}) for place in range(9)
    ]
    choices = {name: patch.model_dump(exclude_none=True) for name, patch in spec.choice_patches().items()}
    found = quality.Mixed(spec, Allocation(choices, units, ("int4",) * 9))
    drawn = [quality.at_random(found, spec, seed).allocation.chosen for seed in range(4)]
    assert len(set(drawn)) > 1
    assert drawn[0] == quality.at_random(found, spec, 0).allocation.chosen
    assert all(len(set(each)) > 1 for each in drawn)
