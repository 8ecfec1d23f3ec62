from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit import records
from quantkit.calibration.model import added_bos
from quantkit.errors import CalibrationError, CheckpointError, EvaluationError, MissingDependencyError, QuantkitError
from quantkit.evaluation import EvaluationJob, process, run_job, scoring, texts
from quantkit.evaluation import speed as timing
from quantkit.evaluation.divergence import clustered_stderr, summarize
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.memory import checkpoint_bytes, peak_rss
from quantkit.evaluation.reference import TextReader, check_reference, prepare_folder, text_writer, write_index
from quantkit.evaluation.scoring import score
from quantkit.evaluation.speed import DECODE_RUNS, NEW_TOKENS, PREFILL_RUNS, PROMPT_TOKENS, measure_speed
from quantkit.evaluation.texts import Tokens, Windows, cut, load_text
from quantkit.recipe import EvaluationSpec, TextSpec
from quantkit.recipe.evaluation import Bos
from quantkit.records.dataset import collect
from quantkit.runtimes._checkpoint import load_config, load_tokenizer
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes._packed import load_packed
from quantkit.runtimes.base import LoadOptions
from quantkit.system.devices import resolve_device
from quantkit.system.ending import restored_error
from tests.tiny import SPECIAL, VOCABULARY, make_model, tiny_tokenizer, tokenizer_with_bos

BOS = SPECIAL.index("<s>")
PROSE = "The tide went out further than anyone had seen, and we walked to the rocks with a bucket. " * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture(scope="module")
def perturbed_checkpoint(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("perturbed")
    make_model(folder)
    edit_tensors(folder, lambda tensors: tensors.update(nudged(tensors)))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TransformersModel:
    return load(checkpoint)


@pytest.fixture(scope="module")
def perturbed(perturbed_checkpoint: Path) -> TransformersModel:
    return load(perturbed_checkpoint)


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    file = tmp_path / "tide.txt"
    file.write_text(PROSE, encoding="utf-8")
    text = TextSpec(name="tide", file=str(file))
    return EvaluationSpec(texts=(text,), context_length=64, max_tokens=300, device="cpu")


def load(checkpoint: Path, dtype: str | None = "float32") -> TransformersModel:
    return load_packed(checkpoint, LoadOptions(dtype=dtype))


def nudged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if tensor.ndim == 2
    }


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def random_windows(count: int = 4, length: int = 24, name: str = "noise") -> Windows:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (count, length), generator=generator)
    return cut(Tokens(name, ids.flatten().tolist(), None), length, count * length)


def write_reference(folder: Path, model: TransformersModel, windows: Windows) -> TextReader:
    folder.mkdir(exist_ok=True)
    with text_writer(folder, windows, VOCABULARY) as writer:
        score(model, windows, writer=writer)
    write_index(folder, {windows.name: windows}, VOCABULARY)
    return TextReader(folder, windows)


def exact_log_probs(model: TransformersModel, windows: Windows) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.model(input_ids=windows.ids).logits[:, :-1].double(), dim=-1)


def silent(step: str, done: int, total: int) -> None:
    pass


# Texts


def test_plain_text_is_one_stream_without_special_tokens(spec: EvaluationSpec) -> None:
    tokenizer = tiny_tokenizer()
    tokens = load_text(spec.texts[0], tokenizer, 100)
    assert tokens.ids == tokenizer(PROSE).input_ids[:100]


@pytest.mark.parametrize("name", ["prose", "answers"])
def test_bundled_texts_are_long_enough_for_the_default_budget(name: str) -> None:
    limit = EvaluationSpec().max_tokens
    tokens = load_text(TextSpec.model_validate(name), tiny_tokenizer(), limit)
    assert len(tokens.ids) == limit
    assert tokens.skipped_records == 0


