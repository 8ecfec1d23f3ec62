"""Mixtures of experts as GGUF: llama.cpp computes with the file what transformers does, and it comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import SchemeError, SourceError
from quantkit.exports import open_export
from quantkit.exports.content import Content, Stored
from quantkit.exports.gguf_writer import NEXT_ALONE, ROUNDED, check_source, source_remarks, write_gguf, written_names
from quantkit.gguf.config import read_model_config
from quantkit.gguf.head import read_head
from quantkit.gguf.imatrix import Importance, write_imatrix
from quantkit.gguf.mixtures import MIXTURES
from quantkit.gguf.names import Naming
from quantkit.gguf.tensors import dequantized
from quantkit.recipe import ModelSpec
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.source import resolve
from tests.architectures import BASE, DEEPSEEK, make
from tests.tiny import VOCABULARY

IDS = torch.randint(5, VOCABULARY, (32,), generator=torch.Generator().manual_seed(0))
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {
    **BASE, **LOCAL, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}  # fmt: skip
V3 = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
V2 = {**BASE, **DEEPSEEK, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True, "rope_parameters": YARN | {"attention_factor": 1.2}},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"num_hidden_layers": 3, "sliding_window": 8},
    "deepseek_v3": V3,
    "deepseek_v2": V2,
    "granitemoe": GRANITE,
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 32},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 0},
    "minimax_m2": {
        **BASE, **LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_moe": {**BASE, "num_experts": 4, "moe_topk": 2},
    "dots1": {
        **BASE, **DEEPSEEK, "sliding_window": None, "layer_types": ["full_attention"] * 2, "n_shared_experts": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    },
}  # fmt: skip


def made(folder: Path, architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model in float16 whose norms differ in every channel and whose routers are seldom in doubt."""
    model = make(folder, architecture, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith(("gate.weight", "router.weight", "layer.weight")):
                parameter.mul_(8)
        for buffer in model.buffers():
            if buffer.shape == (8,):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.half().save_pretrained(folder)
    return loaded(folder)


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS.view(1, -1), use_cache=False).logits[0]
    return logits


def of_llama_cpp(path: Path) -> torch.Tensor:
    pytest.importorskip("xllamacpp")
    from quantkit.runtimes.llama_cpp import LlamaCpp

    return LlamaCpp.load(path, LoadOptions(context_length=128)).logits(IDS)


def as_gguf(folder: Path, out: Path) -> Path:
    """The float model of a folder as a GGUF file."""
    reader, config = CheckpointReader(folder), read_model_config(folder)
    floats = {name: Stored.of(reader, name) for name in written_names(reader.names(), config, Naming.of(config))}
    return write_gguf(Content(folder, "float16", {}, {}, floats, {}), out)


def test_every_mixture_is_tried() -> None:
    assert {each.model_type for each in MIXTURES} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does_and_the_file_comes_back(tmp_path: Path, name: str) -> None:
    """Inputs of float16 matrices are rounded to float16; a wrong order, routing or scale differs by tenths."""
    folder = tmp_path / "float"
    wanted = logits_of(made(folder, name, **MODELS[name]))
    check_source(folder)
    path = as_gguf(folder, tmp_path)
    torch.testing.assert_close(of_llama_cpp(path), wanted, rtol=0, atol=0.05 * float(wanted.std()))
    back = resolve(ModelSpec(source=str(path)), tmp_path / "work").folder
    again, original = CheckpointReader(back), CheckpointReader(folder)
    assert set(again.names()) == set(original.names())
    for tensor in again.names():
        assert torch.equal(again.read(tensor).float(), original.read(tensor).float()), tensor
    torch.testing.assert_close(logits_of(loaded(back)), wanted, rtol=0, atol=0.005 * float(wanted.std()))


PACKED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"scheme": "mxfp4"},
    "qwen3_moe": {"bits": 8, "group_size": 32},
    "granitemoeshared": {"bits": 4, "group_size": 32},
    "deepseek_v3": {"bits": 8, "group_size": 32},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_experts_are_one_tensor_and_decode_as_they_were_solved(tmp_path: Path, name: str) -> None:
    """llama.cpp rounds the inputs of packed layers to 8 bits."""
    folder = tmp_path / "float"
    made(folder, name, **MODELS[name])
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", format="gguf", device="cpu", **PACKED[name])
    (path,) = out.glob("*.gguf")
    head, export = read_head(path), open_export(out)
    stacks = [each for each in head.tensors.values() if "_exps.weight" in each.name]
    assert stacks
    assert all(len(each.shape) == 3 and each.kind.name not in ("F16", "F32") for each in stacks)
    experts = [layer for layer in export.schemes if ".experts." in layer]
    assert len(experts) == sum(each.shape[0] for each in stacks)
    reference = Reference.load(out, LoadOptions(dtype="float32")).logits(IDS)
    found = of_llama_cpp(path)
    assert float((found - reference).norm() / reference.norm()) < 0.05


