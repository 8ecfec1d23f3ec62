"""A merged model computes what PEFT's un-merged base and adapter do, and what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError, SourceError
from quantkit.exports import open_export
from quantkit.merging import merge_model
from quantkit.merging.base import check_base
from quantkit.merging.layers import nf4_round_trip
from quantkit.pipeline import run
from quantkit.pipeline.plan import forecast
from quantkit.pipeline.single import quantize_one
from quantkit.recipe import Recipe
from quantkit.system.artifacts import read_json, write_json
from tests.adapters import make_adapter, names_in, unmerged, unmerged_logits
from tests.runs import (
    Notebook,
    config_of,
    files_with_times,
    hidden_names,
    load_whole,
    logits,
    make_recipe,
    recipe_data,
    score_here,
)
from tests.tiny import VOCABULARY, make_model

TOLERANCE = 2e-5
"""Of float32 logits whose size is about 3."""
ROWS = VOCABULARY + 9
VARIANTS = [{"name": "int8", "method": "rtn", "bits": 8}, {"name": "int4", "method": "gptq", "bits": 4}]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "every linear layer": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "ranks and alphas": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    "ranks and rslora": {"rank_pattern": {"down_proj": 2}, "use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "one block": {"layers_to_transform": [1]},
    "norms whole": {"modules_to_save": ["norm"]},
    "head whole": {"modules_to_save": ["lm_head"]},
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "embedding and head whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "some tokens": {"trainable_token_indices": [3, 7, 40]},
}
PLAIN = {name for name in ADAPTERS if "embedding" not in name and "head" not in name}
"""Those that touch neither of a tied pair apart from the other."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny-llama", shards=3)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny-tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora", base)


def merged_logits(base: Path, adapters: Any, out: Path, **settings: Any) -> torch.Tensor:
    merge_model(str(base), adapters, out, **settings)
    return logits(load_whole(out))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merge_computes_what_peft_does(base: Path, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **ADAPTERS[kind])
    wanted = unmerged_logits(base, (adapter, 1.0))
    assert (wanted - logits(load_whole(base))).abs().max() > 100 * TOLERANCE
    assert_close(merged_logits(base, str(adapter), tmp_path / "out"), wanted)


@pytest.mark.parametrize("kind", ["lora", "some tokens", *(name for name in ADAPTERS if name not in PLAIN)])
def test_tied_embeddings_stay_tied_only_if_both_are_the_same(tied: Path, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tied, **ADAPTERS[kind])
    found = merged_logits(tied, str(adapter), tmp_path / "out")
    assert_close(found, unmerged_logits(tied, (adapter, 1.0)))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is (kind in PLAIN)
    assert ("lm_head.weight" in names_in(tmp_path / "out")) is (kind not in PLAIN)


@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_adapters_that_keep_the_tie_keep_it(tied: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tied, ensure_weight_tying=True, **changes)
    found = merged_logits(tied, str(adapter), tmp_path / "out")
    assert_close(found, unmerged_logits(tied, (adapter, 1.0)))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


def test_biases_of_layers_that_have_some(tmp_path: Path) -> None:
    base = make_model(tmp_path / "qwen2", "qwen2")
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"], lora_bias=True, bias="lora_only"
    )
    assert_close(merged_logits(base, str(adapter), tmp_path / "out"), unmerged_logits(base, (adapter, 1.0)))


def test_a_head_that_the_file_calls_otherwise_keeps_its_name(tmp_path: Path) -> None:
    base = make_model(tmp_path / "neox", "gpt_neox")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query_key_value", "lm_head"])
    assert_close(merged_logits(base, str(adapter), tmp_path / "out"), unmerged_logits(base, (adapter, 1.0)))
    assert names_in(tmp_path / "out") == names_in(base)


