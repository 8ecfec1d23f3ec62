"""Estimates equal what is written and loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantkitError, RecipeError, SchemeError, SourceError
from quantkit.estimation import OVERHEAD, anatomy_of, cards, estimate, fits, of_variant, well_known
from quantkit.estimation.groups import calibrated_groups
from quantkit.estimation.guides import INFERENCE, TRAINING, guide_table
from quantkit.estimation.measured import estimates
from quantkit.estimation.models import anatomy_by
from quantkit.estimation.tables import cards_table, estimate_table, fits_table
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.methods.gptq import Gptq
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.report.facts import variant_facts
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes.codebook import CodebookScheme
from quantkit.system.units import parse_bytes
from quantkit.system.validation import parse_section
from quantkit.verification.matrix.rows import method_names, rows
from tests.architectures import ARCHITECTURES, BASE, DENSE, make
from tests.runs import make_recipe
from tests.tiny import FAMILIES, make_model, tiny_config, tiny_rows
from tests.vram import Table, context_bytes, watched

PARAMETERS = {
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_009_346_304,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-30b": 32_528_943_616,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
}
"""As published."""
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
OFFSET_DIGITS = 6
"""Bytes by which the text of an offset may be longer or shorter than is usual."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FLOAT = {"method": "none", "scheme": "bfloat16", "format": "float"}
GIB = 2**30


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", **keys}, "test")


def tensor_bytes(folder: Path, form: str) -> int:
    if form == "gguf":
        (file,) = folder.glob("model-*.gguf")
        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    reader = CheckpointReader(folder)
    return sum(reader.nbytes(name) for name in reader.names())


def exported(job: Job, variants: list[VariantSpec], folder: Path) -> list[Path]:
    wanted = [Wanted(each, folder / each.name) for each in variants]
    found = quantize_together(job, wanted)
    for outcome in found:
        assert isinstance(outcome, Quantized), outcome
    return [each.out for each in wanted]


def slack(file: Stored) -> int:
    """Bytes that depend on the weights: digits in bitsandbytes' text under double quantization, and nothing else."""
    doubled = [each for each in file.packed.values() if isinstance(each.scheme, CodebookScheme)]
    return OFFSET_DIGITS * sum(each.scheme.double_quant for each in doubled if isinstance(each.scheme, CodebookScheme))


def matrix_variants(family: str) -> list[VariantSpec]:
    """One for each row of the matrix that the family can be written in; who chooses the codes changes no byte."""
    found = []
    for number, row in enumerate(rows()):
        if row.format == "gguf" and family not in ("llama", "qwen2"):
            continue
        able = (each for name in ("rtn", "none", *method_names()) if (each := row.variant(name)) is not None)
        found.append(next(able).model_copy(update={"name": f"row{number}"}))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_bytes_of_every_format_and_scheme_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family, dtype=torch.bfloat16, head_dim=64, **WIDE)
    variants = matrix_variants(family)
    job = Job(model, {"reference": "small"}, "bfloat16", tiny_rows(count=2), "small", inputs="float")
    anatomy = anatomy_of(str(model))
    for each, folder in zip(variants, exported(job, variants, tmp_path), strict=True):
        file = stored(anatomy, each)
        allowed = slack(file) if each.format == "bitsandbytes" else 0
        assert abs(file.nbytes - tensor_bytes(folder, each.format)) <= allowed, (each.format, each.base_scheme())
        assert sum(line.nbytes for line in file.lines()) == file.nbytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {"ignore": []},
        {"scheme": "fp8", "embeddings": {}},
        {"scheme": "fp8", "ignore": [], "embeddings": {}},
        {"first_blocks": {"count": 1, "bits": 8}, "overrides": {"down_proj": {"bits": 8, "group_size": -1}}},
        {"format": "gguf", "ignore": [], "embeddings": {}, "group_size": 32},
        {"format": "gguf", "ignore": ["q_proj"], "group_size": 32},
        {"format": "gguf", "method": "none", "scheme": "float16"},
    ],
)
def test_heads_embeddings_and_mixed_schemes_are_counted(keys: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=tied)
    spec = variant(**keys)
    (folder,) = exported(Job(model, {"reference": "small"}, "float32"), [spec], tmp_path)
    assert stored(anatomy_of(str(model)), spec).nbytes == tensor_bytes(folder, spec.format)