def test_keys_and_values_of_one_matrix_stay_float_and_lie_in_two(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    made(folder, "deepseek_v3", **V3)
    options: dict[str, Any] = {"method": "rtn", "format": "gguf", "bits": 8, "group_size": 32, "device": "cpu"}
    out = quantkit.quantize(folder, out=tmp_path / "out", **options)
    (path,) = out.glob("*.gguf")
    tensors = read_head(path).tensors
    assert tensors["blk.0.attn_k_b.weight"].kind.name == "F16"
    assert "blk.0.attn_kv_b.weight" not in tensors
    assert not any("kv_b_proj" in layer for layer in open_export(out).schemes)


def test_a_file_with_keys_and_values_in_one_matrix_is_read(tmp_path: Path) -> None:
    """As llama.cpp's converter wrote them once."""
    from quantkit.gguf.writer import Entry, write_file

    folder = tmp_path / "float"
    made(folder, "deepseek_v2", **V2)
    head = read_head(as_gguf(folder, tmp_path))
    reader, entries = CheckpointReader(folder), []
    for tensor in head.tensors.values():
        if "attn_v_b" in tensor.name:
            continue
        name, read = tensor.name, dequantized(head, tensor.name, torch.float32)
        if "attn_k_b" in name:
            name = name.replace("attn_k_b", "attn_kv_b")
            read = reader.read(f"model.layers.{name.split('.')[1]}.self_attn.kv_b_proj.weight").float()
        entries.append(Entry(name, 0, tuple(read.shape), read.nbytes, read.numpy))
    metadata = {key: value for key, value in head.metadata.items() if not key.endswith("_mla")}
    metadata |= {"deepseek2.attention.key_length": 32, "deepseek2.attention.value_length": 16}
    metadata["deepseek2.attention.head_count_kv"] = 4
    write_file(tmp_path / "old.gguf", metadata, entries)
    back = CheckpointReader(resolve(ModelSpec(source=str(tmp_path / "old.gguf")), tmp_path / "work").folder)
    assert all(torch.equal(back.read(name), reader.read(name).float()) for name in reader.names())


def test_layers_that_guess_further_are_left_out_and_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made(tmp_path, "deepseek_v3", **V3)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"model.layers.2.eh_proj.weight": torch.ones(64, 128, dtype=torch.float16)}
    save_file(tensors | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_source(tmp_path)
    assert NEXT_ALONE in source_remarks(tmp_path, "float16")
    assert not any("blk.2." in name for name in read_head(as_gguf(tmp_path, tmp_path)).tensors)


def test_what_llama_cpp_rounds_is_told(tmp_path: Path) -> None:
    made(tmp_path, "gpt_oss")
    assert ROUNDED in source_remarks(tmp_path, "float16")


REFUSED = {
    "qwen3_moe": ({"norm_topk_prob": False}, "cannot say norm_topk_prob False"),
    "qwen2_moe": ({"norm_topk_prob": True}, "cannot say norm_topk_prob True"),
    "olmoe": ({}, "does not compute fewer heads of keys than of queries"),
    "deepseek_v2": ({**V2, "q_lora_rank": None}, "does not compute queries that are not compressed but in 26 or 27 bl"),
    "deepseek_v3": ({**V3, "rope_parameters": YARN | {"mscale": 1.0}}, "does not write the rope scaling"),
    "phimoe": ({}, "quantkit cannot write a model of type 'phimoe' as GGUF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, words = REFUSED[name]
    make(tmp_path, name, **changes)
    with pytest.raises(SourceError) as caught:
        check_source(tmp_path)
    assert words in str(caught.value)


def test_experts_of_a_projection_must_agree(tmp_path: Path) -> None:
    make(tmp_path / "float", "qwen3_moe", norm_topk_prob=True)
    options: dict[str, Any] = {"method": "rtn", "format": "gguf", "bits": 4, "group_size": 32, "device": "cpu"}
    with pytest.raises(SchemeError) as caught:
        quantkit.quantize(
            tmp_path / "float", out=tmp_path / "out", overrides={r"experts\.1\.up_proj": {"bits": 8}}, **options
        )
    assert "1.up_proj is int8 g32 sym, and runtimes of the format gguf load a projection of all experts" in str(
        caught.value
    )
    out = quantkit.quantize(tmp_path / "float", out=tmp_path / "out", overrides={"up_proj": {"bits": 8}}, **options)
    (path,) = out.glob("*.gguf")
    assert read_head(path).tensors["blk.0.ffn_up_exps.weight"].kind.name == "Q8_0"
    assert read_head(path).tensors["blk.0.ffn_gate_exps.weight"].kind.name == "Q4_0"


def test_the_importance_of_experts_has_a_row_for_each(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe", norm_topk_prob=True)
    importance = {
        f"model.layers.0.mlp.experts.{index}.up_proj": Importance(torch.full((64,), float(index + 1)), index + 1)
        for index in (1, 0, 3, 2)
    }
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance, origin=tmp_path, datasets=["x"], chunk_size=8)
    head = read_head(path)
    sums = dequantized(head, "blk.0.ffn_up_exps.weight.in_sum2", torch.float32)
    counts = dequantized(head, "blk.0.ffn_up_exps.weight.counts", torch.float32)
    assert counts.tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert sums[:, 0].tolist() == [1.0, 4.0, 9.0, 16.0]
