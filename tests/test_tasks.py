"""Tasks of lm-evaluation-harness, on a model as quantkit's runtimes load it."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors

from quantkit.errors import EvaluationError, MissingDependencyError
from quantkit.evaluation import EvaluationJob, run_job
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.harness import HarnessModel
from quantkit.evaluation.task_sandbox import Patterns, Templates, sandboxed
from quantkit.evaluation.tasks import loaded_tasks
from quantkit.pipeline.preflight import check_scoring
from quantkit.recipe import EvaluationSpec, TaskSpec
from quantkit.runtimes import RUNTIMES, _model
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes._packed import load_packed
from quantkit.runtimes.base import LoadedModel, LoadOptions
from tests.task_files import GENERATE, PERPLEXITY, write_data, write_task
from tests.test_llama_cpp import CONTEXT, write_llama
from tests.tiny import SPECIAL, VOCABULARY, make_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="tasks need quantkit-ptq[tasks]")

BOS, EOS = SPECIAL.index("<s>"), SPECIAL.index("</s>")
LENGTH = 48
PAIRS = [
    ("The tide is", " out"),
    ("The tide is ", " out"),
    ("The tide is ", "in"),
    ("", "a word"),
    ("long " * 30, " yes"),
    ("Question: why?\nAnswer:", " a"),
    ("Question: why?\nAnswer:", " b"),
    ("Question: why?\nAnswer:", " because"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "float", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TransformersModel:
    return load_packed(checkpoint, LoadOptions(dtype="float32"))


def harness(model: LoadedModel, tokenizer: Any = None, length: int = LENGTH) -> HarnessModel:
    return HarnessModel(model, tokenizer or tiny_tokenizer(), frozenset({EOS}), length, lambda done, total: None)


def requests(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def with_bos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def spec_with(task: Any, **changes: Any) -> EvaluationSpec:
    given = {"texts": ["prose"], "context_length": 16, "max_tokens": 32, "metrics": ["perplexity"], "device": "cpu"}
    return EvaluationSpec.model_validate({**given, "tasks": [task], **changes})


def scored(checkpoint: Path, task: Any, *, trusted: bool = False, **changes: Any) -> dict[str, Any]:
    job = EvaluationJob(checkpoint, spec_with(task, **changes), trust_remote_code=trusted)
    return evaluate(job, lambda step, done, total: None)


# The model


@pytest.mark.filterwarnings("ignore")  # the package's own
@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_and_texts_are_those_of_the_packages_own_model(model: TransformersModel, bos: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = with_bos() if bos else tiny_tokenizer()
    theirs = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=3, max_length=LENGTH)
    ours = harness(model, tokenizer)
    wanted = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(PAIRS))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    texts = requests([("The tide went out. " * 12,), ("a",)])
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-6)
    said = requests([("The tide", {"until": ["q"], "max_gen_toks": 12}), ("x" * 90, {"max_gen_toks": 5})])
    assert ours.generate_until(said) == theirs.generate_until(said, disable_tqdm=True)


def test_a_greedy_continuation_is_called_one(model: TransformersModel) -> None:
    prompt = "x" * 40
    (likeliest,) = harness(model).generate_until(requests([(prompt, {"max_gen_toks": 1})]))
    assert likeliest.isascii()
    found = harness(model).loglikelihood(requests([(prompt, likeliest), (prompt, chr(ord(likeliest) ^ 1))]))
    assert [greedy for _, greedy in found] == [True, False]


def test_figures_do_not_depend_on_how_many_are_read_at_once(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = harness(model).loglikelihood(requests(PAIRS))
    monkeypatch.setattr(_model, "LOGITS_AT_ONCE", 1)
    alone = harness(model).loglikelihood(requests(PAIRS))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_a_context_that_continuations_share_is_read_once(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counting(rows: Sequence[torch.Tensor]) -> Any:
        read.extend(map(len, rows))
        return TransformersModel.logits_of(model, rows)

    monkeypatch.setattr(model, "logits_of", counting)
    harness(model).loglikelihood(requests([("Which?", "a"), ("Which?", "b"), ("Which?", "c")]))
    assert read == [len("Which?")]


def test_a_text_ends_at_the_first_stop_word_or_end(model: TransformersModel) -> None:
    options: dict[str, Any] = {"max_gen_toks": 12}
    (whole,) = harness(model).generate_until(requests([("The tide", options)]))
    assert len(whole) > 2
    stop = whole[2:4]
    (cut,) = harness(model).generate_until(requests([("The tide", {**options, "until": stop})]))
    assert cut == whole[: whole.index(stop)]
    ids = list(islice(model.greedy(torch.tensor(tiny_tokenizer()("The tide").input_ids)), 12))
    ended = replace(harness(model), ends=frozenset({ids[3]})).generate_until(requests([("The tide", options)]))
    assert ended == [tiny_tokenizer().decode(ids[: ids.index(ids[3])])]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"temperature": 0.7}, {"max_gen_toks": LENGTH}])
def test_sampling_and_what_does_not_fit_are_refused(model: TransformersModel, options: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=r"drawn at random|max_length is"):
        harness(model).generate_until(requests([("a", options)]))


def test_broken_logits_are_refused(model: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logits_of", lambda rows: (torch.full((len(row), VOCABULARY), math.nan) for row in rows))
    with pytest.raises(EvaluationError, match="NaN or infinite logits on a task"):
        harness(model).loglikelihood(requests(PAIRS))


def test_every_runtime_that_scores_does_tasks(checkpoint: Path, model: TransformersModel, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp needs quantkit-ptq[llama-cpp]")
    write_llama(tmp_path / "tiny.gguf", dict(model.model.state_dict()))
    options = LoadOptions(dtype="float32", context_length=LENGTH)
    wanted = [value for value, _ in harness(model).loglikelihood(requests(PAIRS))]
    said = requests([("The tide", {"max_gen_toks": 8})])
    for name, path in (("reference", checkpoint), ("llama.cpp", tmp_path / "tiny.gguf")):
        loaded = harness(RUNTIMES.get(name).load(path, options))
        found = [value for value, _ in loaded.loglikelihood(requests(PAIRS))]
        # llama.cpp keeps keys and values in float16.
        assert found == pytest.approx(wanted, rel=2e-3), name
        assert loaded.generate_until(said) == harness(model).generate_until(said), name


def test_a_model_that_is_read_a_block_at_a_time_does_what_needs_no_writing(checkpoint: Path, tmp_path: Path) -> None:
    asked = {"file": str(write_task(tmp_path)), "limit": 4}
    writes = tmp_path / "words.yaml"
    writes.write_text(GENERATE, encoding="utf-8")
    whole = scored(checkpoint, asked)["metrics"]["tasks"]
    streamed = scored(checkpoint, asked, loader="streamed", tasks=[asked, {"file": str(writes), "limit": 3}])
    assert streamed["metrics"]["tasks"] == whole
    assert streamed["notes"] == ["left out, as each token would read all weights anew: task words, samples"]


def test_a_runtime_without_a_cache_of_its_own_continues_as_those_with_one(model: TransformersModel) -> None:
    prompt = torch.tensor(tiny_tokenizer()("The tide").input_ids)
    slow, fast = LoadedModel.greedy(model, prompt), model.greedy(prompt)
    assert [next(slow) for _ in range(6)] == [next(fast) for _ in range(6)] == model.decode(prompt, 6)[0]


# Tasks


def test_accuracy_and_its_error_are_those_of_the_likelihoods(checkpoint: Path, tmp_path: Path) -> None:
    result = scored(checkpoint, str(write_task(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = harness(load_packed(checkpoint, LoadOptions(dtype="float32")), length=CONTEXT)
    right = []
    for row in rows:
        pairs = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        values = [value for value, _ in ours.loglikelihood(requests(pairs))]
        right.append(float(values.index(max(values)) == row["right"]))
    mean = sum(right) / len(right)
    figure = result["metrics"]["tasks"]["sums.acc"]
    assert (figure["value"], figure["samples"]) == (pytest.approx(mean), len(rows))
    assert figure["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(rows) - 1)))
    assert set(result["metrics"]) == {"perplexity", "tasks"}
    assert set(result["metrics"]["tasks"]) == {"sums.acc", "sums.acc_norm"}


def test_a_limit_takes_the_first_documents_and_examples_change_the_prompts(checkpoint: Path, tmp_path: Path) -> None:
    file = str(write_task(tmp_path))
    first = scored(checkpoint, {"file": file, "limit": 4})
    shown = scored(checkpoint, {"file": file, "limit": 4, "fewshot": 2})
    again = scored(checkpoint, {"file": file, "limit": 4, "fewshot": 2})
    figures = [result["metrics"]["tasks"]["sums.acc"] for result in (first, shown, again)]
    assert [figure["samples"] for figure in figures] == [4, 4, 4]
    assert figures[0]["prompts_checksum"] != figures[1]["prompts_checksum"]
    assert figures[1] == figures[2]
    assert (shown["tasks"]["sums"]["fewshot"], shown["tasks"]["sums"]["limit"]) == (2, 4)


def test_the_chat_template_is_used_where_it_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    file = str(write_task(tmp_path))
    plain = scored(checkpoint, {"file": file, "limit": 2})["metrics"]["tasks"]["sums.acc"]
    chat = scored(checkpoint, {"file": file, "limit": 2, "chat_template": True})["metrics"]["tasks"]["sums.acc"]
    assert plain["prompts_checksum"] != chat["prompts_checksum"]


@pytest.mark.parametrize(("text", "place"), [(GENERATE, "tasks/words.exact_match"), (PERPLEXITY, "task_losses/")])
def test_texts_and_perplexities_are_scored(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    write_data(tmp_path)
    file = tmp_path / "task.yaml"
    file.write_text(text, encoding="utf-8")
    kind, _, name = place.partition("/")
    figures = scored(checkpoint, {"file": str(file), "limit": 3})["metrics"][kind]
    figure = figures[name or "prose.word_perplexity"]
    assert figure["samples"] == 3
    assert figure["value"] > 1 if kind == "task_losses" else figure["value"] == 0


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("{{''.__class__.__mro__}}", "unsafe"),
        ("{{question.__init__.__globals__}}", "unsafe"),
        ("{{absent}}", "absent"),
    ],
)
def test_templates_run_in_a_sandbox(checkpoint: Path, tmp_path: Path, prompt: str, hint: str) -> None:
    from lm_eval import utils

    engine = utils.env
    with pytest.raises(EvaluationError, match=hint):
        scored(checkpoint, str(write_task(tmp_path, prompt)))
    assert utils.env is engine


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab' | regex_replace('(a|a)*c', '') }}",
    ],
)
def test_a_template_that_never_ends_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.setattr("quantkit.records.sandbox.SECONDS", 1.0)
    with pytest.raises(EvaluationError, match=r"task sums.*: it takes more than 1 seconds"):
        scored(checkpoint, str(write_task(tmp_path, prompt)))


def test_templates_give_what_the_package_gives() -> None:
    from lm_eval.utils import apply_template

    document: dict[str, Any] = {
        "question": "Wie groß?\n",
        "choices": ["a", "b"],
        "right": 1,
        "score": 0.5,
        "nested": {"x": [1, None, True]},
        "when": date(2024, 2, 29),
        "raw": b"bytes",
        "self": "a name that Python uses",
    }
    for template in (
        "Q: {{question}}A:\n",
        "{{choices}} {{choices[right]}} {{nested}} {{nested.x}} {{score * 2}}",
        "{{choices.index('b')}}{% set _ = choices.append('c') %}{{choices | length}}",
        "{{when}} {{raw}} {{question | regex_replace('[^a-z]+', '_')}}",
        "{% for each in choices %}\n  {{loop.index}}. {{each}}\n{% endfor %}\n",
        "{{ question | trim | upper }}{% if score > 0 %} yes{% endif %} {{ 7 // 2 }}",
    ):
        copy = {**document, "choices": list(document["choices"])}
        del copy["self"]  # which the package cannot take
        assert Templates().from_string(template).render(**document) == apply_template(template, copy)


def test_a_template_that_draws_gives_the_same_text_each_time() -> None:
    template = Templates().from_string("{{ range(1000) | random }}")
    drawn = [template.render(number=number) for number in (1, 2, 1, 2)]
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


ANSWERS = ["#### 1,234 and #### 5", "(A) or (b)", "", "ÄÖ 7\n#### -8"]


@pytest.mark.parametrize(
    ("pattern", "flags"), [(r"#### (\-?[0-9\.\,]+)", 0), (r"\(([a-z])\)", re.IGNORECASE), (r"(\w)(\d)?", 0), (r"x*", 0)]
)
def test_patterns_find_what_python_finds(pattern: str, flags: int) -> None:
    patterns = Patterns()
    for answer in ANSWERS:
        assert patterns.compile(pattern, flags).findall(answer) == re.findall(pattern, answer, flags)
        assert patterns.findall(pattern, answer, flags) == re.findall(pattern, answer, flags)
        assert patterns.sub(pattern, r"<\g<0>>", answer, flags) == re.sub(pattern, r"<\g<0>>", answer, flags=flags)
    assert patterns.escape("a.b") == r"a\.b"
    with pytest.raises(re.error):
        patterns.compile("(")


def test_a_pattern_that_never_ends_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import metrics
    from lm_eval.filters import extraction

    monkeypatch.setattr("quantkit.records.sandbox.SECONDS", 1.0)
    with sandboxed():
        found = extraction.RegexFilter(r"#### (\d+)").apply([["#### 12"], ["none"]], [{}, {}])
        assert list(found) == [["12"], ["[invalid]"]]
        with pytest.raises(
            EvaluationError, match=r"pattern '\(a\|a\)\*c' of a task fails: it takes more than 1 seconds"
        ):
            extraction.RegexFilter("(a|a)*c").apply([["a" * 60]], [{}])
        with pytest.raises(EvaluationError, match="takes more than 1 seconds"):
            metrics.exact_match_hf_evaluate(["a" * 60], ["b"], regexes_to_ignore=["(a|a)*c"])
    assert extraction.re is metrics.re is re


def otherwise(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Have the package do something by itself, as another version of it might."""
    import jinja2
    from lm_eval.api import metrics, task
    from lm_eval.filters.extraction import RegexFilter

    own: dict[str, dict[str, tuple[Any, Any]]] = {
        "templates of tasks": {
            "apply_template": (task.utils, lambda text, document: jinja2.Template(text).render(**document))
        },
        "patterns that find answers": {
            "__init__": (RegexFilter, lambda self, regex_pattern: None),
            "apply": (RegexFilter, lambda self, answers, documents: answers),
        },
        "patterns that metrics ignore": {"exact_match_hf_evaluate": (metrics, lambda **given: {"exact_match": 1.0})},
        "metrics of the hub": {"get_metric": (task, lambda name, fetched: metrics.exact_match_fn)},
    }
    for name, (place, function) in own[what].items():
        monkeypatch.setattr(place, name, function)