@pytest.mark.parametrize("kind", ["lora", "embedding whole", "embedding and head whole"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_added_tokens_come_with_their_rows_and_tokenizer(
    base: Path, tied: Path, kind: str, is_tied: bool, tmp_path: Path
) -> None:
    source = tied if is_tied else base
    adapter = make_adapter(tmp_path / "adapter", source, rows=ROWS, tokenizer=True, **ADAPTERS[kind])
    found = merged_logits(source, str(adapter), tmp_path / "out")
    assert_close(found, unmerged_logits(source, (adapter, 1.0), rows=ROWS))
    assert found.shape[-1] == config_of(tmp_path / "out")["vocab_size"] == ROWS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<added8>") == ROWS - 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"


def test_a_base_in_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = make_model(tmp_path / "half", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    name = "model.layers.0.self_attn.q_proj"
    tuned = unmerged(base, (adapter, 1.0)).base_model.model.get_submodule(name)
    exact = tuned.base_layer.weight + tuned.get_delta_weight("0")
    facts = merge_model(str(base), str(adapter), tmp_path / "out")
    stored = CheckpointReader(tmp_path / "out").read(f"{name}.weight")
    assert torch.equal(stored, exact.to(torch.bfloat16))
    assert 0 < facts["check"]["relative_difference"] < facts["check"]["tolerance"]
    wide = merge_model(str(base), str(adapter), tmp_path / "wide", dtype="float32")
    assert torch.equal(CheckpointReader(tmp_path / "wide").read(f"{name}.weight"), exact)
    assert wide["check"]["relative_difference"] < facts["check"]["relative_difference"] / 100
    assert config_of(tmp_path / "wide")["dtype"] == "float32"


def test_what_no_adapter_changes_is_as_it_was(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_model(str(base), str(adapter), tmp_path / "out")
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "out")
    changed = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    assert changed == {
        f"model.layers.{block}.{layer}.weight" for block in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert set(before.names()) == set(after.names())


def test_weighted_adapters_add_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = make_adapter(tmp_path / "second", base, target_modules=["q_proj", "v_proj"], r=8, seed=1)
    chosen = [{"source": str(adapter), "weight": 0.7}, {"source": str(second), "weight": -0.4}]
    found = merged_logits(base, chosen, tmp_path / "out")
    assert_close(found, unmerged_logits(base, (adapter, 0.7), (second, -0.4)))


def test_a_qlora_adapter_is_merged_into_what_bitsandbytes_decodes(base: Path, adapter: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    merge_model(str(base), str(adapter), tmp_path / "nf4", base_weights="nf4")
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "nf4")
    for name in before.names():
        weight = before.read(name)
        if "proj" in name:
            packed, state = functional.quantize_4bit(
                weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            weight = functional.dequantize_4bit(packed, state).float()
        if "q_proj" in name or "down_proj" in name:
            tuned = unmerged(base, (adapter, 1.0)).base_model.model.get_submodule(name.removesuffix(".weight"))
            weight = weight + tuned.get_delta_weight("0")
        assert torch.equal(after.read(name), weight), name


@pytest.mark.parametrize(("shape", "flat"), [((4, 64), (4, 64)), ((6, 96), (9, 64)), ((3, 7), (3, 7))])
def test_nf4_blocks_run_on_from_row_to_row(shape: tuple[int, int], flat: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    blocks = weight.view(flat)  # on a CPU bitsandbytes decodes rows of whole blocks alone
    packed, state = functional.quantize_4bit(blocks, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(nf4_round_trip(weight, torch.float32), functional.dequantize_4bit(packed, state).view(shape))


def test_every_merge_is_compared_with_peft_on_a_prompt(base: Path, adapter: Path, tmp_path: Path) -> None:
    facts = merge_model(str(base), str(adapter), tmp_path / "out")
    check = read_json(tmp_path / "out" / "stage.json")["check"]
    assert check == facts["check"]
    assert check["max_abs_difference"] < TOLERANCE < check["tolerance"]
    assert check["kl_divergence"] < 1e-9 < 1e-3 < check["adapter_kl_divergence"]
    assert check["tokens"] > 50


def test_a_merge_that_computes_something_else_is_not_kept(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.merging import tensors
    from quantkit.merging.layers import add_adapter as right

    def wrong(layer: Any, adapter: Any, module: str) -> Any:
        return layer if "down_proj" in module else right(layer, adapter, module)

    monkeypatch.setattr(tensors, "add_adapter", wrong)
    with pytest.raises(CheckpointError, match="logits differ from PEFT's by"):
        merge_model(str(base), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hidden_names(tmp_path)


def test_a_model_too_large_for_the_comparison_says_so(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.merging import check

    monkeypatch.setattr(check, "SHARE_OF_MEMORY", 0.0)
    watching = Notebook()
    facts = merge_model(str(base), str(adapter), tmp_path / "out", observer=watching)
    assert set(facts["check"]) == {"skipped"}
    assert any("not compared with PEFT" in note for note in watching.notes)


def test_a_finished_merge_is_reused_and_another_made_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_model(str(base), str(adapter), out)
    written = (out / "stage.json").stat().st_mtime_ns
    merge_model(str(base), str(adapter), out)
    assert (out / "stage.json").stat().st_mtime_ns == written
    merge_model(str(base), [{"source": str(adapter), "weight": 0.5}], out)
    assert (out / "stage.json").stat().st_mtime_ns != written


def test_the_global_generator_is_left_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    merge_model(str(base), str(adapter), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


def packed(adapter: Path, archive: Path, inside: str = "") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as target:
            for file in adapter.iterdir():
                target.write(file, f"{inside}{file.name}")
    else:
        with tarfile.open(archive, "w:gz") as tape:
            for file in adapter.iterdir():
                tape.add(file, f"{inside}{file.name}")
    return archive


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("inside", ["", "run/checkpoint-9/"])
def test_an_archive_is_as_good_as_its_folder(base: Path, adapter: Path, name: str, inside: str, tmp_path: Path) -> None:
    archive = packed(adapter, tmp_path / name, inside)
    found = merged_logits(base, str(archive), tmp_path / "out")
    assert_close(found, unmerged_logits(base, (adapter, 1.0)))
    assert not hidden_names(tmp_path)


def refusal(base: Path, adapter: Any, out: Path, **settings: Any) -> str:
    with pytest.raises(QuantkitError) as caught:
        merge_model(str(base), adapter, out, **settings)
    assert not out.exists()
    assert not hidden_names(out.parent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **changes})

    return change


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def poisoned(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY][2, 5] = value

    return poison


def whole_block_missing(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".layers.1.mlp." in key]:
        del tensors[key]


def torn_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong base": (
        edit_config(base_model_name_or_path="org/Other-7B"),
        "was trained on 'org/Other-7B', and the base is",
    ),
    "quantized name": (
        edit_config(base_model_name_or_path="org/Other-AWQ"),
        "give its float original, and set merge.an",
    ),
    "pickle": (pickled, "holds only pickled weights (adapter_model.bin), which can run code"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "broken config": (torn_config, "cannot be read as JSON"),
    "cut off": (lambda folder: shortened(folder / "adapter_model.safetensors"), "adapter_model.safetensors has"),
    "rank": (edit_config(r=8), "has the shape [4, 128], and the rank of its layer is 8 by adapter_config.json"),
    "no A": (edit_tensors(lambda tensors: tensors.__delitem__(KEY)), f"lacks the tensor '{KEY}'"),
    "no layer": (edit_tensors(whole_block_missing), "targets the layer 'model.layers.1.mlp.down_proj' and holds no"),
    "nan": (edit_tensors(poisoned(float("nan"))), f"tensor '{KEY}' of"),
    "inf": (edit_tensors(poisoned(float("-inf"))), "is -inf at index [2, 5]"),
    "another layer": (
        edit_tensors(lambda tensors: tensors.update({KEY.replace("layers.0", "layers.9"): tensors[KEY].clone()})),
        "lacks the tensor 'base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight'",
    ),
    "no such parameter": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(2, 64)})),
        "'base_model.model.score.weight' fits no layer of the base, which has no 'score.weight'",
    ),
    "foreign names": (
        edit_tensors(lambda tensors: tensors.update({"lora_unet_down.weight": torch.zeros(2)})),
        "tensor 'lora_unet_down.weight' is not named as PEFT names",
    ),
    "columns": (
        edit_tensors(lambda tensors: tensors.update({KEY: torch.zeros(4, 32)})),
        f"tensor '{KEY}' has the shape [4, 32], which does not fit the base's [64, 64]",
    ),
    "a norm's shape": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.zeros(32)})),
        "has the shape [32], and the base's 'model.norm.weight' [64]",
    ),
    "embedding alone resized": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(ROWS, 64)})),
        f"after the merge model.embed_tokens.weight would have {ROWS} rows and lm_head.weight {VOCABULARY}",
    ),
    "dora without magnitudes": (edit_config(use_dora=True), ".lora_magnitude_vector'"),
    "prefix tuning": (edit_config(peft_type="PREFIX_TUNING"), "is of the type PREFIX_TUNING, not LORA"),
    "parameters": (edit_config(target_parameters=["w"]), "adapts the parameter 'w', which the base does not have"),
    "replicated layers": (edit_config(layer_replication=[[0, 2]]), "repeats layers of its base"),
    "loftq": (edit_config(init_lora_weights="corda"), "was initialized by 'corda', which is not merged here"),
    "a newer peft": (edit_config(use_new_thing=True), "has the key 'use_new_thing', which the installed PEFT does not"),
    "no rank": (edit_config(r=0), "has a rank that is no count"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_adapter_is_one_clear_line(base: Path, adapter: Path, mistake: str, tmp_path: Path) -> None:
    change, expected = MISTAKES[mistake]
    broken = shutil.copytree(adapter, tmp_path / "broken")
    change(broken)
    assert expected in refusal(base, str(broken), tmp_path / "out")


def test_a_quantized_base_is_refused_with_the_way_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantized = shutil.copytree(base, tmp_path / "tiny-llama")
    write_json(quantized / "config.json", {**config_of(base), "quantization_config": {"quant_method": "bitnet"}})
    assert "is quantized already (quantization_config of bitnet) (give the float model" in refusal(
        quantized, str(adapter), tmp_path / "out"
    )


def test_tokens_without_rows_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "own")
    make_adapter(tmp_path / "resized", base, rows=ROWS, tokenizer=True)
    for file in (tmp_path / "resized").glob("tokenizer*"):
        shutil.copyfile(file, own / file.name)
    expected = f"the tokenizer has {ROWS} tokens and the merged embedding {VOCABULARY} rows"
    assert expected in refusal(base, str(own), tmp_path / "out")