def test_a_long_text_is_read_only_as_far_as_it_is_needed(spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CHARACTERS_PER_TOKEN", 1)
    tokenizer = tiny_tokenizer()
    read: list[int] = []

    def counting(text: str, **options: Any) -> Any:
        read.append(len(text))
        return tokenizer(text, **options)

    ids = texts._tokenize_beginning(PROSE, counting, 50)
    assert ids[:50] == tokenizer(PROSE).input_ids[:50]
    assert read == [50, 100]


def test_hub_rows_are_joined_by_blank_lines_with_blank_rows_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def read_hub(dataset: str, **options: Any) -> records.RecordSet:
        asked.update(options, dataset=dataset)
        rows = [{"line": ""}, {"line": "one"}, {"line": ""}, {"line": "two"}, {"line": 3}]
        return records.RecordSet("hub", {}, "", *collect("hub", rows, records.Layout(options["columns"])))

    monkeypatch.setattr(records, "read_hub", read_hub)
    text = TextSpec(name="wiki", dataset="org/wiki", config="raw", split="test", column="line", revision="abc")
    tokens = load_text(text, tiny_tokenizer(), 100)
    assert tokens.ids == tiny_tokenizer()("\n\none\n\n\n\ntwo").input_ids
    assert tokens.skipped_records == 1
    assert asked == {
        "dataset": "org/wiki", "config": "raw", "split": "test", "revision": "abc", "columns": {"text": "line"},
        "tags": {}, "others": False,
    }  # fmt: skip


def test_conversations_are_rendered_and_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"instruction": "Say a", "output": "a"}, {"instruction": "Say b", "output": "b"}, {"instruction": "?"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokens = load_text(TextSpec(name="chats", file=str(file)), tokenizer, 1000)
    turn = "<|im_start|>user\nSay {0}<|im_end|>\n<|im_start|>assistant\n{0}<|im_end|>\n"
    assert tokens.ids == tokenizer(turn.format("a") + turn.format("b")).input_ids
    assert tokens.skipped_records == 1
    plain = load_text(TextSpec(name="chats", file=str(file)), tiny_tokenizer(None), 1000)
    assert plain.ids == tokenizer("Say a\n\na\n\nSay b\n\nb").input_ids


def test_an_unreadable_text_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"absent\.txt"):
        load_text(TextSpec(name="absent", file=str(tmp_path / "absent.txt")), tiny_tokenizer(), 10)


def test_bos_is_used_only_where_the_tokenizer_adds_it_by_itself() -> None:
    assert tiny_tokenizer().bos_token_id == BOS
    assert added_bos(tiny_tokenizer()) is None
    assert added_bos(tokenizer_with_bos()) == BOS


# Windows


def test_windows_do_not_overlap_and_the_rest_is_counted() -> None:
    windows = cut(Tokens("t", list(range(50)), None), context_length=16, max_tokens=45)
    assert windows.ids.tolist() == [list(range(start, start + 16)) for start in (0, 16)]
    facts = windows.facts()
    assert (facts["tokens"], facts["windows"], facts["dropped_tokens"], facts["bos"]) == (32, 2, 13, "none")


def test_bos_takes_the_first_slot_of_each_window() -> None:
    windows = cut(Tokens("t", list(range(10, 55)), BOS), context_length=16, max_tokens=45)
    assert windows.ids.tolist() == [[BOS, *range(start, start + 15)] for start in (10, 25, 40)]
    facts = windows.facts()
    assert (facts["tokens"], facts["dropped_tokens"], facts["bos"]) == (45, 0, "window")
    assert "beginning-of-sequence" in facts["definition"]


@pytest.mark.parametrize(("bos", "count"), [("window", [1, 1, 1]), ("stream", [1, 0, 0]), ("none", [0, 0, 0])])
def test_bos_stands_where_it_is_asked_for(bos: Bos, count: list[int]) -> None:
    windows = cut(Tokens("t", list(range(10, 58)), BOS), context_length=16, max_tokens=48, bos=bos)
    assert (windows.ids == BOS).sum(dim=1).tolist() == count
    assert windows.ids[0, 0].item() == (10 if bos == "none" else BOS)
    assert windows.facts()["bos"] == bos
    assert windows.tokens == int((windows.ids != BOS).sum())


@pytest.mark.parametrize("bos", get_args(Bos))
def test_a_tokenizer_without_bos_gets_none(bos: Bos) -> None:
    ids = list(range(10, 58))
    windows = cut(Tokens("t", ids, None), context_length=16, max_tokens=48, bos=bos)
    assert windows.ids.flatten().tolist() == ids
    assert windows.facts()["bos"] == "none"