@pytest.mark.parametrize(
    "what",
    ["templates of tasks", "patterns that find answers", "patterns that metrics ignore", "metrics of the hub"],
)
def test_a_version_of_the_package_that_goes_past_a_stand_in_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from lm_eval import utils

    engine = utils.env
    otherwise(monkeypatch, what)
    with pytest.raises(EvaluationError, match=rf"lm-evaluation-harness 0\.\S+ handles {what} where quantkit cannot"):
        scored(checkpoint, str(write_task(tmp_path)))
    assert utils.env is engine


def test_code_of_a_task_runs_only_when_it_is_trusted(checkpoint: Path, tmp_path: Path) -> None:
    file = write_task(tmp_path)
    code = "def half(docs):\n    return docs.select(range(len(docs) // 2))\n"
    (tmp_path / "helpers.py").write_text(code, encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8") + "process_docs: !function helpers.half\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"!function helpers\.half"):
        scored(checkpoint, str(file))
    assert scored(checkpoint, str(file), trusted=True)["metrics"]["tasks"]["sums.acc"]["samples"] == 6


def test_a_metric_that_would_be_fetched_as_a_script_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = write_task(tmp_path)
    text = file.read_text(encoding="utf-8").replace("metric: acc_norm", "metric: google_bleu")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match="metric 'google_bleu' is a script of the hub") as caught:
        scored(checkpoint, str(file))
    assert "trust_remote_code" in caught.value.remedy


