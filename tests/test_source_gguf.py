from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import SourceError
from quantkit.gguf.head import read_head
from quantkit.recipe import ModelSpec
from quantkit.source import SourceModel, resolve
from tests.tiny import CHAT_TEMPLATE, SPECIAL, make_model

Q = gguf.GGMLQuantizationType
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "12"]
TEXT = "<|im_start|>user\nIn  1234 the cat's   hat\n\n<|im_end|> naïve"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows in which llama.cpp stores queries and keys."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def kind_of(name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType | None) -> gguf.GGMLQuantizationType:
    if tensor.ndim == 1:
        return Q.F32
    mixture = {"down": Q.Q8_0, "embd": Q.F16}
    return mixture.get(name.split(".")[-2].split("_")[-1], Q.Q4_1) if kind is None else kind


def write_gguf(
    path: Path,
    family: str = "llama",
    kind: gguf.GGMLQuantizationType | None = None,
    pre: str = "smollm",
    edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object] = lambda keys, tensors: None,
    **changes: Any,
) -> Path:
    """Write a random model of ``family`` as GGUF, and as float32 to the folder ``float`` beside it."""
    changes = {"vocab_size": len(TOKENS), "rms_norm_eps": 1e-5, "tie_word_embeddings": True} | changes
    folder = make_model(path.parent / "float", family, **changes)
    config = json.loads((folder / "config.json").read_text())
    reader = CheckpointReader(folder)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 2)
    tensors = {}
    for name in reader.names():
        tensor = reader.read(name)
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = permuted(tensor, 4 if "q_proj" in name else 2)
        tensors[str(names.get_name(name, (".weight", ".bias")))] = tensor
    keys: dict[str, Any] = {
        f"{family}.block_count": 2,
        f"{family}.context_length": 512,
        f"{family}.embedding_length": 64,
        f"{family}.feed_forward_length": 128,
        f"{family}.attention.head_count": 4,
        f"{family}.attention.head_count_kv": 2,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.attention.key_length": 16,
        f"{family}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    edit(keys, tensors)
    save(path, family, keys, tensors, kind)
    return path


def save(
    path: Path,
    family: str,
    keys: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    kind: gguf.GGMLQuantizationType | None,
) -> None:
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", family))
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, tensor in tensors.items():
        stored = kind_of(name, tensor, kind)
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(path: Path, **spec: Any) -> SourceModel:
    return resolve(ModelSpec(source=str(path), **spec), path.parent / "work")


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_file_gives_the_model_back_that_it_was_made_from(tmp_path: Path, family: str, tied: bool) -> None:
    source = converted(write_gguf(tmp_path / "m.gguf", family, Q.F32, tie_word_embeddings=tied), dtype="own")
    assert (source.kind, source.dtype, source.relative_to) == ("gguf", "float32", "the float model")
    ours, original = CheckpointReader(source.folder), CheckpointReader(tmp_path / "float")
    assert set(ours.names()) == set(original.names())
    assert ("lm_head.weight" in ours) is not tied
    assert all(torch.equal(ours.read(name), original.read(name)) for name in original.names())
    ids = torch.arange(24).view(1, -1)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source.folder, tmp_path / "float")]
    logits = [model(ids).logits for model in models]
    assert torch.equal(logits[0], logits[1])


def test_biases_of_a_llama_are_read_and_put_in_order(tmp_path: Path) -> None:
    source = converted(write_gguf(tmp_path / "m.gguf", kind=Q.F32, attention_bias=True, mlp_bias=True), dtype="own")
    ours, original = CheckpointReader(source.folder), CheckpointReader(tmp_path / "float")
    assert "model.layers.0.self_attn.q_proj.bias" in ours
    assert set(ours.names()) == set(original.names())
    assert all(torch.equal(ours.read(name), original.read(name)) for name in original.names())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dequantized_weights_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    pytest.importorskip("accelerate")
    path = write_gguf(tmp_path / "m.gguf", family)
    source = converted(path, dtype="float32")
    assert source.relative_to == "the dequantized source"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    ours = CheckpointReader(source.folder)
    assert set(theirs) - set(ours.names()) == {"lm_head.weight"}
    assert all(torch.equal(ours.read(name), theirs[name]) for name in ours.names())
    original = CheckpointReader(tmp_path / "float")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (ours.read(name) - original.read(name)).abs().max() < 0.05


