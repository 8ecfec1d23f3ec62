"""GGUF files: what is written is read back, and llama.cpp computes from it what transformers does."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError, SourceError
from quantkit.exports.gguf import GgufExport
from quantkit.exports.gguf_writer import check_source, source_remarks, write_gguf
from quantkit.gguf.imatrix import Importance, write_imatrix
from quantkit.gguf.splitting import SPLITTINGS
from quantkit.gguf.tokenizer_writer import ENDLESS, remarks_on, turn_end
from quantkit.recipe import ModelSpec
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes import PER_CHANNEL, IntScheme, Mxfp4Scheme, Scheme, make_scheme
from quantkit.source import resolve
from quantkit.system.distribution import own_version
from tests.architectures import make
from tests.gguf_models import (
    TEXTS,
    byte_level_tokenizer,
    content_of,
    llama_cpp_tokens,
    model_with,
    sentencepiece_tokenizer,
)
from tests.tiny import CHAT_TEMPLATE, make_model, tiny_tokenizer

Q = gguf.GGMLQuantizationType
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-5}),
}
SCHEMES: list[Scheme] = [
    IntScheme(4, 32),
    IntScheme(4, 64, False, "float"),
    IntScheme(5, PER_CHANNEL),
    IntScheme(5, 32, False, "float"),
    IntScheme(8, 32),
    Mxfp4Scheme(),
]
DECIDING = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "mlp_bias",
)  # fmt: skip


def written(tmp_path: Path, folder: Path, scheme: Scheme | None = None, embedding: Scheme | None = None) -> Path:
    return write_gguf(content_of(folder, scheme, embedding), tmp_path)


def decoded(export: GgufExport) -> dict[str, torch.Tensor]:
    """All parameters in float32."""
    floats = {name: export.float_tensor(name).float() for name in export.float_names()}
    return floats | {f"{layer}.weight": export.weight(layer).dequantize(torch.float32) for layer in export.schemes}


def logits_of(export: GgufExport, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of transformers with the weights of a file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(decoded(export), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    with torch.no_grad():
        logits: torch.Tensor = model(ids.view(1, -1)).logits[0]
    return logits


def logits_of_llama_cpp(path: Path, ids: torch.Tensor) -> torch.Tensor:
    pytest.importorskip("xllamacpp")
    from quantkit.runtimes.llama_cpp import LlamaCpp

    return LlamaCpp.load(path, LoadOptions(context_length=128)).logits(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float_model_is_read_back_as_it_was(tmp_path: Path, name: str) -> None:
    family, changes = FAMILIES[name]
    folder = make_model(tmp_path / "float", family, dtype=torch.float16, **changes)
    check_source(folder)
    path = written(tmp_path, folder)
    assert path.name == "model-F16.gguf"
    source = resolve(ModelSpec(source=str(path)), tmp_path / "work")
    original, again = CheckpointReader(folder), CheckpointReader(source.folder)
    assert set(again.names()) == set(original.names()) - {
        "lm_head.weight" if changes.get("tie_word_embeddings") else "-"
    }
    assert all(torch.equal(again.read(name), original.read(name)) for name in again.names())
    config, found = (json.loads((each / "config.json").read_text()) for each in (folder, source.folder))
    assert {key: found[key] for key in DECIDING if key in config and key in found} == {
        key: config[key] for key in DECIDING if key in config and key in found
    }
    assert found["model_type"] == ("llama" if family == "mistral" else family)
    assert (found["model_type"] == "llama") == ("mlp_bias" in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    """Of float matrices in float16, whose inputs llama.cpp rounds to float16."""
    family, changes = FAMILIES[name]
    folder = make_model(tmp_path / "float", family, **changes)
    path = written(tmp_path, folder)
    ids = torch.arange(5, 69)
    torch.testing.assert_close(
        logits_of_llama_cpp(path, ids), logits_of(GgufExport(path), folder, ids), rtol=0, atol=4e-3
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_from_the_blocks_what_we_decode(tmp_path: Path, family: str, scheme: Scheme) -> None:
    """Up to the 8 bits to which it rounds the inputs; q and k in the wrong order of rows would differ by 0.17."""
    folder = make_model(tmp_path / "float", family)
    path = written(tmp_path, folder, scheme)
    export, ids = GgufExport(path), torch.arange(5, 69)
    assert set(export.schemes.values()) == {scheme}
    ours, theirs = logits_of(export, folder, ids), logits_of_llama_cpp(path, ids)
    assert float(ours.std()) > 0.5
    assert float((ours - theirs).square().mean().sqrt()) < 0.015


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_the_package_gguf_reads_the_file_and_decodes_the_same(tmp_path: Path, scheme: Scheme) -> None:
    path = written(tmp_path, make_model(tmp_path / "float"), scheme)
    reader, weights = gguf.GGUFReader(path), decoded(GgufExport(path))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert stored["blk.0.attn_q.weight"].tensor_type == Q[path.stem.removeprefix("model-")]
    for name, weight in weights.items():
        tensor = stored[names.get_name(name, (".weight",))]
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:
            weight = weight.view(heads, 2, 8, 64).transpose(1, 2).reshape(weight.shape)
        torch.testing.assert_close(weight, theirs, rtol=0, atol=3e-7)


def test_blocks_of_llama_cpp_s_own_types_are_computed_with(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = make_model(tmp_path / "float", hidden_size=256, intermediate_size=256, head_dim=64)
    path = written(tmp_path, folder, make_scheme("q4_k", {}), make_scheme("q6_k", {}))
    assert path.name == "model-Q4_K.gguf"
    export, ids = GgufExport(path), torch.arange(5, 69)
    assert {scheme.kind for scheme in export.schemes.values()} == {"q4_k", "q6_k"}
    ours, theirs = logits_of(export, folder, ids), logits_of_llama_cpp(path, ids)
    assert float((ours - theirs).square().mean().sqrt()) < 0.06 * float(ours.std())


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_embedding_is_the_head_too_where_they_are_tied(tmp_path: Path, tied: bool) -> None:
    folder = make_model(tmp_path / "float", tie_word_embeddings=tied)
    path = written(tmp_path, folder, IntScheme(4, 32), IntScheme(8, 32))
    export, ids = GgufExport(path), torch.arange(5, 69)
    assert export.embedding == "model.embed_tokens"
    assert export.schemes["model.embed_tokens"] == IntScheme(8, 32)
    assert ("output.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}) is not tied
    difference = logits_of_llama_cpp(path, ids) - logits_of(export, folder, ids)
    assert float(difference.square().mean().sqrt()) < 0.01


@pytest.mark.parametrize(
    "splitting",
    ["gpt-2", "mpt", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "falcon", "bloom"],
)
def test_a_byte_level_tokenizer_gives_the_same_tokens_everywhere(tmp_path: Path, splitting: str) -> None:
    tokenizer = byte_level_tokenizer(splitting)
    folder = model_with(tmp_path / "float", tokenizer, rows=len(tokenizer) + 9)
    path = written(tmp_path, folder)
    assert_same_tokens(path, folder)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == splitting
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert (tokens[-1], kinds[-1]) == (f"[PAD{len(tokenizer) + 8}]", 5)
    assert kinds[tokens.index("<think>")] == 4


@pytest.mark.parametrize("spaced", [True, False])
def test_a_sentencepiece_tokenizer_gives_the_same_tokens_everywhere(tmp_path: Path, spaced: bool) -> None:
    """With a space before every text, as Llama's, and without, as Gemma's."""
    tokenizer = sentencepiece_tokenizer()
    if not spaced:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    folder = model_with(tmp_path / "float", tokenizer)
    path = written(tmp_path, folder)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.add_space_prefix"].contents() is spaced
    assert_same_tokens(path, folder)
    assert llama_cpp_tokens(path, "a")[0] == 1


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ],
            "falcon",
        ),
        (
            [
                pre_tokenizers.Split(Regex(SPLITTINGS["gpt-4o"].patterns[0]), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "gpt-4o",
        ),
    ],
)
def test_a_splitting_is_known_however_its_steps_are_called(tmp_path: Path, steps: Any, name: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    folder = model_with(tmp_path / "float", tokenizer)
    path = written(tmp_path, folder)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    assert_same_tokens(path, folder)


def assert_same_tokens(path: Path, folder: Path) -> None:
    pytest.importorskip("xllamacpp")
    export, given = GgufExport(path), AutoTokenizer.from_pretrained(folder)
    again = AutoTokenizer.from_pretrained(export.tokenizer_folder())
    assert again.chat_template == given.chat_template
    assert (again.bos_token_id, again.eos_token_id) == (given.bos_token_id, given.eos_token_id)
    for text in TEXTS:
        wanted = given(text)["input_ids"]
        assert again(text)["input_ids"] == wanted, text
        assert llama_cpp_tokens(path, text) == wanted, text


def test_where_llama_cpp_splits_otherwise_is_remarked(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    assert source_remarks(model_with(tmp_path / "a", tokenizer), "float16") == ()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    folder = model_with(tmp_path / "b", tokenizer)
    check_source(folder)
    (remark,) = source_remarks(folder, "float16")
    assert "space" in remark
    composed, halved = source_remarks(model_with(tmp_path / "c", byte_level_tokenizer("qwen2")), "float32")
    assert "NFC" in composed
    assert "float16" in halved


def reordered(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def without_spaces(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = None


@pytest.mark.parametrize(
    ("tokenizer", "edit", "message"),
    [
        (byte_level_tokenizer, reordered, "no name for.*another format"),
        (sentencepiece_tokenizer, without_spaces, "puts spaces where llama.cpp does not"),
    ],
)
def test_a_tokenizer_that_a_file_cannot_say_is_refused(tmp_path: Path, tokenizer: Any, edit: Any, message: str) -> None:
    made = tokenizer()
    edit(made)
    with pytest.raises(SourceError, match=message):
        check_source(model_with(tmp_path / "float", made))


def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(SourceError, match="embedding has 300 rows"):
        check_source(model_with(tmp_path / "float", tokenizer, rows=300))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("mistral", {"sliding_window": 64}, "sliding_window 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window 64"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}, "max_position_embeddings": 16384}, "llama3"),
    ],
)
def test_a_model_that_a_file_cannot_say_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_model(tmp_path / "float", family, **changes)
    with pytest.raises(SourceError, match=message):
        check_source(folder)


def test_a_model_that_no_file_can_hold_is_refused_with_what_can_be_written(tmp_path: Path) -> None:
    make(tmp_path / "float", "opt")
    with pytest.raises(SourceError, match=r"type 'opt'.*known: .*bloom.*gemma2.*llama.*mistral"):
        check_source(tmp_path / "float")


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    check_source(make_model(tmp_path / "float", "mistral", sliding_window=512))


def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    content = content_of(make_model(tmp_path / "float"), IntScheme(4, 32))
    head = content.floats["lm_head.weight"].read()
    head[3, 4] = 70000.0
    object.__setattr__(content.floats["lm_head.weight"], "read", lambda: head)
    with pytest.raises(QuantkitError, match=r"lm_head\.weight.*float16"):
        write_gguf(content, tmp_path)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "float", dtype=torch.bfloat16)
    path = written(tmp_path, folder, IntScheme(8, 32))
    export = GgufExport(path)
    assert export.config()["dtype"] == "bfloat16"
    assert export.float_dtype("lm_head.weight") == torch.bfloat16
    assert export.float_dtype("model.norm.weight") == torch.float32
    assert torch.equal(export.float_tensor("lm_head.weight"), CheckpointReader(folder).read("lm_head.weight"))
    ids = torch.arange(5, 69)
    difference = logits_of_llama_cpp(path, ids) - logits_of(export, folder, ids)
    assert float(difference.square().mean().sqrt()) < 0.02


def test_an_export_tells_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "float" / "LICENSE").write_text("Do what you like.")
    folder = make_model(tmp_path / "float")
    path = written(tmp_path, folder, IntScheme(4, 64))
    export = GgufExport(path)
    assert export.made_by == f"quantkit {own_version()}"
    assert export.format == "gguf"
    assert export.embedding is None
    assert export.shape("model.layers.0.mlp.down_proj") == (64, 128)
    assert export.layer_bytes("model.layers.0.mlp.down_proj") == 64 * 128 // 32 * 18
    assert export.files() == [path]
    assert set(export.float_names()) == {name for name in CheckpointReader(folder).names() if "_proj" not in name}
    fields = gguf.GGUFReader(path).fields
    facts = {key: fields[f"general.{key}"].contents() for key in ("architecture", "name", "license", "file_type")}
    assert facts == {"architecture": "llama", "name": "float", "license": "apache-2.0", "file_type": 2}
    assert (tmp_path / "LICENSE").read_text() == "Do what you like."


def test_the_tokenizer_s_folder_goes_with_the_export(tmp_path: Path) -> None:
    export = GgufExport(written(tmp_path, make_model(tmp_path / "float")))
    folder = export.tokenizer_folder()
    assert folder == export.tokenizer_folder()
    assert (folder / "tokenizer.json").is_file()
    del export
    assert not folder.exists()


def test_ollama_is_told_where_a_turn_ends(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "float")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    path = written(tmp_path, folder, IntScheme(4, 32))
    assert (tmp_path / "Modelfile").read_text() == (
        'FROM ./model-Q4_0.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    )
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 4
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE


def test_the_mark_with_which_the_template_ends_an_answer_is_a_stop(tmp_path: Path) -> None:
    path = written(tmp_path, make_model(tmp_path / "float"), IntScheme(4, 32))  # EOS is </s>, the template has another
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "Modelfile").read_text()
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.eot_token_id"].contents() == 4


@pytest.mark.parametrize(
    ("ending", "mark", "remarked"),
    [("<|stop|>\n", "<|stop|>", False), ("</s>", "</s>", False), ("\n### Human: ", None, True), ("", None, False)],
)
def test_how_a_template_ends_an_answer(ending: str, mark: str | None, remarked: bool) -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}" + ending + "{% endfor %}")
    assert turn_end(tokenizer) == mark
    assert (ENDLESS in remarks_on(tokenizer)) == remarked
    refusing = tiny_tokenizer("{{ raise_exception('no') }}")
    assert (turn_end(refusing), ENDLESS in remarks_on(refusing)) == (None, False)


def test_only_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    content = content_of(make_model(tmp_path / "float"), IntScheme(4, 32))
    held: list[Any] = []
    for stored in (*content.floats.values(), *(each["weight"] for each in content.packed.values())):
        object.__setattr__(stored, "read", counted(stored.read, held))
    write_gguf(content, tmp_path)
    assert len(held) >= len(content.floats) + len(content.packed)


def counted(read: Any, held: list[Any]) -> Any:
    """A reader that refuses to read while what was read before is alive."""

    def reads() -> torch.Tensor:
        assert not held or held[-1]() is None
        tensor: torch.Tensor = read().clone()
        held.append(weakref.ref(tensor))
        return tensor

    return reads


def test_files_of_other_tools_are_read_by_their_types(tmp_path: Path) -> None:
    path = written(tmp_path, make_model(tmp_path / "float"), IntScheme(4, 64))
    foreign = without_keys(path, "quantkit.schemes", "quantkit.version", "general.quantized_by")
    export = GgufExport(foreign)
    assert export.made_by == "unknown"
    assert set(export.schemes.values()) == {IntScheme(4, 32)}
    layer = "model.layers.1.self_attn.k_proj"
    assert torch.equal(export.weight(layer).dequantize(), GgufExport(path).weight(layer).dequantize())


def without_keys(path: Path, *keys: str, **texts: str) -> Path:
    """A copy of a file without some keys, or with other texts for them."""
    reader, copy = gguf.GGUFReader(path), path.with_name("copy.gguf")
    writer = gguf.GGUFWriter(copy, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (*keys, "general.architecture") or not field.data:
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = texts.get(name.replace(".", "_"), field.contents())
        writer.add_key_value(name, value, kind, sub_type=inner)
    writer.add_key_value("tokenizer.ggml.merges", ["Ġ Ġ"], gguf.GGUFValueType.ARRAY)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    tokens[-1] = "ĠĠ"
    writer.add_key_value("tokenizer.ggml.tokens", tokens, gguf.GGUFValueType.ARRAY)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "does not map layers"),
        ("{", "does not map layers"),
        ('{"model.layers.0.mlp.up_proj": {"kind": "int", "bits": 8, "group_size": 32}}', "not of the scheme int8"),
        ('{"model.layers.0.mlp.up_proj": {"kind": "no"}}', "unknown scheme 'no'"),
    ],
)
def test_noted_schemes_that_are_not_the_file_s_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, make_model(tmp_path / "float"), IntScheme(4, 32))
    with pytest.raises(QuantkitError, match=message):
        GgufExport(without_keys(path, quantkit_schemes=text))


def test_a_broken_file_is_a_broken_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path, make_model(tmp_path / "float"), IntScheme(4, 32))
    export = GgufExport(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        GgufExport(path)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        [export.weight(layer) for layer in export.schemes] + [
            export.float_tensor(name) for name in export.float_names()
        ]


def test_an_importance_matrix_has_llama_cpp_s_layout(tmp_path: Path) -> None:
    folder, strength = make_model(tmp_path / "float"), torch.rand(64)
    found = {
        "model.layers.0.self_attn.q_proj": Importance(strength, 1000),
        "model.layers.1.mlp.down_proj": Importance(torch.ones(128), 900),
    }
    write_imatrix(tmp_path / "imatrix.gguf", found, origin=folder, datasets=["prose.txt"], chunk_size=96)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    assert facts == {
        "general.type": "imatrix",
        "imatrix.datasets": ["prose.txt"],
        "imatrix.chunk_count": 10,
        "imatrix.chunk_size": 96,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [
        "blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts",
        "blk.1.ffn_down.weight.in_sum2", "blk.1.ffn_down.weight.counts",
    ]  # fmt: skip
    sums, counts = tensors["blk.0.attn_q.weight.in_sum2"], tensors["blk.0.attn_q.weight.counts"]
    assert (list(sums.shape), list(counts.shape)) == ([64, 1], [1, 1])
    numpy.testing.assert_allclose(sums.data / counts.data, strength.view(1, -1).numpy(), rtol=1e-6)


def test_an_importance_beside_a_layer_stays_out_of_the_file(tmp_path: Path) -> None:
    content = content_of(make_model(tmp_path / "float"), IntScheme(4, 32))
    layer = next(iter(content.packed))
    packed = {**content.packed, layer: {**content.packed[layer], "importance": content.packed[layer]["weight"]}}
    path = write_gguf(replace(content, packed=packed), tmp_path)
    assert not [tensor.name for tensor in gguf.GGUFReader(path).tensors if "importance" in tensor.name]