def test_values_too_large_for_the_dtype_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    large = shutil.copytree(adapter, tmp_path / "large")
    edit_tensors(lambda tensors: tensors.update({KEY: tensors[KEY] * 1e7}))(large)
    expected = "merged tensor 'model.layers.0.self_attn.q_proj.weight' holds values too large for float16"
    assert expected in refusal(base, str(large), tmp_path / "out", dtype="float16")


@pytest.mark.parametrize(
    ("changes", "weight", "expected"),
    [
        ({"use_dora": True}, 0.5, "its weight can only be 1"),
        ({"modules_to_save": ["norm"]}, 0.5, "replaces the base's, so its weight can only be 1"),
        ({"trainable_token_indices": [3]}, 0.5, "replaces the base's, so its weight can only be 1"),
    ],
)
def test_what_no_weight_can_scale(
    base: Path, changes: dict[str, Any], weight: float, expected: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **changes)
    assert expected in refusal(base, [{"source": str(adapter), "weight": weight}], tmp_path / "out")


def test_adapters_that_cannot_be_merged_together(base: Path, adapter: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", base, use_dora=True)
    assert "cannot be merged beside others" in refusal(base, [str(adapter), str(dora)], tmp_path / "out")
    one, two = (make_adapter(tmp_path / name, base, modules_to_save=["norm"]) for name in ("one", "two"))
    assert "both replace 'model." in refusal(base, [str(one), str(two)], tmp_path / "out")
    assert "two adapters are called" in refusal(base, [str(one), str(one)], tmp_path / "out")


def hostile_zip(folder: Path, names: dict[str, bytes]) -> Path:
    archive = folder / "hostile.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for name, content in names.items():
            target.writestr(name, content)
    return archive


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"../adapter_config.json": b"{}"}, "a path that leads out of it"),
        ({"/tmp/adapter_config.json": b"{}"}, "a path that leads out of it"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "holds only pickled weights"),
        ({"a/adapter_config.json": b"{}", "b/adapter_config.json": b"{}"}, "holds 2 adapters"),
        ({"readme.txt": b""}, "holds no adapter_config.json"),
    ],
)
def test_a_hostile_archive_is_refused(base: Path, names: dict[str, bytes], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(base, str(hostile_zip(tmp_path, names)), tmp_path / "out")


def test_an_archive_with_links_or_beyond_all_bounds_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.merging import archives

    link = tarfile.TarInfo("adapter_config.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as tape:
        tape.addfile(link)
    assert "which is no plain file" in refusal(base, str(tmp_path / "link.tar"), tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_SIDE_BYTES", 10)
    bomb = hostile_zip(tmp_path, {"adapter_config.json": b" " * 4000})
    assert "larger than an adapter's file can be" in refusal(base, str(bomb), tmp_path / "out")
    (tmp_path / "torn.zip").write_bytes(bomb.read_bytes()[:300])
    assert "is no readable archive" in refusal(base, str(tmp_path / "torn.zip"), tmp_path / "out")


def test_a_place_that_is_no_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"")
    assert "is neither a folder nor an archive" in refusal(base, str(tmp_path / "file.bin"), tmp_path / "out")
    assert "there is no adapter" in refusal(base, str(tmp_path / "nothing.zip"), tmp_path / "out")


def test_another_base_is_merged_into_where_the_user_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    edit_config(base_model_name_or_path="org/Other-7B")(other)
    found = merged_logits(base, str(other), tmp_path / "out", any_base=True)
    assert_close(found, unmerged_logits(base, (adapter, 1.0)))


SAME = [
    ("org/Model-7B", "other/model-7b"),
    ("org/Model-7B", "/data/models/Model-7B/"),
    ("/cache/hub/models--org--Model-7B/snapshots/0a1b", "org/Model-7B@main"),
    ("package:dist/inside/model.Q4_1.gguf", "package:dist/inside/model.Q4_1.gguf"),
]


@pytest.mark.parametrize(("trained_on", "given"), SAME)
def test_names_of_one_model(trained_on: str, given: str, tmp_path: Path) -> None:
    assert check_base("a", trained_on, given, tmp_path) == ()


def test_names_that_differ_and_those_that_say_more(tmp_path: Path) -> None:
    for trained_on, given in [("org/Model-7B", "org/Model-7B-Instruct"), ("org/M", "package:dist/M.Q4_1.gguf")]:
        with pytest.raises(SourceError, match="was trained on"):
            check_base("a", trained_on, given, tmp_path)
    (note,) = check_base("a", "unsloth/model-7b-unsloth-bnb-4bit", "org/Model-7B", tmp_path)
    assert "merge.base: nf4" in note
    assert "does not name the base" in check_base("a", "", "org/M", tmp_path)[0]
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "org/Real"}))
    assert check_base("a", "else/real", "./folder", tmp_path) == ()


