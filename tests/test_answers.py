"""Answers to instructions that a model was not calibrated on: drawn, given, judged, kept and shown."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from quantkit import report
from quantkit.calibration import CalibrationSet
from quantkit.errors import EvaluationError, MissingDependencyError
from quantkit.evaluation import stage as scores
from quantkit.evaluation.answer_metrics import answer_metric, exact_match, jackknifed
from quantkit.evaluation.answers import asked, beside_float, changes, load_questions, read_answers, write_answers
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.job import EvaluationJob
from quantkit.pipeline import run
from quantkit.pipeline.run import seen_questions
from quantkit.recipe import AnswerSpec, EvaluationSpec, Recipe
from quantkit.records import Message, Record, read_file
from quantkit.runtimes._packed import load_packed
from quantkit.runtimes.base import LoadOptions
from quantkit.system.artifacts import read_json
from tests.runs import Notebook, make_recipe, recipe_data, score_here
from tests.task_files import write_task
from tests.tiny import tiny_tokenizer

LONG = 512


def write_held_out(file: Path, count: int = 6) -> Path:
    rows = [{"instruction": f"Say {n}.", "output": f"{n} it is, and nothing else"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def questions_of(spec: AnswerSpec, seen: Sequence[str] = (), longest: int = LONG) -> Any:
    return load_questions(spec, tiny_tokenizer(), frozenset(seen), longest)


# Questions


def test_a_question_is_the_conversation_up_to_the_last_answer_as_the_template_begins_it(tmp_path: Path) -> None:
    found = questions_of(AnswerSpec(file=str(write_held_out(tmp_path / "held.jsonl", 2))))
    question = next(each for each in found.items if each.text == "Say 1.")
    assert question.expected == "1 it is, and nothing else"
    written = "<|im_start|>user\nSay 1.<|im_end|>\n<|im_start|>assistant\n"
    assert question.prompt == tiny_tokenizer()(written).input_ids


def test_as_many_are_drawn_as_wanted_in_the_order_of_the_seed(tmp_path: Path) -> None:
    file = str(write_held_out(tmp_path / "held.jsonl", 12))
    first, again, other = (
        [each.text for each in questions_of(AnswerSpec(file=file, samples=5, seed=seed)).items] for seed in (0, 0, 1)
    )
    assert len(first) == 5
    assert first == again != other


def test_what_was_calibrated_on_is_left_out_with_a_note(tmp_path: Path) -> None:
    file = write_held_out(tmp_path / "held.jsonl", 6)
    seen = [question for record in read_file(file).records[:4] for question in asked(record)]
    found = questions_of(AnswerSpec(file=str(file)), seen)
    assert sorted(each.text for each in found.items) == ["Say 4.", "Say 5."]
    assert found.facts()["left_out"] == {"in the calibration set": 4}
    with pytest.raises(EvaluationError, match="0 of the 6 records of held can be asked: 6 in the calibration set"):
        questions_of(AnswerSpec(file=str(file)), [q for record in read_file(file).records for q in asked(record)])


def test_each_turn_of_a_conversation_was_asked() -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    whole, first = list(asked(Record(messages=tuple(turns)))), list(asked(Record(messages=tuple(turns[:2]))))
    assert len(whole) == 2
    assert first == whole[:1]
    assert list(asked(Record(text="plain"))) == []


def test_what_cannot_be_asked_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows: list[dict[str, Any]] = [{"text": "no question"}, {"instruction": "x" * 300, "output": "long"}]
    rows += [{"instruction": f"Say {n}.", "output": "yes"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = questions_of(AnswerSpec(file=str(file), max_new_tokens=8), longest=120)
    assert len(found.items) == 3
    assert found.left_out == {"no question with an answer": 1, "too long": 1}


def test_a_recipe_knows_what_its_calibration_set_holds(model: Path, records: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model, records, tmp_path / "out", [{"name": "a"}])
    asking = recipe.model_copy(update={"evaluation": EvaluationSpec(answers=AnswerSpec())})
    used = CalibrationSet([], {"records": {"used_indices": [3, 5]}}, "", 0)
    every = read_file(records).records
    assert set(seen_questions(asking, used)) == {q for place in (3, 5) for q in asked(every[place])}
    assert seen_questions(recipe, used) == seen_questions(asking, None) == ()


# Metrics


def test_exact_match_is_a_share_with_its_error() -> None:
    found = exact_match(["a", "b ", "c", "d"], ["a", "b", "C", "x"])["exact_match"]
    assert (found["value"], found["samples"]) == (0.5, 4)
    assert found["stderr"] == pytest.approx(math.sqrt(0.25 / 3))


def test_rouge_is_the_f_measure_of_common_words() -> None:
    pytest.importorskip("rouge_score", reason="rouge needs quantkit-ptq[tasks]")
    found = answer_metric("rouge", trusted=False)(["the tide is out", "no"], ["the tide is in", "yes"])
    assert found["rouge1"]["value"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["rouge2"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["rougeL"]["stderr"] == pytest.approx(3 / 8)
    assert set(found) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_the_jackknife_of_a_mean_is_the_textbook_error() -> None:
    def mean(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
        return {"length": sum(map(len, answers)) / len(answers)}

    found = jackknifed(mean, ["a", "bb", "cccccc"], ["", "", ""])["length"]
    assert found["value"] == 3
    assert found["stderr"] == pytest.approx(math.sqrt(7) / math.sqrt(3))


def test_a_script_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evaluate", reason="metric scripts need quantkit-ptq[tasks]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)  # another test's, which lie in another folder
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not Path(each, "evaluate_modules").exists()])
    folder = tmp_path / "lengths"
    folder.mkdir()
    (folder / "lengths.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass Lengths(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('string'),"
        " 'references': datasets.Value('string')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'length': sum(map(len, predictions)) / len(predictions)}\n",
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError, match="is Python code") as caught:
        answer_metric(str(folder), trusted=False)
    assert "trust_remote_code" in caught.value.remedy
    found = answer_metric(str(folder), trusted=True)(["a", "bb", "cccccc"], ["", "", ""])
    assert found["length"]["value"] == 3
    assert found["length"]["stderr"] == pytest.approx(math.sqrt(7) / math.sqrt(3))
    (folder / "lengths.py").write_text("import there_is_no_such_package\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="cannot be loaded: ImportError"):
        answer_metric(str(folder), trusted=True)
    with pytest.raises(EvaluationError, match="there is no metric"):
        answer_metric(str(tmp_path / "absent"), trusted=True)


def test_without_its_package_rouge_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-ptq\[tasks\]'"):
        answer_metric("rouge", trusted=False)


# Answers


def test_answers_are_the_models_own_greedy_ones(model: Path, tmp_path: Path) -> None:
    file, out = write_held_out(tmp_path / "held.jsonl", 3), tmp_path / "answers.jsonl"
    given = {"file": str(file), "max_new_tokens": 5, "metrics": ["exact_match"]}
    spec = EvaluationSpec.model_validate(
        {"texts": ["prose"], "context_length": 16, "max_tokens": 32, "metrics": ["perplexity"], "answers": given}
    )
    result = evaluate(EvaluationJob(model, spec, answers_file=out), lambda step, done, total: None)
    loaded, tokenizer = load_packed(model, LoadOptions(dtype="float32")), tiny_tokenizer()
    for line, question in zip(read_answers(out), questions_of(AnswerSpec(file=str(file))).items, strict=True):
        ids, _ = loaded.decode(torch.tensor(question.prompt), 5)
        assert line["generated"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert (line["question"], line["expected"]) == (question.text, question.expected)
    assert result["answers"]["questions"] == 3
    assert result["metrics"]["answers"]["exact_match"]["value"] == 0
    assert "changed" not in result["answers"]


def test_answers_are_compared_with_the_float_models(tmp_path: Path) -> None:
    def told(key: str, text: str) -> dict[str, str]:
        return {"sha256": key, "question": key, "expected": "e", "generated": text}

    file = tmp_path / "float.jsonl"
    write_answers(file, [told("a", "one"), told("b", "zwei")])
    given = beside_float([told("a", "one"), told("b", "two")], file)
    assert changes(given) == {"changed": 1, "examples": [told("b", "two") | {"float": "zwei"}]}
    with pytest.raises(EvaluationError, match="lacks 1 of the questions"):
        beside_float([told("c", "")], file)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(EvaluationError, match="cannot be read"):
        beside_float([], file)


# A whole run


@pytest.fixture(scope="module")
def whole(
    model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recipe, dict[str, Any], list[str]]:
    """A run with a task and answers, whose held-out file begins with the calibration set."""
    pytest.importorskip("lm_eval", reason="tasks need quantkit-ptq[tasks]")
    folder = tmp_path_factory.mktemp("run")
    own = write_held_out(folder / "own.jsonl", 4)
    held = folder / "held.jsonl"
    held.write_text(records.read_text(encoding="utf-8") + own.read_text(encoding="utf-8"), encoding="utf-8")
    data = recipe_data(model, records, folder / "out", [{"name": "int2", "method": "gptq", "bits": 2}])
    data["calibration"]["samples"] = 20
    data["evaluation"] |= {
        "tasks": [str(write_task(folder / "task"))],
        "answers": {"file": str(held), "max_new_tokens": 6},
    }
    data["gates"] = ["tasks.sums.acc >= 0", "answers.rougeL <= 1", "answers.exact_match >= 100%"]
    recipe = Recipe.model_validate(data)
    observer = Notebook()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "run_job", score_here)
        content = run(recipe, observer)
        again = Notebook()
        run(recipe, again)
    return folder / "out", recipe, content, again.notes


def test_a_run_asks_every_variant_and_the_float_model_the_same(whole: Any) -> None:
    out, _, content, _ = whole
    row = content["variants"][0]
    assert row["error"] is None
    assert row["answers"]["questions"] == content["baseline"]["answers"]["questions"] == 4
    assert row["answers"]["left_out"]["in the calibration set"] == 20
    before, after = (read_answers(out / name / "answers.jsonl") for name in ("baseline", "evaluations/int2"))
    assert [each["sha256"] for each in before] == [each["sha256"] for each in after]
    assert [each["generated"] for each in before] == [each["float"] for each in after]
    assert row["answers"]["changed"] == sum(each["float"] != each["generated"] for each in after) > 0
    assert set(row["metrics"]["tasks"]) == set(content["baseline"]["metrics"]["tasks"]) == {"sums.acc", "sums.acc_norm"}
    assert read_json(out / "evaluations" / "int2" / "result.json")["metrics"] == row["metrics"]


def test_a_second_run_reuses_its_answers(whole: Any) -> None:
    notes = whole[3]
    assert Counter(note.partition(":")[2] for note in notes)[" reused the finished evaluation"] == 2


def test_gates_judge_tasks_and_answers(whole: Any) -> None:
    verdicts = {gate["gate"]: gate["passed"] for gate in whole[2]["gates"]}
    assert verdicts == {
        "tasks.sums.acc >= 0": True, "answers.rougeL <= 1": True, "answers.exact_match >= 100%": False
    }  # fmt: skip


def test_the_report_shows_figures_with_errors_and_the_answers_that_changed(whole: Any) -> None:
    out, _, content, _ = whole
    markdown, page = ((out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    figure = content["variants"][0]["metrics"]["tasks"]["sums.acc"]
    shown = f"{figure['value']:.3f} ± {figure['stderr']:.3f}"
    for text in (markdown, page):
        assert shown in text
        assert "answers.rougeL" in text
        assert f"{content['variants'][0]['answers']['changed']} of 4 answers" in text
        assert "Say 1." in text or "Say 2." in text or "Say 3." in text or "Say 0." in text
        assert "20 in the calibration set" in text


def test_few_figures_stand_in_the_terminal_and_many_do_not(whole: Any) -> None:
    def printed(content: dict[str, Any]) -> str:
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(report.table(content))
        return console.export_text()

    content = json.loads(json.dumps(whole[2]))
    assert "answers.rouge1" not in printed(content)
    assert "sums.acc_norm" not in printed(content)
    assert all(name in printed(content) for name in ("sums.acc", "answers.rougeL"))  # gates are about them
    for row in (content["baseline"], *content["variants"]):
        del row["metrics"]["answers"]
    assert "sums.acc_norm" in printed(content)
