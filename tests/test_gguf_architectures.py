"""Architectures of GGUF files: each goes out to llama.cpp and comes back, and files of other tools come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import SourceError
from quantkit.exports.gguf_writer import check_source, source_remarks, write_gguf
from quantkit.gguf.architecture import architecture_of, architectures, model_types
from quantkit.gguf.config import model_config
from quantkit.gguf.head import read_head
from quantkit.gguf.mixtures import MIXTURES
from quantkit.gguf.names import places_of
from quantkit.recipe import ModelSpec
from quantkit.runtimes.base import LoadOptions
from quantkit.source import resolve
from tests.architectures import BASE, GPT, make
from tests.gguf_models import content_of
from tests.test_source_gguf import MERGES, TOKENS, Q, save
from tests.tiny import VOCABULARY

DOCS = Path(__file__).parent.parent / "docs" / "formats.md"
IDS = torch.randint(5, VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MULTIPLIERS = {
    "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip
SECTIONS: dict[str, Any] = {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}
DEEP = {"deepstack_visual_indexes": [0]}
TOWER = {"hidden_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, BASE) for name in ("arcee", "ernie4_5", "gemma", "glm", "hunyuan_v1_dense", "nemotron")},
    **{name: (name, BASE) for name in ("olmo2", "phi", "phi3", "seed_oss", "starcoder2")},
    **{name: (name, {}) for name in ("bloom", "cohere", "falcon", "glm4", "gpt2", "mpt")},
    "cohere2": ("cohere2", {**BASE, "num_hidden_layers": 4, "sliding_window": 8}),
    "exaone4": ("exaone4", {**BASE, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "falcon of several heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon of its own heads": ("falcon", {"multi_query": False}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3 that sees": ("gemma3", {"text_config": {**BASE, "sliding_window": 8, "query_pre_attn_scalar": 16}}),
    "gpt_bigcode": ("gpt_bigcode", {**GPT, "vocab_size": VOCABULARY}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "granite": ("granite", BASE | MULTIPLIERS),
    "lfm2": ("lfm2", {}),
    "mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 8}),
    "qwen2_vl": ("qwen2_vl", {"text_config": BASE | SECTIONS, "vision_config": TOWER}),
    "qwen3_vl": (
        "qwen3_vl",
        {"text_config": BASE | SECTIONS, "vision_config": TOWER | {"deepstack_visual_indexes": [0]}},
    ),
    "llama of long contexts": ("llama", {**BASE, "rope_parameters": YARN}),
    "qwen3 of long contexts": ("qwen3", {**BASE, "rope_parameters": YARN}),
    "olmo3 of long contexts": (
        "olmo3",
        {
            **BASE,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": ROPE},
        },
    ),
    "gpt_neox of long contexts": ("gpt_neox", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    "olmo": ("olmo", {**BASE, "clip_qkv": 0.5}),
    "olmo3": ("olmo3", {**BASE, "num_hidden_layers": 4, "sliding_window": 8}),
    "phi3 of long contexts": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "smollm3": ("smollm3", {**BASE, "num_hidden_layers": 5}),
    "stablelm": ("stablelm", {**BASE, "qk_layernorm": True, "use_qkv_bias": True}),
}


def made(folder: Path, architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model whose norms differ in every channel, and whose weights a file holds in float16 as they are."""
    model = make(folder, architecture, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.copy_(parameter.half())
    model.save_pretrained(folder)
    return model


def called(name: str) -> tuple[str, ...]:
    """What a checkpoint may call a tensor of its language model."""
    return name, f"language_model.{name}", name.replace("model.", "model.language_model.", 1)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS.view(1, -1)).logits[0]
    return logits


def of_llama_cpp(path: Path) -> torch.Tensor:
    pytest.importorskip("xllamacpp")
    from quantkit.runtimes.llama_cpp import LlamaCpp

    return LlamaCpp.load(path, LoadOptions(context_length=128)).logits(IDS)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does_and_the_file_comes_back(tmp_path: Path, name: str) -> None:
    """Its inputs of float16 matrices are rounded to float16; rows in a wrong order differ by tenths."""
    architecture, changes = MODELS[name]
    folder = tmp_path / "float"
    wanted = logits_of(made(folder, architecture, **changes))
    check_source(folder)
    path = write_gguf(content_of(folder, None), tmp_path)
    assert float(wanted.std()) > 0.03
    torch.testing.assert_close(of_llama_cpp(path), wanted, rtol=0, atol=0.012 * float(wanted.std()))
    back = resolve(ModelSpec(source=str(path), dtype="float32"), tmp_path / "work").folder
    again, original = CheckpointReader(back), CheckpointReader(folder)
    for tensor in again.names():
        held = next(each for each in called(tensor) if each in original)
        torch.testing.assert_close(
            again.read(tensor), original.read(held), rtol=0, atol=2e-7 if "norm" in tensor or "A_log" in tensor else 0
        )
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=1e-4)