def test_a_text_shorter_than_a_window_is_one_short_window() -> None:
    windows = cut(Tokens("t", [5, 6, 7], None), context_length=16, max_tokens=16)
    assert windows.ids.tolist() == [[5, 6, 7]]
    assert windows.dropped == 0
    assert windows.positions == 2


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(EvaluationError, match="text 't' has 1 tokens"):
        cut(Tokens("t", [5], None), context_length=16, max_tokens=16)


def test_the_hash_tells_apart_what_the_model_is_fed() -> None:
    ids = list(range(10, 74))
    plain = cut(Tokens("t", ids, None), 16, 64)
    hashes = {plain.sha256, cut(Tokens("t", ids, BOS), 16, 64).sha256, cut(Tokens("t", ids, None), 32, 64).sha256}
    assert len(hashes) == 3
    assert plain.sha256 == cut(Tokens("other name", ids, None), 16, 64).sha256


# Scores


@pytest.mark.parametrize("bos", [None, BOS])
def test_perplexity_is_that_of_the_loss_of_transformers(
    model: TransformersModel, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 7 * VOCABULARY)
    windows = cut(Tokens("tide", tiny_tokenizer()(PROSE).input_ids, bos), context_length=40, max_tokens=200)
    with torch.no_grad():
        losses = [model.model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows.ids]
    result = score(model, windows)
    assert result.nll_count == len(losses) * 39
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert result.kl is None
    assert result.top1_agreement is None


def test_perplexity_of_a_stream_is_that_of_gptq(model: TransformersModel, tmp_path: Path) -> None:
    """Beside the few lines that GPTQ and those after it have: the whole text at once, as the tokenizer gives it."""
    rows = [{"text": line} for line in PROSE.split(". ")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer, length = tokenizer_with_bos(), 24
    spec = TextSpec(name="rows", file=str(tmp_path / "rows.jsonl"))
    windows = cut(load_text(spec, tokenizer, 10**6), length, 10**6, bos="stream")

    stream = tokenizer("\n\n".join(row["text"] for row in rows), return_tensors="pt").input_ids
    losses = []
    with torch.no_grad():
        for place in range(stream.numel() // length):
            ids = stream[:, place * length : (place + 1) * length]
            logits = model.model(ids).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]) * length)
    published = torch.exp(torch.stack(losses).sum() / (len(losses) * length)).item()

    assert windows.ids.flatten().tolist() == stream[0, : windows.ids.numel()].tolist()
    assert score(model, windows).perplexity == pytest.approx(published, rel=1e-6)
    each = cut(load_text(spec, tokenizer, 10**6), length, 10**6, bos="window")
    assert score(model, each).perplexity != pytest.approx(published, rel=1e-3)


def test_a_model_does_not_diverge_from_its_own_stored_reference(model: TransformersModel, tmp_path: Path) -> None:
    windows = random_windows()
    stored = write_reference(tmp_path / "reference", model, windows)
    result = score(model, windows, reference=stored)
    assert result.kl is not None
    assert abs(result.kl.mean) < 1e-6
    assert result.kl.p99 < 1e-5
    assert result.top1_agreement == 1.0


def test_divergence_equals_a_direct_computation(
    model: TransformersModel, perturbed: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    windows = random_windows()
    result = score(perturbed, windows, reference=write_reference(tmp_path / "reference", model, windows))
    expected, got = exact_log_probs(model, windows), exact_log_probs(perturbed, windows)
    kl = (expected.exp() * (expected - got)).sum(dim=-1)
    per_window = kl.mean(dim=1)
    assert result.kl is not None
    assert result.kl.mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.kl.mean > 0.001
    assert result.kl.median == pytest.approx(kl.median().item(), rel=0.02)
    assert result.kl.p99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-3)
    assert result.kl.stderr == pytest.approx(per_window.std().item() / math.sqrt(len(per_window)), rel=1e-3)
    agreement = (expected.argmax(dim=-1) == got.argmax(dim=-1)).double().mean().item()
    assert result.top1_agreement == agreement
    assert 0 < agreement < 1