def test_a_task_that_is_not_right_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    file = write_task(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace("test_split: test", "test_split: dev"), encoding="utf-8")
    with pytest.raises(EvaluationError, match="task sums cannot be loaded: KeyError") as caught:
        scored(checkpoint, str(file))
    assert "\n" not in str(caught.value)


def test_nothing_is_left_of_the_data(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    file, cache = write_task(tmp_path), tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    scored(checkpoint, {"file": str(file), "limit": 2})
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_task_that_is_not_there_is_told_before_anything_is_scored(checkpoint: Path) -> None:
    spec = EvaluationSpec.model_validate({"tasks": ["arc_eazy"]})
    with pytest.raises(EvaluationError, match=r"has no task 'arc_eazy' \(did you mean arc_easy"):
        check_scoring(spec, [checkpoint])


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with (
        pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-ptq\[tasks\]'"),
        loaded_tasks([TaskSpec(name="arc_easy")], trusted=False),
    ):
        pass


def test_a_task_whose_data_are_not_to_be_had_says_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ndataset_path: org/data\ntest_split: test\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="task mine cannot be loaded: ConnectionError") as caught:
        scored(checkpoint, str(file))
    assert "give a task file with local data" in caught.value.remedy


@pytest.mark.slow
def test_without_the_network_a_task_of_the_hub_says_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(EvaluationError, match="task arc_easy cannot be loaded") as caught:
        run_job(EvaluationJob(checkpoint, spec_with({"name": "arc_easy", "limit": 1})), log=tmp_path / "log")
    assert "check the network, or give a task file with local data" in caught.value.remedy


@pytest.mark.slow
def test_a_name_that_there_is_not_gets_the_nearest(checkpoint: Path) -> None:
    with pytest.raises(EvaluationError, match="no task 'arc_esy'") as caught:
        scored(checkpoint, "arc_esy")
    assert "did you mean arc_easy" in caught.value.remedy


def test_a_job_in_a_process_of_its_own_needs_no_network(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    task = write_task(tmp_path / "task")
    steps: list[str] = []
    result = run_job(
        EvaluationJob(copy, spec_with({"file": str(task), "limit": 3})),
        log=tmp_path / "log",
        on_progress=lambda step, done, total: steps.append(step),
    )
    assert result["metrics"]["tasks"]["sums.acc"]["samples"] == 3
    assert "task sums" in steps