def by_kind(tensor: torch.Tensor, keys: int, queries: int) -> torch.Tensor:
    """The order of llama.cpp's converter for fused queries, keys and values."""
    parts = tensor.view(keys, queries // keys + 2, -1, *tensor.shape[1:])
    found = [parts[:, :-2], parts[:, -2], parts[:, -1]]
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in found])


def plus_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1 if name.endswith("norm.weight") else tensor


def fused(keys: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, tensor: by_kind(tensor, keys, 4) if "query_key_value" in name else tensor


def upright(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous() if ".c_" in name and tensor.ndim == 2 else tensor


def as_it_is(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


SHAPE = {"context_length": 512, "embedding_length": 64, "block_count": 2, "attention.head_count": 4}
GROUPED = {**SHAPE, "attention.head_count_kv": 2, "feed_forward_length": 128, "rope.freq_base": 1e4}
WIDE = {**SHAPE, "feed_forward_length": 256}
SIXTEEN = {"attention.key_length": 16, "attention.value_length": 16}
RMS, EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
FOREIGN: dict[str, tuple[str, dict[str, Any], Mapping[str, Any], Callable[[str, torch.Tensor], torch.Tensor]]] = {
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16},
        {
            **GROUPED, **SIXTEEN, RMS: 1e-6, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "attention.sliding_window": 64,
        },
        plus_one,
    ),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "sliding_window": 8},
        {
            **GROUPED, **SIXTEEN, RMS: 1e-6, "rope.freq_base": 1e6, "attention.sliding_window": 8,
        },
        plus_one,
    ),
    "phi3": (
        "phi3",
        {},
        {
            **GROUPED, RMS: 1e-5, "rope.dimension_count": 16, "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 0,
        },
        as_it_is,
    ),
    "starcoder2": ("starcoder2", {}, {**GROUPED, EPSILON: 1e-5}, as_it_is),
    "falcon": (
        "falcon",
        {},
        {**WIDE, "attention.head_count_kv": 1, EPSILON: 1e-5, "tensor_data_layout": "jploski"},
        fused(1),
    ),
    "gpt2": ("gpt2", {}, {**WIDE, EPSILON: 1e-5}, upright),
    "bloom": ("bloom", {}, {**WIDE, "attention.head_count_kv": 4, EPSILON: 1e-5}, fused(4)),
    "gptneox": (
        "gpt_neox",
        {},
        {**SHAPE, "feed_forward_length": 128, "rope.dimension_count": 4, "use_parallel_residual": True, EPSILON: 1e-5},
        fused(4),
    ),
    "nemotron": ("nemotron", BASE, {**GROUPED, EPSILON: 1e-5, "rope.dimension_count": 8}, plus_one),
    "command-r": (
        "cohere",
        {"rope_parameters": ROPE},
        {**GROUPED, EPSILON: 1e-5, "logit_scale": 0.0625, "rope.scaling.type": "none"},
        as_it_is,
    ),
    "glm4": ("glm4", {}, {**GROUPED, **SIXTEEN, RMS: 1.5625e-07, "rope.dimension_count": 8}, as_it_is),
}  # fmt: skip
"""As llama.cpp's converter writes them: the model of transformers, its config, the keys, and how tensors lie."""


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_tools_give_the_model_that_they_were_made_of(tmp_path: Path, name: str) -> None:
    architecture, changes, keys, lies = FOREIGN[name]
    wanted = logits_of(made(tmp_path / "float", architecture, **changes | {"vocab_size": len(TOKENS)}))
    reader = CheckpointReader(tmp_path / "float")
    names = gguf.get_tensor_name_map(next(kind for kind, each in gguf.MODEL_ARCH_NAMES.items() if each == name), 2)
    tensors = {}
    for tensor in reader.names():
        stored = names.get_name(tensor, (".weight", ".bias")) or names.get_name(
            tensor.removeprefix("transformer."), (".weight", ".bias")
        )
        tensors[str(stored)] = lies(tensor, reader.read(tensor).float())
    tokens = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.token_type": [3] * 5 + [1] * (len(TOKENS) - 5),
    }  # fmt: skip
    save(tmp_path / "m.gguf", name, {f"{name}.{key}": value for key, value in keys.items()} | tokens, tensors, Q.F32)
    back = resolve(ModelSpec(source=str(tmp_path / "m.gguf"), dtype="own"), tmp_path / "work").folder
    again = CheckpointReader(back)
    assert set(again.names()) == set(reader.names())
    for tensor in again.names():
        torch.testing.assert_close(
            again.read(tensor), reader.read(tensor).float(), rtol=0, atol=2e-7 if lies is plus_one else 0
        )
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["falcon", "gpt2", "lfm2", "mamba", "stablelm"])
def test_sizes_that_no_model_has_are_one_line(tmp_path: Path, name: str) -> None:
    architecture, changes = MODELS[name]
    make(tmp_path / "float", architecture, **changes)
    head = read_head(write_gguf(content_of(tmp_path / "float", None), tmp_path))
    for value in (3, 4_000_000_000, [1, 2], "x", None):
        broken = replace(head, metadata=head.metadata | {f"{head.architecture}.embedding_length": value})
        with pytest.raises(SourceError, match=r"model-F16\.gguf"):
            places_of(broken, model_config(broken, torch.float16), architecture_of(broken))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 256}, "gemma2 model cannot say query_pre_attn_scalar 256"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm True"),
        ("falcon", {"alibi": True}, "alibi True"),
        ("olmo2", {"tie_word_embeddings": True}, "output head that is the input embedding"),
        ("cohere", {"use_qk_norm": True}, "norms of queries and keys in fewer than 64 blocks"),
        ("smollm3", {**BASE, "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("starcoder2", {"use_bias": False}, "use_bias False"),
        ("starcoder2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2_vl", {"text_config": BASE}, "sections .16, 24, 24., which are wider than a head"),
        ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "expand": 4}, "expand 4"),
    ],
)
def test_what_a_graph_does_not_compute_is_refused_by_name(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    make(tmp_path / "float", architecture, **changes)
    with pytest.raises(SourceError, match=message):
        check_source(tmp_path / "float")


def test_what_decides_nothing_is_not_asked_of_a_file(tmp_path: Path) -> None:
    """Keys that no class knows, dropout, and a window as wide as the context."""
    make(tmp_path / "float", "qwen3", **BASE, attention_dropout=0.5)
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    (tmp_path / "float" / "config.json").write_text(json.dumps(config | {"sliding_window": 512, "made_with": "love"}))
    check_source(tmp_path / "float")


def test_what_llama_cpp_leaves_out_is_remarked(tmp_path: Path) -> None:
    make(tmp_path / "a", "phi3", sliding_window=32)
    (window,) = source_remarks(tmp_path / "a", "float16")
    assert "not the last 32 alone" in window
    make(tmp_path / "b", "gemma3", text_config={**BASE, "query_pre_attn_scalar": 16})
    (tower,) = source_remarks(tmp_path / "b", "float16")
    assert "language model alone" in tower


def test_every_architecture_is_tried_here_or_with_the_llamas() -> None:
    tried = {name for name, _ in MODELS.values()} | {"llama", "mistral", "qwen2", "qwen3"}
    tried |= {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}  # of models that see
    assert set(model_types()) <= tried | {each.model_type for each in MIXTURES}  # of those each is tried, too


def table() -> str:
    """The lines of the table in docs/formats.md."""
    kinds: dict[str, list[str]] = {}
    for each in architectures():
        kinds.setdefault(each.name, []).extend((each.model_type, *each.also))
    return "".join(f"| {name} | {', '.join(sorted(kinds[name]))} |\n" for name in sorted(kinds))


def test_the_documentation_lists_them() -> None:
    listed = DOCS.read_text().partition("<!-- architectures -->\n")[2].partition("<!-- end -->")[0]
    assert listed == f"| file | transformers |\n| :-- | :-- |\n{table()}"
