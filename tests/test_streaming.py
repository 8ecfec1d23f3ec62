"""A model that is read a block at a time gives the figures of one that is loaded whole, and says what it takes."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

import quantkit
from quantkit.engine.kept_calls import OnDisk, on_cpu
from quantkit.engine.parking import Parking
from quantkit.engine.passes import AtSegment, Pass
from quantkit.errors import EvaluationError, OutputError, RecipeError
from quantkit.estimation import anatomy_of
from quantkit.estimation.streaming import (
    Scored,
    block_bytes,
    hidden_line,
    loaded_as,
    streamed_scoring,
    tokens_with_room,
    where_activations_wait,
    whole_scoring,
)
from quantkit.evaluation import EvaluationJob, loading, stage
from quantkit.evaluation.evaluate import evaluate
from quantkit.quantization import Job
from quantkit.recipe import EvaluationSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._streamed import StreamedModel, load_streamed
from quantkit.runtimes.base import LoadOptions
from quantkit.system.free_memory import left_by_groups
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.runs import make_recipe, score_here, write_records
from tests.test_duration import Listener
from tests.test_engine_memory import PeakBytes
from tests.test_estimation import exported, variant
from tests.test_threads import group
from tests.tiny import make_model

GIB = 1 << 30
LARGE = "llama-3.1-70b"
FIGURES = ["perplexity", "kl_divergence", "top1_agreement"]
SPEC: dict[str, Any] = {
    "texts": ["prose", "answers"], "context_length": 48, "max_tokens": 192, "device": "cpu", "metrics": FIGURES,
    "samples": False,
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "rounded inputs": {"scheme": "fp8", "activations": "dynamic"},
    "gguf": {"format": "gguf", "group_size": 32},
    "nf4": {"scheme": "nf4", "format": "bitsandbytes"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of it, all of one walk."""
    specs = [variant(name=f"v{place}", **keys) for place, keys in enumerate(FILES.values())]
    made = exported(Job(model, {"reference": "small"}, "bfloat16"), specs, tmp_path_factory.mktemp("files"))
    return dict(zip(FILES, made, strict=True))


def spec_of(**changes: Any) -> EvaluationSpec:
    return parse_section(EvaluationSpec, {**SPEC, **changes}, "evaluation")


def silent(*_: object) -> None:
    """Progress is not looked at."""


def rows(*lengths: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(5, 200, (length,), generator=draw) for length in lengths]


def read(folder: Path, given: list[torch.Tensor], keep: Any = None) -> tuple[StreamedModel, list[torch.Tensor]]:
    loaded = load_streamed(folder, LoadOptions(dtype="float32"), keep)
    loaded.read_ahead(given, silent)
    return loaded, [loaded.logits(row) for row in given]