def tuned_recipe(base: Path, adapter: Path, records: Path, out: Path, **changes: Any) -> Recipe:
    data = recipe_data(base, records, out, VARIANTS, **changes)
    data["model"] |= {"adapter": str(adapter), "dtype": "own"}
    return Recipe.parse(yaml.safe_dump(data))


def test_a_recipe_merges_first_and_reports_both_bases(
    base: Path, adapter: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    changes: dict[str, Any] = {"gates": ["size_bytes <= 400000"], "merge": {"compare": "nf4"}}
    recipe = tuned_recipe(base, adapter, records, tmp_path / "run", **changes)
    content = run(recipe, Notebook())
    rows = {row["name"]: row for row in content["variants"]}
    assert list(rows) == ["merged-nf4", "int8", "int4"]
    assert {row["status"] for row in rows.values()} == {"ok"}, [row["error"] for row in rows.values()]
    assert {gate["variant"] for gate in content["gates"]} == {"int8", "int4"}
    merged = content["source"]["merge"]
    assert merged["base_weights"] == "original"
    assert merged["check"]["max_abs_difference"] < TOLERANCE
    assert rows["merged-nf4"]["metrics"]["kl_divergence"]["prose"]["mean"] > 0
    assert_close(logits(load_whole(tmp_path / "run" / "merged-original")), unmerged_logits(base, (adapter, 1.0)))
    assert "merged-nf4" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")

    plain = run(make_recipe(base, records, tmp_path / "plain", VARIANTS), Notebook())
    assert plain["source"]["merge"] is None
    assert plain["baseline"]["metrics"]["perplexity"] != content["baseline"]["metrics"]["perplexity"]

    times = files_with_times(tmp_path / "run" / "merged-original") | files_with_times(tmp_path / "run" / "merged-nf4")
    run(recipe, Notebook())
    again = files_with_times(tmp_path / "run" / "merged-original") | files_with_times(tmp_path / "run" / "merged-nf4")
    assert again == times


def test_a_forecast_and_a_single_quantization_merge_too(
    base: Path, adapter: Path, records: Path, tmp_path: Path
) -> None:
    recipe = tuned_recipe(base, adapter, records, tmp_path / "run")
    assert forecast(recipe)["source"]["folder"] == str(tmp_path / "run" / "merged-original")
    quantize_one(recipe.model_copy(update={"variants": recipe.variants[:1]}), tmp_path / "one", Notebook())
    weight = open_export(tmp_path / "one").weight("model.layers.0.mlp.down_proj").dequantize(torch.float32)
    tuned = CheckpointReader(tmp_path / "run" / "merged-original").read("model.layers.0.mlp.down_proj.weight")
    plain = CheckpointReader(base).read("model.layers.0.mlp.down_proj.weight")
    assert (weight - tuned).abs().max() < 0.2 * (weight - plain).abs().max()