def test_the_config_agrees_with_transformers(tmp_path: Path) -> None:
    source = converted(write_gguf(tmp_path / "m.gguf"))
    ours = json.loads((source.folder / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    float_noise = theirs.pop("rms_norm_eps")
    assert ours.pop("rms_norm_eps") == 1e-5
    assert float_noise == pytest.approx(1e-5)
    known = set(ours) - {"architectures", "dtype", "head_dim"}
    assert {key: ours[key] for key in known} == {key: theirs[key] for key in known}
    assert ours["dtype"] == "float16"
    assert ours["head_dim"] == 16
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(ours)


def test_generation_stops_at_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", edit=lambda keys, _: keys.update({"tokenizer.ggml.eot_token_id": 4}))
    generation = json.loads((converted(path).folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}


def test_auto_is_float16_for_a_quantized_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    half, full = converted(path), resolve(ModelSpec(source=str(path), dtype="float32"), tmp_path / "full")
    assert half.dtype == "float16"
    readers = CheckpointReader(half.folder), CheckpointReader(full.folder)
    for name in readers[0].names():
        assert torch.equal(readers[0].read(name), readers[1].read(name).half())


def test_auto_keeps_bfloat16(tmp_path: Path) -> None:
    source = converted(write_gguf(tmp_path / "m.gguf", kind=Q.BF16))
    assert source.dtype == "bfloat16"
    name = "model.layers.1.mlp.up_proj.weight"
    original = CheckpointReader(tmp_path / "float").read(name).bfloat16()
    assert torch.equal(CheckpointReader(source.folder).read(name), original)


def test_large_tensors_are_dequantized_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    whole = converted(path)
    monkeypatch.setattr("quantkit.gguf.tensors.CHUNK_VALUES", 200)
    parts = resolve(ModelSpec(source=str(path)), tmp_path / "parts")
    readers = CheckpointReader(whole.folder), CheckpointReader(parts.folder)
    assert all(torch.equal(readers[0].read(name), readers[1].read(name)) for name in readers[0].names())


def test_a_value_beyond_float16_names_the_tensor_and_the_remedy(tmp_path: Path) -> None:
    def edit(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["blk.1.ffn_norm.weight"][3] = 70000.0

    path = write_gguf(tmp_path / "m.gguf", edit=edit)
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_norm\.weight.*too large for float16.*model\.dtype: bfloat16"):
        converted(path)
    assert not list((tmp_path / "work").iterdir())
    assert converted(path, dtype="float32").dtype == "float32"


def test_the_conversion_is_done_once_for_the_same_content(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    first = converted(path)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert converted(path) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    other = converted(path, dtype="bfloat16")
    assert other.made_from() != first.made_from()
    assert CheckpointReader(other.folder).dtype("model.norm.weight") == torch.bfloat16


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    file = converted(path).folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    converted(path)
    assert file.read_bytes() == whole


def test_the_tokenizer_splits_as_the_model_was_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(converted(write_gguf(tmp_path / "m.gguf")).folder)
    tokens = tokenizer.tokenize(TEXT)
    assert tokens[0] == "<|im_start|>"
    assert "Ġthe" in tokens
    assert "12" not in tokens  # single digits
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["In", "Ġ", "Ġ1234", "Ġthe"]),
        ("smollm", ["In", "ĠĠ", "1", "2", "3", "4", "Ġthe"]),
        ("llama-bpe", ["In", "Ġ", "Ġ", "123", "4", "Ġthe"]),
        ("qwen2", ["In", "Ġ", "Ġ", "1", "2", "3", "4", "Ġthe"]),
        ("tekken", ["In", "Ġ", "Ġ", "1", "2", "3", "4", "Ġthe"]),
    ],
)
def test_each_name_of_a_splitting_splits_its_own_way(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_of(converted(write_gguf(tmp_path / "m.gguf", pre=pre)).folder)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In  1234 the")
    assert [piece for piece, _ in split] == pieces


@pytest.mark.parametrize(("stated", "begins"), [(None, True), (True, True), (False, False)])
def test_bos_is_added_as_the_file_or_the_family_says(tmp_path: Path, stated: bool | None, begins: bool) -> None:
    def edit(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del keys["tokenizer.ggml.add_bos_token"]
        keys |= {} if stated is None else {"tokenizer.ggml.add_bos_token": stated}

    tokenizer = tokenizer_of(converted(write_gguf(tmp_path / "m.gguf", pre="llama-bpe", edit=edit)).folder)
    assert (tokenizer("cat")["input_ids"][0] == 1) is begins


def test_the_chat_template_is_kept(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(converted(write_gguf(tmp_path / "m.gguf")).folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_tokenizer_files_beside_the_file_are_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    assert tokenizer_of(converted(path).folder).eos_token == "</s>"


def test_a_sentencepiece_vocabulary_is_converted(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "c", "a", "t", "ca", "cat"]

    def edit(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del keys["tokenizer.ggml.merges"], keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.add_bos_token"]
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
            "tokenizer.ggml.unknown_token_id": 0,
        }

    tokenizer = tokenizer_of(converted(write_gguf(tmp_path / "m.gguf", edit=edit)).folder)
    ids = tokenizer("cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁", "cat"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat"


def llama3_divisors(theta: float = 10000.0, factor: float = 32.0, low: float = 1.0) -> torch.Tensor:
    frequencies = theta ** -(torch.arange(0, 16, 2) / 16)
    config = AutoConfig.for_model(
        "llama",
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    divisors: torch.Tensor = frequencies / scaled
    return divisors


def test_the_rope_of_llama_3_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", edit=lambda _, tensors: tensors.update({"rope_freqs.weight": llama3_divisors(5e5)}),
        rope_theta=5e5,
    )  # fmt: skip
    config = json.loads((converted(path).folder / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def set_key(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], object]:
    return lambda keys, tensors: keys.update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_key("general.architecture", "lama"), "architecture 'lama'.*did you mean 'llama'.*qwen2, .*qwen3"),
        (set_key("split.count", 3), "one of 3 parts.*name it as NAME-00001-of-00003.gguf"),
        (set_key("llama.expert_count", 8), "'expert_used_count' is None"),
        (set_key("llama.rope.scaling.type", "dynamic"), "'dynamic'"),
        (set_key("llama.rope.scaling.type", "yarn"), "rope.scaling.factor"),
        (set_key("llama.rope.dimension_count", 8), "rope.dimension_count differs"),
        (set_key("llama.block_count", 3), "claims 3 blocks and holds 2"),
        (set_key("llama.block_count", 2_000_000_000), "claims 2000000000 blocks"),
        (set_key("llama.feed_forward_length", 96), "blk.0.ffn_gate.weight.*shape"),
        (set_key("llama.attention.head_count", [4, 4]), "attention.head_count"),
        (set_key("llama.attention.head_count", 0), "attention.head_count"),
        (set_key("llama.embedding_length", 3), "m.gguf"),
        (set_key("llama.embedding_length", 4_000_000_000), "m.gguf"),
        (set_key("llama.no_such_key", 1), "sets llama.no_such_key, which quantkit cannot convert"),
        (set_key("llama.attention.head_count", 3), "m.gguf"),
        (set_key("llama.attention.head_count_kv", 4_000_000_000), "m.gguf"),
        (set_key("llama.rope.freq_base", float("nan")), "rope.freq_base"),
        (set_key("tokenizer.ggml.eos_token_id", 99999), "eos_token_id 99999"),
        (set_key("tokenizer.ggml.unknown_token_id", 99999), "unknown token 99999"),
        (set_key("tokenizer.ggml.model", "t5"), "tokenizer model 't5'"),
        (set_key("tokenizer.ggml.pre", "smolm"), "'smolm' splits text.*did you mean 'smollm'"),
        (set_key("tokenizer.ggml.merges", ["q zz"]), "merge 'q zz'"),
        (set_key("tokenizer.ggml.tokens", "x"), "tokenizer.ggml.tokens"),
        (lambda keys, _: keys.pop("llama.context_length"), "context_length"),
        (lambda _, tensors: tensors.pop("blk.1.attn_k.weight"), "no tensor 'blk.1.attn_k.weight'"),
        (lambda _, tensors: tensors.pop("token_embd.weight"), "no tensor 'token_embd.weight'"),
        (lambda _, tensors: tensors.update({"blk.0.x": torch.ones(32)}), "'blk.0.x', which llama has no place for"),
        (lambda _, tensors: tensors.update({"rope_freqs.weight": torch.full((8,), 2.0)}), "rope scaling of Llama 3"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    tmp_path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", edit=edit)
    with pytest.raises(SourceError, match=message):
        converted(path)
    assert not (tmp_path / "work" / "source").exists()


def replaced(data: bytes, begin: int, new: bytes) -> bytes:
    return data[:begin] + new + data[begin + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "m.gguf"),
        (lambda data: b"GGML" + data[4:], "does not begin with 'GGUF'"),
        (lambda data: data[:3], "ends inside its header"),
        (lambda data: data[:5000], "ends inside its header"),
        (lambda data: data[:-100], "ends at byte"),
        (lambda data: replaced(data, 4, struct.pack("<I", 1)), "version 1"),
        (lambda data: replaced(data, 4, struct.pack(">I", 3)), "byte order"),
        (lambda data: replaced(data, 8, struct.pack("<Q", 1 << 60)), "claims"),
        (lambda data: replaced(data, 16, struct.pack("<Q", 1 << 60)), "claims"),
        (lambda data: replaced(data, 24, struct.pack("<Q", 1 << 63)), "ends inside its header"),
        (lambda data: replaced(data, 8, struct.pack("<Q", 1 << 16)), "m.gguf"),
    ],
)
def test_a_broken_file_is_refused_at_once(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(damage(path.read_bytes()))
    begin = time.perf_counter()
    with pytest.raises(SourceError, match=message):
        converted(path)
    assert time.perf_counter() - begin < 2


def test_an_absurd_array_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = struct.pack("<Q", 1) + b"k"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(64))
    with pytest.raises(SourceError, match="array items"):
        converted(path)


def test_a_deeply_nested_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = struct.pack("<Q", 1) + b"k"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999
    )
    with pytest.raises(SourceError, match="array of the unknown type 9"):
        converted(path)


def test_tensors_that_share_bytes_cannot_blow_the_checkpoint_up(tmp_path: Path) -> None:
    row = struct.pack("<Q", 2) + b"%c%c" + struct.pack("<IQIQ", 1, 1 << 10, 0, 0)
    rows = b"".join(row % (65 + number // 26, 65 + number % 26) for number in range(200))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 200, 0) + rows + bytes(8192))
    with pytest.raises(SourceError, match="tensors overlap"):
        converted(path)


def test_a_head_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    end = min(tensor.start for tensor in read_head(path).tensors.values())
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        place = chance.randrange(end)
        path.write_bytes(replaced(whole, place, bytes([chance.randrange(256)])))
        try:
            read_head(path)
        except SourceError:
            refused += 1
    assert refused > 20


def test_a_type_that_gguf_cannot_dequantize_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, kind=Q.F32)
    data = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 16
    path.write_bytes(replaced(data, place, struct.pack("<I", int(Q.I32))))
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_up\.weight.*type I32"):
        converted(path)


def test_a_file_that_is_not_gguf_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"not a GGUF file.*folder that holds config\.json"):
        converted(tmp_path / "m.safetensors")


def test_quantize_then_dequantize_is_gguf_s_own(tmp_path: Path) -> None:
    source = converted(write_gguf(tmp_path / "m.gguf"), dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    original = CheckpointReader(tmp_path / "float").read(name).numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, Q.Q8_0), Q.Q8_0)
    assert numpy.array_equal(CheckpointReader(source.folder).read(name).numpy(), expected)
