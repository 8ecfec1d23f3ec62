"""Verdicts on runtimes: what passes, what fails and why, and where the verdict is kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import CheckpointError, EvaluationError, MissingDependencyError, QuantkitError, RecipeError
from quantkit.exports.manifest import identity, is_whole, read_verdicts
from quantkit.formats import FORMATS
from quantkit.publishing.card import card
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._vllm_script import Reads, Tap, prompt_logits
from quantkit.runtimes.base import LoadedModel, LoadOptions
from quantkit.runtimes.vllm import SCRIPT, VARIABLE, interpreter
from quantkit.schemes import IntScheme, Nvfp4Scheme
from quantkit.verification import traps, verify
from quantkit.verification import verdict as verdicts
from quantkit.verification.comparison import BLOCKS, BY_DTYPE, EIGHT_BITS, FOUR_BITS, compare, tolerance
from quantkit.verification.job import VerificationJob, carry_out
from quantkit.verification.prompts import PROMPTS, tokenize
from quantkit.verification.worker import perform
from tests.tiny import CHAT_TEMPLATE, make_model, tiny_tokenizer

TEXTS = ("The tide went out", "def f(x):")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(model, out=tmp_path_factory.mktemp("out") / "rtn", method="rtn", group_size=32)


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "checkpoint")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[VerificationJob]:
    """Jobs are carried out in this process; they are listed."""
    jobs: list[VerificationJob] = []

    def carried_out(job: VerificationJob) -> dict[str, Any]:
        jobs.append(job)
        return perform(job)

    monkeypatch.setattr(verdicts, "carry_out", carried_out)
    return jobs


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose logits are changed on their way."""
    runtime, load = RUNTIMES.get(name), RUNTIMES.get(name).load

    def loading(path: Path, options: LoadOptions) -> LoadedModel:
        model = load(path, options)
        logits = model.logits
        model.logits = lambda ids: change(logits(ids).clone())  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(runtime, "load", loading)


# The whole


def test_a_runtime_is_verified_in_processes_of_its_own_and_the_verdict_kept(checkpoint: Path) -> None:
    before, manifest = identity(checkpoint), (checkpoint / "manifest.json").read_bytes()
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")
    assert verdict["passed"], verdict["reason"]
    assert verdict["figures"]["top1"] == 1
    assert verdict["figures"]["kl"] < 1e-9
    assert [each["tokens"] for each in verdict["figures"]["prompts"]][:2] == [len(text) for text in TEXTS]
    assert len(verdict["figures"]["prompts"]) == 4
    assert verdict["tolerance"]["because"] == BY_DTYPE["float32"].because
    assert verdict["traps"] == []
    assert verdict["generated"]
    assert set(verdict["versions"]) >= {"quantkit", "torch", "transformers"}
    assert json.loads((checkpoint / "verified.json").read_text()) == {"transformers": verdict}
    assert (checkpoint / "manifest.json").read_bytes() == manifest
    assert identity(checkpoint) == before
    assert is_whole(checkpoint)


def test_verdicts_of_several_runtimes_stand_beside_each_other(checkpoint: Path, here: list[VerificationJob]) -> None:
    for name in ("transformers", "reference"):
        verify(checkpoint, name, prompts=TEXTS, device="cpu")
    assert set(json.loads((checkpoint / "verified.json").read_text())) == {"transformers", "reference"}
    assert [job.runtime for job in here] == ["reference", "transformers", "reference", "reference"]
    assert [job.new_tokens for job in here] == [0, 32, 0, 32]


def test_a_verdict_that_an_earlier_version_kept_in_the_manifest_is_still_read(
    checkpoint: Path, here: list[VerificationJob]
) -> None:
    file = checkpoint / "manifest.json"
    before = identity(checkpoint)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"verified": {"llama.cpp": {"passed": True}}}))
    assert identity(checkpoint) == before
    verify(checkpoint, "reference", prompts=TEXTS, device="cpu")
    assert list(read_verdicts(checkpoint)) == ["llama.cpp", "reference"]
    assert "with llama.cpp: loads it" in card(checkpoint)
    assert "with reference (cpu, float32): loads it" in card(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '{"llama.cpp": 1}'])