def test_figures_are_those_of_models_that_are_loaded_whole(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    stored = {name: tmp_path / name for name in ("whole", "streamed")}
    before = {
        name: evaluate(EvaluationJob(model, spec_of(loader=name), folder, writes_reference=True), silent)
        for name, folder in stored.items()
    }
    assert [before[name]["loaded_by"] for name in stored] == ["transformers", "streamed"]
    for name, folder in {"float": model, **files}.items():
        whole = evaluate(EvaluationJob(folder, spec_of(loader="reference"), stored["whole"]), silent)
        block = evaluate(EvaluationJob(folder, spec_of(loader="streamed"), stored["streamed"]), silent)
        assert block["rounded_inputs"] == whole["rounded_inputs"]
        assert bool(block["rounded_inputs"]) == (name == "rounded inputs")
        for text in ("prose", "answers"):
            for sums in ("nll_by_window", "kl_by_window"):
                assert block["texts"][text][sums] == pytest.approx(whole["texts"][text][sums], abs=1e-5), name
            assert block["texts"][text]["agreements_by_window"] == whole["texts"][text]["agreements_by_window"]
            assert block["texts"][text]["token_ids_sha256"] == whole["texts"][text]["token_ids_sha256"]


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma"])
def test_logits_are_those_of_the_whole_model_wherever_rows_wait(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, tie_word_embeddings=family == "qwen3")
    given, kept = [*rows(40, 40, 24), *rows(40)], tmp_path / "kept"
    kept.mkdir()
    whole = RUNTIMES.get("transformers").load(folder, LoadOptions(dtype="float32"))
    expected = [whole.logits(row) for row in given]
    for keep in (None, on_cpu, OnDisk(kept)):
        loaded, found = read(folder, given, keep)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not any(kept.iterdir())
    (alone,) = rows(17)
    torch.testing.assert_close(loaded.logits(alone), whole.logits(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next(iter(loaded.logits_of([alone]))), whole.logits(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss", "dbrx", "zamba2"])
def test_layers_that_the_model_holds_otherwise_are_read_by_their_names(architecture: str, tmp_path: Path) -> None:
    """Transposed, in stacks of experts, and shared by blocks."""
    make(tmp_path / "model", architecture)
    spec = variant(group_size=32, ignore=["lm_head", "o_proj"])
    (folder,) = exported(Job(tmp_path / "model", {"reference": "small"}, "float32"), [spec], tmp_path)
    whole = RUNTIMES.get("reference").load(folder, LoadOptions(dtype="float32"))
    given = rows(24)
    torch.testing.assert_close(read(folder, given)[1][0], whole.logits(given[0]), rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_blocks(tmp_path: Path) -> None:
    peaks = {}
    for blocks in (3, 9):
        folder = make_model(tmp_path / str(blocks), num_hidden_layers=blocks, hidden_size=128, intermediate_size=512)
        with PeakBytes() as tracker:
            loaded, _ = read(folder, rows(16, 16))
        peaks[blocks] = tracker.peak
        whole = RUNTIMES.get("transformers").load(folder, LoadOptions(dtype="float32")).weights_bytes()
        assert loaded.weights_bytes() < whole / 2
    assert peaks[9] <= 1.02 * peaks[3]


def test_what_does_not_fit_is_read_a_block_at_a_time_and_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = EvaluationJob(model, spec_of(metrics=["perplexity", "memory", "speed"], samples=2))
    assert evaluate(job, silent)["loaded_by"] == "transformers"
    monkeypatch.setattr(loading, "free_bytes", lambda *_: 1 << 16)
    steps: list[str] = []
    found = evaluate(job, lambda step, *_: steps.append(step))
    assert (found["loaded_by"], found["speed"]) == ("streamed", None)
    assert "samples" not in found
    assert found["notes"][0].startswith("read a block at a time: loaded whole it would take ")
    assert "waits on disk" in found["notes"][1]
    assert found["notes"][2] == "left out, as each token would read all weights anew: speed, samples"
    memory = found["memory"]
    assert memory["weights_are"] == "one block at a time, decoded to float"
    assert list(memory["phases"]) == ["load"]
    assert steps.count("blocks") == 2
    whole = evaluate(EvaluationJob(model, spec_of(loader="whole", metrics=["perplexity"])), silent)
    assert whole["loaded_by"] == "transformers"
    assert found["metrics"]["perplexity"] == pytest.approx(whole["metrics"]["perplexity"], rel=1e-6)


def test_a_model_that_makes_its_logits_of_more_is_loaded_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        found = own(self, input_ids=input_ids, **given)
        found.logits = found.logits * (1 + input_ids[..., None] % 3)
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(EvaluationError, match="not made of the last hidden states alone"):
        evaluate(EvaluationJob(model, spec_of(loader="streamed", metrics=["perplexity"])), silent)
    monkeypatch.setattr(loading, "free_bytes", lambda *_: 1 << 16)
    tried: list[weakref.ref[StreamedModel]] = []
    alive: list[bool] = []

    def streamed(*given: Any) -> StreamedModel:
        loaded = load_streamed(*given)
        tried.append(weakref.ref(loaded))
        return loaded

    load = RUNTIMES.get("transformers").load

    def whole(path: Path, options: LoadOptions) -> Any:
        alive.extend(each() is not None for each in tried)
        return load(path, options)

    monkeypatch.setattr(loading, "load_streamed", streamed)
    monkeypatch.setattr(RUNTIMES.get("transformers"), "load", whole)
    found = evaluate(EvaluationJob(model, spec_of(metrics=["perplexity"])), silent)
    assert alive == [False]
    assert found["loaded_by"] == "transformers"
    assert found["notes"][1].startswith("loaded whole all the same: the model cannot be read a block at a time")


def test_a_full_disk_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "0").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"):
        read(model, rows(40), OnDisk(tmp_path))


def test_what_waited_on_disk_and_is_no_longer_whole_is_one_line(tmp_path: Path) -> None:
    keep, value = OnDisk(tmp_path), torch.arange(64.0)
    cut, gone, whole = keep(value), keep(value), keep(value)
    (tmp_path / "0").write_bytes(b"short")
    (tmp_path / "1").unlink()
    with pytest.raises(OutputError, match="0 is shorter than what waited in it"):
        cut()
    with pytest.raises(OutputError, match=r"what waited in .*1 cannot be read: No such file"):
        gone()
    assert torch.equal(whole(), value)


def test_a_disk_that_takes_no_more_of_a_walk_is_one_line(tmp_path: Path) -> None:
    class Standing:
        place = AtSegment(0, (torch.ones(1 << 16),), {})
        parked: ClassVar[list[Any]] = []

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*: File too large"):
            Parking(0, tmp_path).park(cast(Pass, Standing()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_of_tasks_are_read_together_as_far_as_there_is_room(model: Path) -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(4096, 512, "bfloat16", "cuda")
    each = 2 * anatomy.hidden * 2
    assert tokens_with_room(anatomy, scored, "cpu", 100_000 * each) == 80_000
    assert tokens_with_room(anatomy, scored, "disk", 10 * each) == scored.tokens
    bare = streamed_scoring(anatomy, scored, waiting="disk").nbytes
    assert 79_000 < tokens_with_room(anatomy, scored, "device", 100_000 * each + bare * 5 // 4) <= 80_000
    loaded, given = load_streamed(model, LoadOptions(dtype="float32"), None, 50), rows(20, 20, 20, 60)
    read: list[int] = []
    ahead = loaded.read_ahead

    def counted(rows: Any, on_step: Any) -> None:
        read.append(len(rows))
        ahead(rows, on_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "read_ahead", counted)
        assert [len(found) for found in loaded.logits_of(given)] == [20, 20, 20, 60]
    assert read == [2, 1, 1]


def test_memory_that_ends_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_path: Path, _options: LoadOptions) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(RUNTIMES.get("transformers"), "load", load)
    with pytest.raises(EvaluationError, match="the CPU has not enough memory") as caught:
        evaluate(EvaluationJob(model, spec_of(metrics=["perplexity"])), silent)
    assert str(caught.value.remedy).startswith("set evaluation.loader: streamed")


def test_answers_are_refused_of_a_model_that_does_not_write() -> None:
    with pytest.raises(RecipeError, match="writes no answers"):
        spec_of(loader="streamed", answers={"samples": 2})


def test_a_run_tells_of_blocks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "run_job", score_here)
    evaluation = {**SPEC, "texts": ["prose"], "loader": "streamed", "metrics": [*FIGURES, "memory"], "samples": 2}
    variants = [{"name": "plain", "method": "rtn", "format": "hqq"}]
    records = write_records(tmp_path / "records.jsonl")
    told = Listener()
    found = quantkit.run(make_recipe(model, records, tmp_path / "run", variants, evaluation=evaluation), told)
    (row,) = found["variants"]
    assert found["baseline"]["loaded_by"] == row["loaded_by"] == "streamed"
    ahead = [step.step for step in told.ahead if step.step != "block"]
    assert ahead == ["load", "blocks", "prose", ""] * 2
    assert {"blocks", "prose"} <= {name for name, _, _ in told.steps}
    assert row["notes"][-1] == "scoring: left out, as each token would read all weights anew: samples"
    assert row["memory"]["estimates"]["weights"]["ratio"] == pytest.approx(1, rel=0.05)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The model was read a block at a time" in report
    assert "the reference decoder, a block at a time" in Path(row["checkpoint"], "README.md").read_text()
    assert not list((tmp_path / "run").rglob("activations-*"))


def test_a_70b_does_not_fit_on_a_card_and_its_blocks_do() -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(16384, 512, "bfloat16", "cuda")
    assert whole_scoring(anatomy, scored).nbytes > 130 * GIB
    assert block_bytes(anatomy, "bfloat16") < streamed_scoring(anatomy, scored).nbytes < 12 * GIB


def test_pages_of_files_count_where_tensors_are_copied_or_stay_packed() -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(16384, 8, "float32")
    weights, file = anatomy.parameters * 4, 40 * GIB
    loading = whole_scoring(anatomy, scored)
    assert loading.nbytes == weights + anatomy.parameters * 2
    assert loading.title == "loading the whole model"
    kept = whole_scoring(anatomy, scored, pages=False)
    assert weights < kept.nbytes < 1.01 * weights
    packed = whole_scoring(anatomy, scored, loaded_as(anatomy, scored, "decoded at first use", file))
    assert packed.nbytes == kept.nbytes + file
    own = whole_scoring(anatomy, Scored(16384, 8, "bfloat16"))
    assert anatomy.parameters * 2 < own.nbytes < 1.01 * anatomy.parameters * 2
    one_layer = whole_scoring(anatomy, scored, loaded_as(anatomy, scored, "packed, a layer decoded at a time", file))
    assert file < one_layer.nbytes < file + 16 * GIB
    decoded = whole_scoring(anatomy, scored, loaded_as(anatomy, scored, "decoded", file))
    assert weights < decoded.nbytes < 1.05 * weights


def test_activations_wait_where_there_is_room() -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(1 << 21, 512, "bfloat16", "cuda")
    needed = hidden_line(anatomy, scored).nbytes
    assert needed == 2 * scored.tokens * anatomy.hidden * 2
    assert where_activations_wait(anatomy, scored, 2 * needed, 0) == "device"
    assert where_activations_wait(anatomy, scored, needed, 2 * needed) == "cpu"
    assert where_activations_wait(anatomy, scored, needed, needed) == "disk"
    on_cpu = Scored(1 << 21, 512, "bfloat16", "cpu")
    assert where_activations_wait(anatomy, on_cpu, needed, needed) == "disk"


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/\n", {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 200\nanon 1"}, [500]),
        ("0::/\n", {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 1"}, []),
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "total_active_file 50\ntotal_inactive_file 0",
            },
            [150],
        ),
        ("3:cpu:/\n", {"memory/memory.limit_in_bytes": "1000"}, []),
    ],
)
def test_what_a_container_leaves_is_read(tmp_path: Path, lines: str, files: dict[str, str], left: list[int]) -> None:
    root = group(tmp_path, lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(left_by_groups(root)) == left