@pytest.mark.parametrize("rows", [1, 4, 23])
def test_figures_are_the_same_to_the_bit_however_many_rows_are_taken_at_once(
    model: TransformersModel, perturbed: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    windows = random_windows()
    reference = write_reference(tmp_path / "reference", model, windows)
    whole = score(perturbed, windows, reference=reference)
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", rows * VOCABULARY)
    assert score(perturbed, windows, reference=reference) == whole


def test_the_standard_error_takes_windows_as_independent() -> None:
    twins = torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]], dtype=torch.float64)
    summary = summarize(twins)
    assert summary.stderr == pytest.approx(math.sqrt(7) / math.sqrt(3))
    assert summary.stderr_over == "windows"
    assert (summary.mean, summary.median) == (3, 2)


def test_with_one_window_the_standard_error_is_over_tokens() -> None:
    summary = summarize(torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64))
    assert summary.stderr == pytest.approx(math.sqrt(7) / math.sqrt(3))
    assert summary.stderr_over == "tokens"


def test_one_figure_has_no_standard_error() -> None:
    assert clustered_stderr(torch.ones(1, 1, dtype=torch.float64)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits_name_text_and_window(
    value: float, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def broken(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        logits = torch.zeros(len(ids), VOCABULARY)
        logits[3, 9] = value if calls == 1 else 0.0
        calls += 1
        return logits

    monkeypatch.setattr(model, "logits", broken)
    with pytest.raises(EvaluationError, match="NaN or infinite logits in window 1 of text 'noise'"):
        score(model, random_windows())


def test_a_reference_of_another_width_is_refused(model: TransformersModel, tmp_path: Path) -> None:
    windows = random_windows()
    with (
        pytest.raises(EvaluationError, match=f"{VOCABULARY} logits a token, and the reference is for"),
        text_writer(tmp_path, windows, VOCABULARY + 3) as writer,
    ):
        score(model, windows, writer=writer)


def test_a_reference_with_rows_missing_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="9 of the announced rows did not come"),
        text_writer(tmp_path, random_windows(1, 12), 3) as writer,
    ):
        writer.append(torch.zeros(2, 3), torch.zeros(2))


# Reference


def test_a_reference_over_the_limit_is_refused_before_any_work(tmp_path: Path) -> None:
    windows = random_windows()
    needed = windows.positions * VOCABULARY * 2
    with pytest.raises(EvaluationError, match=rf"need {needed} bytes.*max_tokens or raise .*reference_limit"):
        prepare_folder(tmp_path / "new", {"noise": windows}, VOCABULARY, needed - 1)
    assert not (tmp_path / "new").exists()
    prepare_folder(tmp_path / "new", {"noise": windows}, VOCABULARY, needed)


def test_a_reference_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(EvaluationError, match="1000 free"):
        prepare_folder(tmp_path, {"noise": random_windows()}, VOCABULARY, 1 << 30)


def test_the_reference_takes_the_space_that_was_announced(model: TransformersModel, tmp_path: Path) -> None:
    windows = random_windows()
    write_reference(tmp_path / "reference", model, windows)
    size = (tmp_path / "reference" / "noise.npy").stat().st_size
    assert 0 < size - windows.positions * VOCABULARY * 2 < 256


def test_masked_tokens_stay_finite_in_the_reference(tmp_path: Path) -> None:
    windows = cut(Tokens("t", [1, 2, 3], None), 3, 3)
    logits = torch.tensor([[0.0, -1.0, torch.finfo(torch.float32).min], [-3.0, 2.0, -1e9]])
    with text_writer(tmp_path, windows, 3) as writer:
        writer.append(torch.log_softmax(logits, dim=-1), torch.zeros(2))
    rows = TextReader(tmp_path, windows).rows(0, 2)
    assert rows.isfinite().all()
    torch.testing.assert_close(torch.softmax(rows.float(), -1), torch.softmax(logits, -1), atol=1e-3, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_rows_of_a_reference_are_read_and_not_mapped(tmp_path: Path) -> None:
    windows = cut(Tokens("t", list(range(6)), None), 6, 6)
    log_probs = torch.log_softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    with text_writer(tmp_path, windows, 4) as writer:
        writer.append(log_probs, torch.zeros(5))
    reader = TextReader(tmp_path, windows)
    parts = torch.cat([reader.rows(0, 2), reader.rows(2, 5)])
    assert torch.equal(parts, (log_probs - log_probs.amax(-1, keepdim=True)).half())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_reference_is_complete_only_with_its_index(model: TransformersModel, tmp_path: Path) -> None:
    windows = random_windows()
    write_reference(tmp_path / "reference", model, windows)
    check_reference(tmp_path / "reference", {"noise": windows}, VOCABULARY)
    prepare_folder(tmp_path / "reference", {"noise": windows}, VOCABULARY, 1 << 30)
    with pytest.raises(EvaluationError, match="no complete reference"):
        check_reference(tmp_path / "reference", {"noise": windows}, VOCABULARY)


def test_a_reference_of_other_tokens_is_refused(model: TransformersModel, tmp_path: Path) -> None:
    windows = random_windows()
    write_reference(tmp_path / "reference", model, windows)
    other = replace(windows, ids=windows.ids.flip(1))
    with pytest.raises(EvaluationError, match="token ids of text 'noise' differ"):
        check_reference(tmp_path / "reference", {"noise": other}, VOCABULARY)
    with pytest.raises(EvaluationError, match="no reference for text 'more'"):
        check_reference(tmp_path / "reference", {"more": windows}, VOCABULARY)
    with pytest.raises(EvaluationError, match=f"{VOCABULARY + 1} logits"):
        check_reference(tmp_path / "reference", {"noise": windows}, VOCABULARY + 1)


# Loading


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(EvaluationError, match=r"1 are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(2)}))
    with pytest.raises(EvaluationError, match=r"1 are not known to the model: model\..*\.up_proj\.weight_scale"):
        load(folder)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(EvaluationError, match=r"1 have the wrong shape: model\.norm\.weight"):
        load(folder)


def test_a_tied_output_layer_is_not_missing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.weights_bytes() == checkpoint_tensor_bytes(folder) + rotary_bytes(model)


def checkpoint_tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def rotary_bytes(model: TransformersModel) -> int:
    return sum(buffer.nbytes for buffer in {buffer.data_ptr(): buffer for buffer in model.model.buffers()}.values())


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EvaluationError, match=r"the model in .*model cannot be loaded"):
        load(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds only pickled weights \(pytorch_model\.bin\).*convert them"):
        load(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    loaders: list[Callable[[], object]] = [
        lambda: load(tmp_path),
        lambda: load_tokenizer(tmp_path, trust_remote_code=False),
        lambda: load_config(tmp_path, trust_remote_code=False),
    ]
    for loader in loaders:
        with pytest.raises(EvaluationError, match=r"no config\.json"):
            loader()


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(EvaluationError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(folder, trust_remote_code=False)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_on_a_cpu_auto_computes_in_float32(
    tmp_path: Path, spec: EvaluationSpec, dtype: str, expected: torch.dtype
) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.float16)
    result = evaluate(EvaluationJob(folder, spec.model_copy(update={"dtype": dtype, "metrics": ("speed",)})), silent)
    assert result["environment"]["dtype"] == result["speed"]["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float16), ("bfloat16", torch.bfloat16)])
def test_a_runtime_computes_in_the_checkpoint_s_own_dtype_where_none_is_asked_for(
    tmp_path: Path, dtype: str | None, expected: torch.dtype
) -> None:
    loaded = load(make_model(tmp_path / "model", dtype=torch.float16), dtype)
    assert loaded.model.dtype == expected
    assert loaded.dtype == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(QuantkitError, match=name):
        resolve_device(name)


# Memory and speed


def test_checkpoint_bytes_count_files_with_weights_alone(tmp_path: Path) -> None:
    for name, size in {"a.safetensors": 10, "b.safetensors": 5, "c.gguf": 7, "tokenizer.json": 99}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert checkpoint_bytes(tmp_path) == 22
    assert checkpoint_bytes(tmp_path / "c.gguf") == 7


@pytest.mark.skipif(sys.platform != "linux", reason="the peak begins with the program on Linux alone")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    ballast = np.ones(100 << 20, dtype=np.float64)
    code = "from quantkit.evaluation.memory import peak_rss; print(peak_rss())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 50 << 20 < child < ballast.nbytes < peak_rss()


@pytest.mark.parametrize(
    ("is_warm", "briefly", "seconds", "runs"),
    [(False, False, 60.0, (PREFILL_RUNS, DECODE_RUNS)), (True, True, 60.0, (2, 2)), (True, False, 0.0, (2, 2))],
)
def test_speed_counts_what_it_says(
    model: TransformersModel,
    monkeypatch: pytest.MonkeyPatch,
    is_warm: bool,
    briefly: bool,
    seconds: float,
    runs: tuple[int, int],
) -> None:
    fed: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(timing, "ENOUGH", seconds)
    speed = measure_speed(model, random_windows(1, 48).ids[0], is_warm=is_warm, briefly=briefly)
    hook.remove()
    prefills, decodes = (count + (not is_warm) for count in runs)
    assert fed == [48] * prefills + [PROMPT_TOKENS, *[1] * NEW_TOKENS] * decodes
    assert (speed["prefill"]["tokens"], speed["prefill"]["runs"], speed["decode"]["runs"]) == (48, *runs)
    assert [len(speed[phase]["seconds_per_token"]) for phase in ("prefill", "decode")] == [*runs]
    assert speed["prefill"]["tokens_per_second"] > 0
    assert speed["decode"]["tokens_per_second"] > 0
    assert (speed["threads"], speed["device"], speed["dtype"]) == (torch.get_num_threads(), "cpu", "float32")


def test_decode_speed_needs_a_cache(model: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {"logits": torch.zeros(1, 1, VOCABULARY)}
    monkeypatch.setattr(model, "_forward", lambda ids, **state: without)
    with pytest.raises(EvaluationError, match="LlamaForCausalLM keeps no KV cache"):
        measure_speed(model, random_windows().ids[0])


def test_decoding_is_greedy_and_reads_each_token_once(model: TransformersModel) -> None:
    prompt = random_windows(1, 20).ids[0]
    ids, seconds = model.decode(prompt, 6)
    assert len(seconds) == 6
    expected = prompt.tolist()
    for _ in range(6):
        expected.append(int(model.logits(torch.tensor(expected))[-1].argmax()))
    assert ids == expected[20:]


def test_packed_weights_are_counted_as_they_were_loaded(tmp_path: Path, spec: EvaluationSpec) -> None:
    folder = make_packed_model(tmp_path / "packed")
    memory = evaluate(EvaluationJob(folder, spec.model_copy(update={"metrics": ("memory",)})), silent)["memory"]
    linear = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert memory["weights_bytes_running"] - memory["weights_bytes"] >= 4 * linear - linear
    assert memory["peak_kind"] == "RSS"
    assert memory["peak_bytes"] >= memory["baseline_bytes"] > 0


def make_packed_model(folder: Path) -> Path:
    """A tiny checkpoint with int4 weights, packed by compressed-tensors itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = QuantizationArgs(num_bits=4, group_size=32, symmetric=True, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.view(module.weight.shape[0], -1, 32)
            module.weight_scale.data = groups.abs().amax(dim=-1) / 7.5
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


# Jobs in this process


def test_a_context_longer_than_the_model_reads_is_refused(checkpoint: Path, spec: EvaluationSpec) -> None:
    job = EvaluationJob(checkpoint, spec.model_copy(update={"context_length": 513}))
    with pytest.raises(EvaluationError, match="reads 512 tokens at most"):
        evaluate(job, silent)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, spec: EvaluationSpec) -> None:
    folder = make_model(tmp_path / "model", vocab_size=40)
    with pytest.raises(EvaluationError, match="vocabulary has 40"):
        evaluate(EvaluationJob(folder, spec), silent)


def test_divergence_needs_a_reference(checkpoint: Path, spec: EvaluationSpec) -> None:
    with pytest.raises(EvaluationError, match="need the float model's reference"):
        evaluate(EvaluationJob(checkpoint, spec), silent)


def test_only_what_is_asked_for_is_measured(checkpoint: Path, spec: EvaluationSpec) -> None:
    job = EvaluationJob(checkpoint, spec.model_copy(update={"metrics": ("perplexity",)}))
    result = evaluate(job, silent)
    assert set(result["metrics"]) == {"perplexity"}
    assert result["memory"] is None
    assert result["speed"] is None


def test_a_job_survives_the_way_through_json(spec: EvaluationSpec, tmp_path: Path) -> None:
    job = EvaluationJob(tmp_path, spec, reference=tmp_path / "r", writes_reference=True, trust_remote_code=True)
    assert EvaluationJob.from_json(json.loads(json.dumps(job.to_json()))) == job


# Jobs in a process of their own


def test_a_job_scores_in_a_process_of_its_own(
    checkpoint: Path, perturbed_checkpoint: Path, spec: EvaluationSpec, tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    stored = tmp_path / "reference"
    log = tmp_path / "logs" / "variant.log"
    baseline = evaluate(EvaluationJob(checkpoint, spec, reference=stored, writes_reference=True), silent)
    job = EvaluationJob(perturbed_checkpoint, spec, reference=stored)
    variant = run_job(job, log=log, on_progress=lambda *step: steps.append(step))

    assert [step for step in steps if step[0] == "tide"] == [("tide", done, 4) for done in range(5)]
    assert log.exists()
    assert set(baseline["metrics"]) == {"perplexity"}
    assert set(variant["metrics"]) == {"perplexity", "kl_divergence", "top1_agreement"}
    text = variant["texts"]["tide"]
    assert (text["windows"], text["tokens"], text["dropped_tokens"], text["stderr_over"]) == (4, 256, 44, "windows")
    assert variant["metrics"]["perplexity"]["tide"] == math.exp(text["nll_sum"] / text["nll_count"])
    again = evaluate(job, silent)
    assert variant["metrics"]["kl_divergence"]["tide"] == pytest.approx(again["metrics"]["kl_divergence"]["tide"])
    assert variant["metrics"]["top1_agreement"] == again["metrics"]["top1_agreement"]
    assert variant["size_bytes"] == checkpoint_bytes(perturbed_checkpoint)
    assert variant["memory"]["peak_bytes"] > variant["memory"]["weights_bytes"] > 0
    assert variant["speed"]["decode"]["tokens_per_second"] > 0
    assert variant["seconds"] > 0
    assert set(variant["environment"]) == {"torch", "transformers", "device", "dtype", "threads"}


def test_a_mistake_found_in_the_process_keeps_its_text(tmp_path: Path, spec: EvaluationSpec) -> None:
    folder = make_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    job = EvaluationJob(folder, spec.model_copy(update={"metrics": ("perplexity",)}))
    with pytest.raises(EvaluationError, match=r"1 are missing: model\.norm\.weight") as caught:
        run_job(job, log=tmp_path / "log")
    assert caught.value.remedy == "export the checkpoint again; its files do not match its config.json"


def run_code(code: str, job: EvaluationJob, log: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Run a job whose process runs ``code`` instead, with the job's file as its argument."""
    monkeypatch.setattr(process, "worker_command", lambda: [sys.executable, "-c", code])
    return run_job(job, log=log, **options)


@pytest.fixture
def job(checkpoint: Path, spec: EvaluationSpec) -> EvaluationJob:
    return EvaluationJob(checkpoint, spec)


def test_death_by_signal_is_told_with_the_last_words(
    job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys; print('loading weights', file=sys.stderr, flush=True);"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(EvaluationError, match=r"killed by SIGKILL.*; .*: loading weights") as caught:
        run_code(code, job, tmp_path / "log", monkeypatch)
    assert "ran out of memory" in str(caught.value)
    assert str(tmp_path / "log") in caught.value.remedy
    with pytest.raises(EvaluationError, match=r"killed by SIGSEGV; .*\(the log is empty\)") as caught:
        run_code("import os; os.kill(os.getpid(), 11)", job, tmp_path / "log", monkeypatch)
    assert "memory" not in caught.value.remedy


def test_a_python_error_is_told_with_its_message(
    job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    with pytest.raises(EvaluationError, match=r"exit code 1: KeyError: 'rope_theta'") as caught:
        run_code("raise KeyError('rope_theta')", job, log, monkeypatch)
    assert str(log) in caught.value.remedy
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_an_end_without_result_is_told(job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="ended without a result; last line of its log: bye"):
        run_code("import sys; print('50%\\rbye', file=sys.stderr)", job, tmp_path / "log", monkeypatch)


def test_errors_of_any_class_come_back_as_that_class() -> None:
    error = restored_error("MissingDependencyError", "a problem", "pip install x")
    assert isinstance(error, MissingDependencyError)
    assert str(error) == "a problem (pip install x)"


def test_progress_and_noise_go_different_ways(
    job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, os, pathlib, sys; from quantkit.system.worker import progress_channel;"
        " print('before', flush=True);"
        " report = progress_channel(); print('noise', flush=True); os.write(1, b'deep noise\\n');"
        " report('tide', 1, 2);"
        " pathlib.Path(sys.argv[1]).with_name('result.json').write_text(json.dumps({'offline':"
        " os.environ.get('HF_HUB_OFFLINE')}))"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    steps: list[tuple[str, int, int]] = []
    log = tmp_path / "log"
    result = run_code(code, job, log, monkeypatch, on_progress=lambda *step: steps.append(step))
    assert steps == [("tide", 1, 2)]
    assert sorted(log.read_text(encoding="utf-8").split("\n")) == ["", "before", "deep noise", "noise"]
    assert result == {"offline": "1"}
    assert "HF_HUB_OFFLINE" not in os.environ


def test_only_a_wholly_local_job_runs_offline(job: EvaluationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    hub = job.spec.model_copy(update={"texts": (TextSpec(name="wiki", dataset="org/wiki"),)})
    assert process._environment(job)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in process._environment(replace(job, spec=hub))
    assert "HF_HUB_OFFLINE" not in process._environment(replace(job, trust_remote_code=True))
    assert process._environment(job)["PYTHONPATH"] == "/somewhere"


def test_the_process_ends_with_an_interrupt(
    job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    code = 'import time; print(\'{"step": "x", "done": 0, "total": 1}\', flush=True); time.sleep(60)'
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_code(code, job, tmp_path / "log", monkeypatch, on_progress=interrupt)
    assert time.monotonic() - started < 30


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_figures_of_the_cpu(
    checkpoint: Path, perturbed_checkpoint: Path, spec: EvaluationSpec, tmp_path: Path
) -> None:
    stored = tmp_path / "reference"
    gpu = spec.model_copy(update={"device": "cuda", "dtype": "float32"})
    evaluate(EvaluationJob(checkpoint, spec, reference=stored, writes_reference=True), silent)
    on_cpu = evaluate(EvaluationJob(perturbed_checkpoint, spec, reference=stored), silent)
    on_gpu = evaluate(EvaluationJob(perturbed_checkpoint, gpu, reference=stored), silent)
    assert on_gpu["metrics"]["perplexity"]["tide"] == pytest.approx(on_cpu["metrics"]["perplexity"]["tide"], rel=1e-3)
    for figure in ("mean", "stderr", "median", "p99"):
        expected = on_cpu["metrics"]["kl_divergence"]["tide"][figure]
        assert on_gpu["metrics"]["kl_divergence"]["tide"][figure] == pytest.approx(expected, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reports_its_own_memory(checkpoint: Path, spec: EvaluationSpec) -> None:
    chosen = spec.model_copy(update={"device": "cuda", "metrics": ("memory", "speed")})
    result = evaluate(EvaluationJob(checkpoint, chosen), silent)
    memory = result["memory"]
    assert memory["peak_kind"] == "CUDA allocator"
    assert memory["weights_bytes"] < memory["peak_bytes"] < 1 << 30
    assert memory["process_bytes"] is None or memory["process_bytes"] > memory["weights_bytes"]
    assert result["speed"]["device"] == torch.cuda.get_device_name(0)