def test_the_rope_of_llama_3_1_is_a_tensor_of_gguf_files(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_model(tmp_path / "model", rope_parameters={**rope, "original_max_position_embeddings": 8192})
    spec = variant(format="gguf", group_size=32)
    (folder,) = exported(Job(model, {"reference": "small"}, "float32"), [spec], tmp_path)
    file = stored(anatomy_of(str(model)), spec)
    assert file.nbytes == tensor_bytes(folder, "gguf")
    assert file.floats["rope_freqs"] == (8, 32)


@pytest.mark.parametrize(
    ("keys", "runtime", "dtype"),
    [
        ({"group_size": 64}, "transformers", "bfloat16"),
        ({"group_size": 64}, "reference", "bfloat16"),
        ({"group_size": 64}, "reference", "float32"),
        (FLOAT, "transformers", "bfloat16"),
        ({"scheme": "nf4", "format": "bitsandbytes"}, "transformers", "bfloat16"),
        ({"format": "gguf", "group_size": 32}, "llama.cpp", None),
        ({"format": "gguf", "group_size": 32}, "reference", "float32"),
    ],
)
def test_resident_bytes_are_within_five_percent(
    keys: dict[str, Any], runtime: str, dtype: str | None, tmp_path: Path
) -> None:
    shape = {**WIDE, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 64}
    model = make_model(tmp_path / "model", dtype=torch.bfloat16, **shape)
    spec = variant(**keys)
    (folder,) = exported(Job(model, {"reference": "small"}, "bfloat16"), [spec], tmp_path)
    loaded = RUNTIMES.get(runtime).load(folder, LoadOptions(dtype=dtype, context_length=64))
    found = of_variant(anatomy_of(str(model)), spec, Use(), decoded=dtype if runtime == "reference" else None)
    assert found.part("inference").line("weights").nbytes == pytest.approx(loaded.weights_bytes(), rel=0.05)


@pytest.mark.parametrize(
    ("keys", "loader"),
    [({"group_size": 64}, "transformers"), ({"group_size": 64}, "reference"), (FLOAT, "transformers")],
)
def test_weights_in_another_dtype_than_the_file_are_within_five_percent(
    keys: dict[str, Any], loader: str, tmp_path: Path
) -> None:
    """As an evaluation on a CPU loads a checkpoint of 16 bits: in float32."""
    model = make_model(tmp_path / "model", dtype=torch.bfloat16, **WIDE)
    spec = variant(**keys)
    (folder,) = exported(Job(model, {"reference": "small"}, "bfloat16"), [spec], tmp_path)
    options = LoadOptions(dtype="float32", context_length=128)
    memory, found = watched(folder, spec, loader, options, torch.arange(5, 69))
    assert found["weights"]["ratio"] == pytest.approx(1, rel=0.05)
    after = sum(line["bytes"] for line in found["prefill"]["lines"] if line["name"] == "weights")
    assert after == pytest.approx(memory["weights_bytes_running"], rel=0.05)


def test_a_report_shows_estimates_beside_what_was_measured(model: Path, records: Path, tmp_path: Path) -> None:
    variants = [{"name": "decoded", "method": "rtn", "format": "hqq"}]
    evaluation = {"texts": ["prose"], "metrics": ["memory"], "context_length": 64, "max_tokens": 128, "device": "cpu"}
    found = quantkit.run(make_recipe(model, records, tmp_path / "run", variants, evaluation=evaluation))
    (row,) = found["variants"]
    memory, shown = row["memory"], dict(variant_facts(row))
    assert memory["weights_estimated_bytes"] == pytest.approx(memory["weights_bytes"], rel=0.05)
    assert set(memory["estimates"]) == {"weights", "prefill", "decode"}
    for name, label in (("weights", "weights in memory"), ("prefill", "memory taken at prefill")):
        each = memory["estimates"][name]
        assert each["ratio"] == each["estimated_bytes"] / each["measured_bytes"]
        assert each["estimated_bytes"] == sum(line["bytes"] for line in each["lines"])
        assert shown[label].startswith("estimated ")
        assert shown[label].endswith(f"ratio {each['ratio']:.3f}")
    grown = memory["phases"]["prefill"]["peak_bytes"] - memory["baseline_bytes"]
    assert memory["estimates"]["prefill"]["measured_bytes"] == grown
    for file in ("report.md", "report.html"):
        text = (tmp_path / "run" / file).read_text()
        assert "At prefill" in text
        assert "stimated / measured" in text


def test_estimates_know_the_prompt_and_the_device(tmp_path: Path) -> None:
    """With figures as CUDA gives them: the allocator's without, the process's with what the device takes."""
    config = tiny_config("llama", num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    anatomy, mib = anatomy_of(str(tmp_path)), 2**20
    taken = {"used_bytes": mib, "peak_bytes": 9 * mib, "reserved_bytes": 10 * mib, "process_bytes": 400 * mib}
    phases = {
        "load": taken,
        "prefill": {**taken, "tokens": 100},
        "decode": {**taken, "tokens": 32, "prompt_tokens": 64},
    }
    memory = {"weights_bytes": mib, "peak_kind": "CUDA allocator", "baseline_bytes": mib, "phases": phases}
    result = {"loaded_by": "transformers", "environment": {"dtype": "bfloat16"}}
    found = estimates(anatomy, variant(group_size=16), memory, result)
    assert set(found) == {"weights", "prefill", "decode", "process_prefill", "process_decode"}
    assert found["prefill"]["measured_bytes"] == 8 * mib
    assert found["process_prefill"]["estimated_bytes"] == found["prefill"]["estimated_bytes"] + OVERHEAD
    lines = {line["name"]: line["bytes"] for line in found["prefill"]["lines"]}
    later = {line["name"]: line["bytes"] for line in found["decode"]["lines"]}
    assert lines["KV cache"] * 96 == later["KV cache"] * 100
    assert lines["activations"] * 64 == later["activations"] * 100
    decoded = estimates(anatomy, variant(group_size=16), memory, {**result, "loaded_by": "reference"})
    assert decoded["weights"]["estimated_bytes"] == anatomy.parameters * 2 > found["weights"]["estimated_bytes"]
    assert Table().add_all("x", found)["prefill"] == found["prefill"]["ratio"]
    assert context_bytes(memory) == [390 * mib] * 3


def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    page = (Path(__file__).parents[1] / "docs" / "vram.md").read_text(encoding="utf-8")
    for rows_of_guide, part in ((TRAINING, "training"), (INFERENCE, "inference")):
        assert guide_table(rows_of_guide, part) in page


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_well_known_models_have_the_parameters_that_are_published(name: str) -> None:
    assert anatomy_of(name).parameters == PARAMETERS[name]


LARGE = {"llama-3.1-405b", "qwen3-235b-a22b", "deepseek-v3"}
"""They take half a minute together; tests/test_scale.py builds them."""


def test_every_well_known_config_is_built_and_found_by_its_hub_name() -> None:
    for name in set(well_known()) - LARGE:
        assert anatomy_of(name).blocks == len(anatomy_of(name).caches)
    assert anatomy_of("meta-llama/Llama-2-7b-hf").parameters == PARAMETERS["llama-2-7b"]
    assert anatomy_of("QWEN/qwen2.5-7b-instruct").parameters == PARAMETERS["qwen2.5-7b"]


def configs() -> dict[str, Any]:
    shared = {**SMALL, **IDS, "num_key_value_heads": 2, "vocab_size": 300}
    found = {family: tiny_config(family, num_hidden_layers=4) for family in FAMILIES}
    found["gemma3_text"] = Gemma3TextConfig(**shared, head_dim=16)
    found["phi3"] = Phi3Config(**shared)
    found["llama with biases"] = tiny_config("llama", attention_bias=True, mlp_bias=True)
    found["llama, tied"] = tiny_config("llama", tie_word_embeddings=True)
    found["gpt2"] = GPT2Config(**IDS, n_embd=64, n_layer=4, n_head=4, vocab_size=300)
    return found


@pytest.mark.parametrize("case", sorted(configs()))
def test_tensors_and_groups_are_those_of_the_engine(case: str, tmp_path: Path) -> None:
    config = configs()[case]
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found, skeleton = anatomy_of(str(tmp_path)), Skeleton(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert {weight.name for weight in found.weights} == set(reader.names())
    linears = {layer.name: layer.shape for layer in skeleton.layers()}
    assert {name: shape for name, (shape, _) in found.linears().items()} == linears
    transposed = {f"{name}.weight" for name in linears} if case == "gpt2" else set()
    assert all(weight.shape == reader.shape(weight.name) for weight in found.weights if weight.name not in transposed)
    assert found.tied == bool(skeleton.tied)
    usual = ["sliding_attention" if case == "mistral" else "full_attention"] * found.blocks
    kinds = getattr(config, "layer_types", None) or usual
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [cache.window for cache in found.caches] == windows
    assert sorted(name for each in found.inputs for name in each.layers) == sorted(
        name for name, (_, block) in found.linears().items() if block == found.largest
    )


def test_layers_that_share_an_input_are_told_by_a_run_and_not_by_their_names(tmp_path: Path) -> None:
    def leaves(case: str) -> list[list[str]]:
        configs()[case].save_pretrained(tmp_path)
        found = anatomy_of(str(tmp_path))
        assert found.largest == 1
        return [[name.rpartition(".")[2] for name in each.layers] for each in found.inputs]

    usual = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert leaves("llama") == leaves("gemma3_text") == usual
    assert leaves("gpt_neox") == [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
    assert leaves("phi3") == [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]


KEEP_TO_THEMSELVES = ("hrm_text", "recurrent_gemma")
"""Models that fail with the cache that transformers gives them, or that keep what they have seen in their modules."""


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_counted_and_its_block_runs(architecture: str, tmp_path: Path) -> None:
    make(tmp_path, architecture)
    found, reader = anatomy_of(str(tmp_path)), CheckpointReader(tmp_path)
    assert found.parameters == sum(math.prod(reader.shape(name)) for name in reader.names())
    assert all("its cache is told by its config" in note for note in found.notes)
    assert bool(found.notes) == (architecture in KEEP_TO_THEMSELVES)
    assert sorted(name for each in found.inputs for name in each.layers) == sorted(
        name for name, (_, block) in found.linears().items() if block == found.largest
    )
    of_variant(found, variant(group_size=-1, bits=8), Use())


@pytest.mark.parametrize("architecture", sorted(DENSE))
def test_groups_are_those_that_the_model_itself_shows(architecture: str, tmp_path: Path) -> None:
    model = make(tmp_path, architecture)
    found, skeleton = anatomy_of(str(tmp_path)), Skeleton(tmp_path)
    read: list[tuple[torch.Tensor, list[str]]] = []

    def reads(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_: Any, given: tuple[Any, ...]) -> None:
            same = next((names for each, names in read if each is given[0]), None)
            if any(name in names for _, names in read):
                return  # a block that is gone through again
            if same is None:
                read.append((given[0], [name]))
            else:
                same.append(name)

        return hook

    modules = dict(model.named_modules())
    for layer in skeleton.segments[found.largest].layers:
        if layer.path in modules:  # matrices of heads are layers of the skeleton alone
            modules[layer.path].register_forward_pre_hook(reads(layer.name))
    with torch.no_grad():
        model(input_ids=torch.arange(5, 17)[None], use_cache=False)
    called = {name for _, names in read for name in names}
    shown = [[name for name in each.layers if name in called] for each in found.inputs]
    assert [names for names in shown if names] == [names for _, names in read]


def test_of_a_model_that_transformers_does_not_know_the_text_model_is_counted() -> None:
    text = tiny_config("llama").to_dict()
    found = anatomy_by({"model_type": "unheard-of", "text_config": text}, "both")
    assert found.parameters == anatomy_by(text, "text").parameters
    assert found.notes == ("the parts of both beside its text model are left out",)
    with pytest.raises(SourceError, match="unheard-of"):
        anatomy_by({"model_type": "unheard-of"}, "both")


def test_a_method_tells_what_memory_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak() -> int:
        return estimate("llama-2-7b", method="gptq").part("quantizing").nbytes

    usual = peak()
    monkeypatch.setattr(Gptq, "factorizes", False)
    assert peak() < usual
    monkeypatch.undo()
    monkeypatch.setattr(Gptq, "working_copies", lambda self, scheme: 100.0)
    assert peak() > usual


def test_what_is_alive_before_a_layer_is_counted() -> None:
    """Embedding, residual stream and normed stream; queries and keys twice; gate times up."""
    found = anatomy_of("llama-3-8b")
    hidden, wide, both = 4096, 14336, 4096 + 1024
    assert [each.paused for each in found.inputs] == [3 * hidden, 3 * hidden + 2 * both, 4 * hidden, 4 * hidden + wide]


def test_a_model_that_does_not_run_without_weights_is_estimated_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("asks for numbers")

    monkeypatch.setattr("quantkit.estimation.trial._called", broken)
    monkeypatch.setattr("quantkit.estimation.building.try_all", broken)
    tiny_config("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    found = anatomy_of(str(tmp_path))
    assert [len(each.layers) for each in found.inputs] == [1] * 7
    assert "do not run without weights (RuntimeError)" in " ".join(found.notes)
    assert "its cache is told by its config" in " ".join(found.notes)
    assert [cache.values for cache in found.caches] == [2 * 2 * 16] * 3


def test_active_parameters_are_those_that_are_published() -> None:
    """12.9 of 46.7 billion, as Mistral AI says of Mixtral 8x7B."""
    found = estimate("mixtral-8x7b", bits=4, group_size=128)
    assert round(found.anatomy.active / 1e9, 1) == 12.9
    data = found.to_json()
    assert (data["active_parameters"], data["tower_parameters"]) == (found.anatomy.active, 0)
    assert anatomy_of("llama-2-7b").active == PARAMETERS["llama-2-7b"]


def test_parts_that_text_does_not_pass_are_counted_apart(tmp_path: Path) -> None:
    make(tmp_path, "gemma3")
    found, reader = anatomy_of(str(tmp_path)), CheckpointReader(tmp_path)
    apart = [name for name in reader.names() if not name.startswith("language_model.")]
    assert apart
    assert found.towers == sum(math.prod(reader.shape(name)) for name in apart) == found.parameters - found.active


def test_the_state_of_recurrent_blocks_is_what_transformers_keeps(tmp_path: Path) -> None:
    model = make(tmp_path, "qwen3_5_moe_text")
    found = anatomy_of(str(tmp_path))
    out = model(input_ids=torch.arange(3, 12)[None], use_cache=True).past_key_values.layers
    states = [state for held in (out[0].conv_states, out[0].recurrent_states) for state in held.values()]
    keys, values = out[1].keys, out[1].values
    assert [cache.state for cache in found.caches] == [sum(state.numel() for state in states), 0]
    assert [cache.values for cache in found.caches] == [0, (keys.numel() + values.numel()) // 9]
    lines = of_variant(found, variant(group_size=32, bits=4), Use(batch=2, context=100)).part("inference").lines
    sizes = {line.name: line.nbytes for line in lines}
    assert sizes["recurrent state"] == 2 * found.caches[0].state * 4
    assert sizes["KV cache"] == 2 * 100 * found.caches[1].values * 4


EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, **IDS, num_key_value_heads=2, vocab_size=300, head_dim=16),
        MixtralConfig(**SMALL, **IDS, num_key_value_heads=2, vocab_size=300, num_local_experts=4),
        Qwen3MoeConfig(**SMALL, **IDS, **EXPERTS, num_key_value_heads=2, vocab_size=300, head_dim=16, num_experts=4),
        DeepseekV2Config(**SMALL, **IDS, **EXPERTS, **LATENT, vocab_size=300, q_lora_rank=None),
        DeepseekV3Config(**SMALL, **IDS, **EXPERTS, **LATENT, vocab_size=300, q_lora_rank=24),
    ],
    ids=lambda config: str(config.model_type),
)
def test_models_of_experts_have_the_parameters_and_the_groups_of_the_engine(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = anatomy_of(str(tmp_path))
    corrections = sum(weight.numel for weight in found.weights if "correction_bias" in weight.name)
    assert found.parameters - corrections == model.num_parameters()
    assert set(found.linears()) == {layer.name for layer in Skeleton(tmp_path).layers()}
    assert sorted(name for each in found.inputs for name in each.layers) == sorted(
        name for name, (_, block) in found.linears().items() if block == found.largest
    )
    experts = [each for each in found.inputs if "experts.0." in each.layers[0]]
    assert [len(each.layers) for each in experts] == ([] if config.model_type == "gemma2" else [2, 1])


def test_bytes_of_a_model_of_experts_are_those_of_the_file(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, **IDS, num_key_value_heads=2, vocab_size=300, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    spec = variant(group_size=32)
    (folder,) = exported(Job(tmp_path / "model", {"reference": "small"}, "float32"), [spec], tmp_path)
    assert stored(anatomy_of(str(tmp_path / "model")), spec).nbytes == tensor_bytes(folder, spec.format)


def test_the_cache_of_shared_heads_windows_and_latents() -> None:
    def cache(model: str, **keys: Any) -> int:
        part = estimate(model, method="rtn", group_size=-1, bits=8, **keys).part("inference")
        return sum(line.nbytes for line in part.lines if line.name.startswith("KV cache"))

    assert cache("llama-2-7b") == 2 * 32 * 4096 * 2048 * 2 == GIB
    assert cache("llama-2-7b", batch=3) == 3 * GIB
    assert cache("llama-3-8b") == 2 * 32 * 8 * 128 * 2048 * 2
    assert cache("llama-3-8b", kv_dtype="fp8") == cache("llama-3-8b") // 2
    assert cache("llama-3-8b", kv_dtype="q8_0") == cache("llama-3-8b") * 17 // 32
    assert cache("mistral-7b", context=16384) == cache("mistral-7b", context=4096)
    windowed, whole = 22 * 512, 4 * 8192
    assert cache("gemma-3-1b", context=8192) == (windowed + whole) * 2 * 256 * 2
    data = {
        "model_type": "deepseek_v2", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 100, "kv_lora_rank": 48,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    }  # fmt: skip
    part = of_variant(anatomy_by(data, "latent"), variant(group_size=16), Use(context=100), dtype="float16").part(
        "inference"
    )
    assert part.line("KV cache").nbytes == 3 * 100 * (48 + 16) * 2
    assert any("latent attention" in note for note in part.notes)


def test_logits_of_all_positions_are_counted_where_they_are_the_most() -> None:
    found = estimate("gemma-3-1b", batch=2, context=512)
    plain, whole = found.part("inference"), found.part("inference_all_logits")
    assert whole.line("logits").nbytes == 1024 * (262144 + 2 * 1152) * 2
    assert whole.nbytes - plain.nbytes == whole.line("logits").nbytes - plain.line("activations").nbytes


def test_training_keeps_adapters_gradients_states_and_inputs_of_blocks() -> None:
    keys: dict[str, Any] = {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes", "context": 512, "train": True}
    part = estimate("llama-2-7b", lora_rank=8, **keys).part("training")
    adapters = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert part.line("adapters").nbytes == 4 * adapters
    assert part.line("gradients").nbytes == 4 * adapters
    assert part.line("optimizer").nbytes == pytest.approx(2 * adapters, rel=0.02)
    assert part.line("saved activations").nbytes == 32 * 512 * 4096 * 2
    wider = estimate("llama-2-7b", lora_rank=16, **keys).part("training")
    assert wider.line("adapters").nbytes == 2 * part.line("adapters").nbytes
    kept = estimate("llama-2-7b", lora_rank=8, gradient_checkpointing=False, **keys).part("training")
    assert kept.line("saved activations").nbytes > 10 * part.line("saved activations").nbytes
    full = estimate("llama-2-7b", lora_rank=8, optimizer="adamw", **keys).part("training")
    assert full.line("optimizer").nbytes == 8 * adapters


def test_while_quantizing_more_tokens_take_more_and_more_blocks_do_not() -> None:
    def peak(model: str, **keys: Any) -> int:
        return estimate(model, **keys).part("quantizing").nbytes

    few, many = (peak("llama-2-7b", calibration_tokens=count, correction=False) for count in (40_000, 80_000))
    assert many - few == 40_000 * (4 * 4096 + 11008) * 2
    assert few + 40_000 * 2 * 4096 * 2 < peak("llama-2-7b", calibration_tokens=40_000)
    assert peak("llama-2-7b", method="gptq", inputs="float") == peak("llama-2-7b", correction=False, inputs="float")
    assert peak("llama-2-7b", strategy="recompute") < peak("llama-2-7b")
    assert peak("llama-2-7b", method="rtn") < few
    assert peak("llama-2-7b", pass_dtype="float32") > peak("llama-2-7b")


def test_what_fits_is_told_best_first() -> None:
    found = fits("llama-3-8b", "8GiB")
    assert found[0].way.method == "none"
    best = next(each for each in found if each.fits)
    assert best.nbytes <= 8 * GIB
    assert 4 <= best.to_json()["bits_per_weight"] < 7
    assert not any(each.fits for each in found[: found.index(best)])
    longest = best.longest_context
    for context, there in ((longest, True), (longest + 256, False)):
        again = next(each for each in fits("llama-3-8b", "8GiB", context=context) if each.way == best.way)
        assert again.fits == (there or longest == best.anatomy.context)
    assert all(each.fits for each in fits("llama-3-8b", "80GiB"))
    assert not any(each.fits for each in fits("llama-3-70b", "8GiB"))
    assert any(each.way.format == "gguf" for each in fits("gemma-3-4b", "8GiB"))


def test_a_gguf_file_holds_no_tower(tmp_path: Path) -> None:
    make(tmp_path / "model", "gemma3", text_config={**BASE, "query_pre_attn_scalar": 16})
    spec = variant(method="rtn", bits=8, group_size=32, format="gguf")
    (folder,) = exported(Job(tmp_path / "model", {"reference": "sees"}, "float32"), [spec], tmp_path)
    assert stored(anatomy_of(str(tmp_path / "model")), spec).nbytes == tensor_bytes(folder, "gguf")


def test_more_memory_never_fits_less() -> None:
    rows_of_cards = sorted(cards("qwen2.5-14b"), key=lambda row: row.card.nbytes)
    bits = [0.0 if row.best is None else row.best.to_json()["bits_per_weight"] for row in rows_of_cards]
    assert bits == sorted(bits)
    assert [row.trains for row in rows_of_cards] == sorted(row.trains for row in rows_of_cards)
    assert {row.card.name.split()[0] for row in rows_of_cards} == {"RTX", "A100", "L40S", "H100"}


def test_tables_show_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(width=200)
    found = estimate("mixtral-8x7b", train=True)
    console.print(estimate_table(found))
    console.print(fits_table(fits("mistral-7b", "12GiB")))
    console.print(cards_table(cards("mistral-7b")))
    text = capsys.readouterr().out
    for part in found.parts:
        assert part.title in text
        assert all(line.formula in text for line in part.lines)
    assert "RTX 3060 12 GB" in text
    assert json.loads(json.dumps(found.to_json()))["parameters"] == PARAMETERS["mixtral-8x7b"]


def test_a_70b_answers_in_seconds_and_its_weights_are_not_made() -> None:
    code = (
        "import resource, time\n"
        "from quantkit.estimation import estimate\n"
        "found = estimate('llama-2-70b', train=True)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(time.process_time(), peak, found.stored.nbytes)"  # other processes may hold it up
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak, nbytes = done.stdout.split()
    assert float(seconds) < 20  # nearly all of them to import transformers
    assert int(peak) < 2 * GIB
    assert 33 * GIB < int(nbytes) < 36 * GIB


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"group_size": 48}, SchemeError),
        ({"bits": 9}, QuantkitError),
        ({"batch": 0}, RecipeError),
        ({"kv_dtype": "int3"}, RecipeError),
        ({"overhead": "much"}, RecipeError),
        ({"contxt": 3}, RecipeError),
        ({"ignore": [""]}, SchemeError),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], kind: type[QuantkitError]) -> None:
    with pytest.raises(kind):
        estimate("llama-2-7b", **keys)


def test_models_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="llama-2-7b"):
        anatomy_of("llama-2-7")
    with pytest.raises(SourceError, match=r"config\.json"):
        anatomy_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="mapping"):
        anatomy_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with pytest.raises(SourceError, match="hidden_size"):
        anatomy_of(str(tmp_path))
    with pytest.raises(RecipeError, match="what fits"):
        fits("llama-2-7b", "8GiB", bits=4)


@pytest.mark.parametrize("wrong", ["many", [1, 2], -1, 1.5])
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_parameters"])
def test_configs_that_no_model_has_are_refused_or_built(key: str, wrong: Any) -> None:
    with suppress(QuantkitError):
        assert anatomy_by({**tiny_config("mistral").to_dict(), key: wrong}, "odd").blocks


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8GiB", 8 * GIB), ("600 MiB", 600 * 2**20), ("1.5gb", 1_500_000_000), (7, 7), ("0", 0)]
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["rtn", "rtn, weighted", "rtn, nf4", "hqq", "llama.cpp", "gptq", "awq", "awq+gptq"])
def test_the_peak_while_quantizing_is_within_ten_percent(method: str) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "quantizing_peak.py"
    done = subprocess.run([sys.executable, str(script), method], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({row["blocks"] for row in found}) == 2
    assert len({row["tokens"] for row in found}) == 3
    for row in found:
        assert math.isclose(row["estimated"], row["measured"], rel_tol=0.1), row


def test_statistics_of_experts_are_counted_as_they_are_gathered(tmp_path: Path) -> None:
    """As many at a time as are solved together, and those of all together beside them; all where a transform asks."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
    config = MixtralConfig(**{**SMALL, **sizes}, **IDS, num_key_value_heads=2, vocab_size=300)
    config.save_pretrained(tmp_path)
    anatomy = anatomy_of(str(tmp_path))
    use = Use(device="cpu", calibration_tokens=1000)
    spec = variant(method="gptq", group_size=32)
    groups = list(calibrated_groups(anatomy, {name: spec.base_scheme() for name in anatomy.linears()}, "cpu"))
    assert [(each.experts, each.together) for each in groups if each.experts] == [(8, 2), (8, 2)]
    gathered = sum(each.together * each.columns**2 for each in groups if each.place != "lm_head of a block")
    for inputs, beside in (("quantized", 0), ("float", gathered)):
        lines = of_variant(anatomy, spec, use.model_copy(update={"inputs": inputs})).part("quantizing").lines
        found = {line.name: line for line in lines}
        own = 2 * (3 if inputs == "quantized" else 2) + 1
        assert found["statistics"].nbytes == 4 * (beside + own * 512**2), found["statistics"].formula
    scaled = {**use.model_dump(), "inputs": "float"}
    lines = of_variant(anatomy, variant(method="awq+gptq", group_size=32), Use(**scaled)).part("quantizing").lines
    assert {line.name: line for line in lines}["statistics"].nbytes > 4 * (8 * 512**2 + 8 * 1024**2)