def test_verdicts_that_are_broken_are_one_line(checkpoint: Path, content: str) -> None:
    (checkpoint / "verified.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"verified\.json"):
        card(checkpoint)


def test_without_a_manifest_the_verdict_is_only_returned(checkpoint: Path, here: list[VerificationJob]) -> None:
    (checkpoint / "manifest.json").unlink()
    assert verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")["passed"]
    assert not (checkpoint / "manifest.json").exists()


def test_a_float_checkpoint_is_verified_too(model: Path, here: list[VerificationJob]) -> None:
    verdict = verify(model, "transformers", prompts=TEXTS, device="cpu", dtype="bfloat16")
    assert verdict["passed"]
    assert (verdict["dtype"], verdict["reference_dtype"]) == ("bfloat16", "bfloat16")
    assert [job.dtype for job in here] == ["bfloat16", "bfloat16"]


def test_packed_weights_that_are_read_wrongly_fail(
    checkpoint: Path, here: list[VerificationJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed("transformers", lambda logits: logits.roll(1, dims=-1), monkeypatch)
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")
    assert not verdict["passed"]
    assert "KL" in verdict["reason"]
    assert "the likeliest token is the same at 0.0%" in verdict["reason"]
    assert not json.loads((checkpoint / "verified.json").read_text())["transformers"]["passed"]


def test_a_shift_that_no_probability_shows_fails_in_float32(
    checkpoint: Path, here: list[VerificationJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed("transformers", lambda logits: logits + 1, monkeypatch)
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")
    assert verdict["reason"] == "logits differ by up to 1, and 0.05 is allowed"


def test_overflow_of_float16_is_named(
    checkpoint: Path, here: list[VerificationJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed("transformers", lambda logits: logits.index_fill_(0, torch.tensor([2]), math.inf), monkeypatch)
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu", dtype="float16")
    assert not verdict["passed"]
    assert [trap["name"] for trap in verdict["traps"]] == [traps.OVERFLOW]
    assert "use bfloat16" in verdict["reason"]
    assert verdict["figures"]["kl"] is None
    assert verdict["reference_dtype"] == "float32"
    text = (checkpoint / "manifest.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_checkpoint_that_a_runtime_cannot_load_is_a_verdict(checkpoint: Path, here: list[VerificationJob]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    extra = {"model.layers.0.mlp.up_proj.weight_g_idx": torch.ones(3)}
    save_file({**tensors, **extra}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match=r"1 are not known to the model: model\..*\.up_proj\.weight_g_idx"):
        verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")  # the reference cannot, either


def test_a_runtime_that_refuses_the_format_is_a_verdict(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, options: LoadOptions) -> LoadedModel:
        raise EvaluationError("no kernel for this scheme", "choose another")

    def carried_out(job: VerificationJob) -> dict[str, Any]:
        return perform(job)

    monkeypatch.setattr(verdicts, "carry_out", carried_out)
    monkeypatch.setattr(RUNTIMES.get("transformers"), "load", refuse)
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")
    assert (verdict["passed"], verdict["reason"]) == (False, "no kernel for this scheme (choose another)")
    assert verdict["figures"] is None
    assert verdict["generated"] is None


@pytest.mark.parametrize("matters", [True, False])
def test_tensors_that_the_loader_passes_over_are_named_and_fail_where_the_numbers_show_it(
    checkpoint: Path, here: list[VerificationJob], monkeypatch: pytest.MonkeyPatch, matters: bool
) -> None:
    if matters:
        changed("transformers", lambda logits: logits.roll(1, dims=-1), monkeypatch)

    def carried_out(job: VerificationJob) -> dict[str, Any]:
        return {**perform(job), "dropped": ["model.layers.0.self_attn.k_proj.weight_zero_point"]}

    monkeypatch.setattr(verdicts, "carry_out", carried_out)
    verdict = verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")
    assert verdict["passed"] is not matters
    assert [trap["name"] for trap in verdict["traps"]] == [traps.DROPPED]
    if matters:
        assert "KL" in verdict["reason"]
        assert "dropped tensors: the loader was given 1 tensors that it did not use: model.la" in verdict["reason"]


def test_the_whole_is_refused_before_any_work(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="unknown runtime 'transfomers'"):
        verify(checkpoint, "transfomers")
    with pytest.raises(QuantkitError, match="'float8' is no compute dtype"):
        verify(checkpoint, "transformers", dtype="float8", device="cpu")
    with pytest.raises(QuantkitError, match="'tpu' is not a device"):
        verify(checkpoint, "transformers", device="tpu")
    with pytest.raises(EvaluationError, match=r"no config\.json"):
        verify(checkpoint / "nowhere", "transformers")
    with pytest.raises(EvaluationError, match="prompt 'a' has 1 tokens"):
        verify(checkpoint, "transformers", prompts=["a"])
    with monkeypatch.context() as patch:
        patch.setattr(FORMATS.get("compressed-tensors"), "requires", ("a-package",))
        with pytest.raises(MissingDependencyError, match="needs the package 'a-package', which is not installed"):
            verify(checkpoint, "transformers")
    monkeypatch.setattr(RUNTIMES.get("transformers"), "missing", lambda: "it is not installed")
    with pytest.raises(QuantkitError, match="runtime transformers cannot be used: it is not installed"):
        verify(checkpoint, "transformers")


def test_a_broken_checkpoint_is_not_the_fault_of_the_runtime(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        verify(checkpoint, "transformers", prompts=TEXTS, device="cpu")


@pytest.mark.parametrize("runtime", ["reference", "llama.cpp"])
def test_a_gguf_checkpoint_is_verified_too(
    model: Path, tmp_path: Path, here: list[VerificationJob], runtime: str
) -> None:
    reason = RUNTIMES.get(runtime).missing()
    if reason:
        pytest.skip(reason)
    folder = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32, format="gguf")
    verdict = verify(next(folder.glob("*.gguf")), runtime, prompts=PROMPTS[:3], device="cpu")
    assert verdict["passed"], verdict["reason"]
    assert verdict["generated"]
    assert json.loads((folder / "verified.json").read_text())[runtime]["passed"]


# Processes


def job_for(checkpoint: Path, folder: Path) -> VerificationJob:
    return VerificationJob(checkpoint, "transformers", "cpu", "float32", 64, ((5, 6, 7),), 0, 2, folder)


def test_a_job_survives_the_way_through_json(tmp_path: Path) -> None:
    job = job_for(tmp_path, tmp_path)
    assert VerificationJob.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise KeyError('rope_theta')",
            r"transformers did not answer from .* \(exit code 1\): KeyError: 'rope_theta'",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"\(SIGKILL.*\): \(the log is empty\)"),
        (
            "raise ValueError('1 validation error\\nUnknown quantization method: bitsandbytes.\\nFor more see x')",
            r"\(exit code 1\): ValueError: 1 validation error Unknown quantization method: bitsandbytes\. For more",
        ),
        ("print('bye')", r"\(exit code 0\): bye"),
    ],
)
def test_a_process_that_dies_is_told(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        carry_out(job_for(tmp_path, tmp_path), (sys.executable, "-c", code))


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)\n"
    )
    job = replace(job_for(tmp_path, tmp_path), seconds=5.0)
    with pytest.raises(EvaluationError, match=r"within 5 s; last line of its log: waiting .*--time-limit"):
        carry_out(job, (sys.executable, "-c", code))
    left = int((tmp_path / "pid").read_text())
    _, alive = psutil.wait_procs([psutil.Process(left)] if psutil.pid_exists(left) else [], timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_mistake_found_in_the_process_keeps_its_class(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"is not a checkpoint: it has no config\.json"):
        carry_out(job_for(tmp_path / "nowhere", tmp_path))


def test_logits_are_written_in_the_order_of_the_prompts(model: Path, tmp_path: Path) -> None:
    prompts = ((5, 6, 7), (8, 9, 10, 11))
    job = VerificationJob(model, "transformers", "cpu", "float32", 64, prompts, 1, 3, tmp_path)
    answer = perform(job)
    rows = np.load(job.logits)
    loaded = RUNTIMES.get("transformers").load(model, LoadOptions(dtype="float32"))
    assert rows.dtype == np.float32
    assert np.array_equal(rows, torch.cat([loaded.logits(torch.tensor(ids)) for ids in prompts]).numpy())
    assert answer["generated"] == loaded.decode(torch.tensor(prompts[1]), 3)[0]


def test_the_script_of_vllm_is_on_its_own() -> None:
    """It runs where quantkit is not installed, and does not take quantkit's modules for vLLM's."""
    source = SCRIPT.read_text(encoding="utf-8")
    imports = [line.split()[1] for line in source.splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert not any(name.startswith("quantkit") for name in imports)


def test_the_script_tells_tensors_that_a_loader_uses_from_those_it_passes_over() -> None:
    reads = Reads()
    parameter = torch.zeros(2, 2)
    shapes = {"copied": (2, 2), "sliced": (4, 2), "listed": (2, 2), "kept": (2,), "asked": (3,), "passed": (1,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name, tensor in reads.watch(iter(weights.items())):
        if name == "copied":
            parameter.copy_(tensor)
        elif name == "sliced":
            parameter += tensor.narrow(0, 1, 2)
        elif name == "listed":
            parameter = torch.cat([tensor.data, parameter])[2:]
        elif name == "kept":
            kept = torch.nn.Parameter(tensor)
        elif name == "asked":
            assert (tensor.shape, tensor.size(), tensor.dim()) == ((3,), (3,), 1)
            assert tensor.dtype == torch.float32
    assert type(parameter) is torch.Tensor
    assert kept.tolist() == [1, 1]
    assert torch.equal(parameter, torch.full((2, 2), 2.0))
    assert sorted(reads.given - reads.used) == ["asked", "passed"]


def test_the_script_keeps_logits_as_the_engine_computes_them() -> None:
    class Engine:
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ torch.ones(2, 5, dtype=hidden.dtype)

    engine, hidden = Engine(), torch.arange(8, dtype=torch.bfloat16).view(4, 2)
    tap = Tap(engine)
    for count in (4, 2, 1):
        tap.open()
        engine.compute_logits(hidden[count - 1 : count])
        if count > 1:
            engine.compute_logits(hidden[: count - 1])
        rows = prompt_logits(tap.take(), count)
        assert rows.dtype == torch.bfloat16
        assert rows[:, 0].tolist() == [1, 5, 9, 13][:count]
    engine.compute_logits(hidden)
    assert tap.take() == []
    tap.open()
    engine.compute_logits(hidden[:2])
    with pytest.raises(RuntimeError, match=r"computes the logits of 4 tokens as \[\[2, 5\]\]"):
        prompt_logits(tap.take(), 4)


def test_the_interpreter_of_vllm_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    runtime = RUNTIMES.get("vllm")
    with pytest.raises(QuantkitError, match=f"no interpreter with vLLM is named.*pip install vllm.*{VARIABLE}"):
        interpreter()
    assert str(runtime.missing()).startswith("no interpreter with vLLM is named")
    with pytest.raises(QuantkitError, match=r"there is no interpreter .*/python"):
        interpreter(str(tmp_path / "python"))
    with pytest.raises(QuantkitError, match="has no vLLM"):
        interpreter(sys.executable)
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho True\n")
    stub.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(stub))
    assert runtime.missing() is None
    assert interpreter() == str(stub)


# Figures


def written(file: Path, rows: torch.Tensor) -> Path:
    np.save(file, rows.numpy())
    return file


def test_figures_are_those_of_a_direct_computation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = torch.randn(7, 50)
    theirs = ours + 0.3 * torch.randn(7, 50)
    figures = compare(written(tmp_path / "a.npy", ours), written(tmp_path / "b.npy", theirs), [3, 4])
    p, q = (rows.double().log_softmax(-1) for rows in (ours, theirs))
    kl = (p.exp() * (p - q)).sum(-1)
    assert [each.kl for each in figures.prompts] == pytest.approx([kl[:3].mean().item(), kl[3:].mean().item()])
    assert figures.kl == max(each.kl for each in figures.prompts) > 0
    assert figures.max_abs == pytest.approx((ours - theirs).abs().max().item())
    assert figures.top1 == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert figures.finite


def test_logits_that_are_no_numbers_are_the_worst(tmp_path: Path) -> None:
    rows = torch.zeros(4, 5)
    broken = rows.clone()
    broken[1, 2] = math.nan
    figures = compare(written(tmp_path / "a.npy", rows), written(tmp_path / "b.npy", broken), [2, 2])
    assert not figures.finite
    assert math.isnan(figures.kl)
    assert math.isnan(figures.max_abs)


def test_logits_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gives logits \[4, 6\], and the reference \[4, 5\]"):
        compare(written(tmp_path / "a.npy", torch.zeros(4, 5)), written(tmp_path / "b.npy", torch.zeros(4, 6)), [4])


def test_tolerances_follow_what_is_rounded() -> None:
    plain, rounded, four = IntScheme(), IntScheme(8, -1, activations="dynamic"), Nvfp4Scheme("static")
    for dtype, expected in BY_DTYPE.items():
        assert tolerance("transformers", dtype, [plain]) is expected
    assert tolerance("vllm", "bfloat16", [plain, rounded]) is EIGHT_BITS
    assert tolerance("vllm", "bfloat16", [Nvfp4Scheme(), rounded, four]) is FOUR_BITS
    assert FOUR_BITS.top1 < EIGHT_BITS.top1
    assert tolerance("llama.cpp", "float32", [plain]) is BLOCKS
    assert tolerance("reference", "float32", [rounded]) is BY_DTYPE["float32"]
    limits = [*(each.kl for each in BY_DTYPE.values()), BLOCKS.kl, EIGHT_BITS.kl, FOUR_BITS.kl]
    assert limits == sorted(limits)


# Traps


def test_fused_layers_of_different_schemes_are_found() -> None:
    block = "model.layers.0.self_attn"
    names = [f"{block}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    same = dict.fromkeys(names, IntScheme())
    assert traps.fused_layers(same, set(names), GROUPS) is None
    mixed = {**same, f"{block}.v_proj": IntScheme(8)}
    found = traps.fused_layers(mixed, set(names), GROUPS)
    assert found is not None
    assert found.found.startswith(f"in {block}, q_proj is int4 g64 sym, k_proj is int4 g64 sym, v_proj is int8 g64")
    floats = {name: scheme for name, scheme in same.items() if "k_proj" not in name}
    found = traps.fused_layers(floats, set(names), GROUPS)
    assert found is not None
    assert "k_proj is float" in found.found
    other = {**same, f"{block}.o_proj": IntScheme(8)}
    assert traps.fused_layers(other, set(names), GROUPS) is None
    assert traps.fused_layers(mixed, set(names), ()) is None


def test_other_traps() -> None:
    assert traps.overflow(False, "bfloat16") is None
    assert traps.overflow(True, "float16") is None
    assert traps.dropped_tensors([]) is None
    many = traps.dropped_tensors([f"t{index}" for index in range(8)])
    assert many is not None
    assert many.found.endswith("t0, t1, t2, t3, t4 and 3 more")


# Prompts


def test_prompts_come_plain_and_as_chats(model: Path) -> None:
    prompts = tokenize(model, PROMPTS, trust_remote_code=False)
    assert len(prompts.ids) == 2 * len(PROMPTS)
    assert prompts.continued == len(PROMPTS)
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    turn = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert list(prompts.ids[len(PROMPTS)]) == tokenizer(turn).input_ids
    assert prompts.ids[0] == tuple(tokenizer(PROMPTS[0]).input_ids)
    assert prompts.text([*tokenizer("Paris").input_ids, tokenizer.eos_token_id, 9]) == "Paris"


def test_a_model_without_a_template_has_plain_prompts_alone(tmp_path: Path) -> None:
    prompts = tokenize(make_model(tmp_path / "m", chat_template=None), TEXTS, trust_remote_code=False)
    assert (len(prompts.ids), prompts.chats, prompts.continued) == (2, 0, 0)


def test_a_template_that_fails_is_said(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", chat_template="{{ raise_exception('no') }}")
    with pytest.raises(EvaluationError, match="the chat template cannot be used: no"):
        tokenize(folder, TEXTS, trust_remote_code=False)
