"""Task files are read without running what they hold, and refused where they want code to be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import EvaluationError, RecipeError
from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.task_files import read_task
from quantkit.gates import parse_gate
from quantkit.recipe import AnswerSpec, EvaluationSpec, TaskSpec
from quantkit.recipe.evaluation import check_further_gate
from quantkit.system.validation import parse_section
from tests.task_files import write_task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks")


def appended(file: Path, text: str) -> Path:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")
    return file


# The recipe


def test_a_task_is_a_name_a_file_or_a_mapping() -> None:
    given = ["arc_easy", {"name": "gsm8k", "limit": 100, "fewshot": 5}, {"file": "one.yaml"}, "tasks/two.yml"]
    spec = parse_section(EvaluationSpec, {"tasks": given}, "evaluation")
    assert [(task.name, task.file, task.limit, task.fewshot) for task in spec.tasks] == [
        ("arc_easy", None, None, None), ("gsm8k", None, 100, 5), (None, "one.yaml", None, None),
        (None, "tasks/two.yml", None, None),
    ]  # fmt: skip
    assert EvaluationSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"tasks": [{"limit": 3}]}, "exactly one of 'name' and 'file'"),
        ({"tasks": [{"name": "a", "file": "a.yaml"}]}, "exactly one of 'name' and 'file'"),
        ({"tasks": ["arc_easy", "arc_easy"]}, "two tasks are called 'arc_easy'"),
        ({"tasks": [{"name": "arc_easy", "limits": 3}]}, "did you mean 'limit'"),
        ({"tasks": [{"name": "arc_easy", "limit": 0}]}, "tasks[0].limit"),
        ({"answers": {"metrics": ["rogue"]}}, "unknown metric 'rogue'"),
        ({"answers": {"file": "a.jsonl", "dataset": "org/name"}}, "at most one of 'file' and 'dataset'"),
        ({"answers": {"samples": 1}}, "answers.samples"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(given: dict[str, object], hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_section(EvaluationSpec, given, "evaluation")
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("gate", "tasks", "answers", "hint"),
    [
        ("tasks.arc_easy.acc >= 0.5", (), None, "evaluation.tasks"),
        ("task_losses <= 9", (), None, "evaluation.tasks"),
        ("answers.rougeL >= 0.3", (), None, "evaluation.answers"),
        ("answers.rougel >= 0.3", (), AnswerSpec(), "did you mean 'rougeL'"),
        ("answers.rouge1 >= 0.3", (), AnswerSpec(metrics=("exact_match",)), "no figure 'rouge1'"),
    ],
)
def test_a_gate_on_what_is_not_scored_is_refused(
    gate: str, tasks: tuple[TaskSpec, ...], answers: AnswerSpec | None, hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_further_gate(parse_gate(gate), tasks, answers)
    assert hint in str(caught.value)


def test_a_gate_on_what_is_scored_is_read() -> None:
    check_further_gate(parse_gate("tasks.arc_easy.acc >= 50%"), (TaskSpec(name="arc_easy"),), None)
    check_further_gate(parse_gate("answers.rougeL >= baseline -5%"), (), AnswerSpec())
    check_further_gate(parse_gate("answers.bleu >= 0.2"), (), AnswerSpec(metrics=("./metrics/bleu",)))
    assert parse_gate("tasks.arc_easy.acc >= 50%").bound == 0.5


# The file


def test_a_task_file_names_its_data_from_its_own_folder(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(task.parent.parent)
    found = read_task(Path("tasks/sums.yaml"))
    assert (found.name, found.is_local) == ("sums", True)
    assert found.data_files() == {"test": "tasks/data.jsonl"}
    found.check(trusted=False)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("process_docs: !function helpers.clean\n", "line 14: '!function helpers.clean'"),
        ("class: !function helpers.Task\n", "line 14: '!function helpers.Task'"),
        ("class: helpers.Task\n", "'class' names helpers.Task"),
        ("unsafe_code: true\n", "'unsafe_code' runs what the model writes"),
    ],
)
def test_code_is_refused_unless_it_is_trusted(task: Path, text: str, hint: str) -> None:
    found = read_task(appended(task, text))
    with pytest.raises(EvaluationError) as caught:
        found.check(trusted=False)
    assert hint in caught.value.problem
    assert "trust_remote_code" in caught.value.remedy
    found.check(trusted=True)


def test_a_metric_of_the_hub_is_code(task: Path) -> None:
    found = read_task(appended(task, "  - {metric: bleurt, hf_evaluate: true}\n"))
    with pytest.raises(EvaluationError, match="metric 'bleurt' is a script of the hub"):
        found.check(trusted=False)


def test_what_is_included_is_checked_as_the_file_is(task: Path) -> None:
    child = task.with_name("child.yaml")
    child.write_text("include: sums.yaml\ntask: child\n", encoding="utf-8")
    found = read_task(child)
    assert (found.name, found.config["output_type"]) == ("child", "multiple_choice")
    found.check(trusted=False)
    appended(task, "process_docs: !function helpers.clean\n")
    with pytest.raises(EvaluationError, match=r"sums\.yaml, line 14"):
        read_task(child).check(trusted=False)


def test_reading_a_file_runs_nothing(task: Path) -> None:
    mark = task.with_name("mark")
    task.with_name("helpers.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    read_task(appended(task, "process_docs: !function helpers.clean\n"))
    assert not mark.exists()
    with pytest.raises(EvaluationError, match="not valid YAML"):
        read_task(appended(task, "doc: !!python/object/apply:os.system ['true']\n"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("- a\n", "not a mapping"),
        ("task: [a, b]\n", "single task"),
        ("a: [\n", "not valid YAML"),
        ("include: t.yaml\ntask: a\n", "includes itself"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, text: str, hint: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=hint):
        read_task(file)


def test_missing_files_are_named(task: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot read task file .*absent\.yaml"):
        read_task(task.with_name("absent.yaml"))
    task.with_name("data.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"there is no data file .*data\.jsonl"):
        read_task(task).check(trusted=False)
    task.write_text("task: t\ndataset_path: json\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="names no data files"):
        read_task(task).check(trusted=False)


def test_the_identity_changes_with_the_data_and_with_what_is_included(task: Path) -> None:
    child = task.with_name("child.yaml")
    child.write_text("include: sums.yaml\ntask: child\n", encoding="utf-8")
    first = read_task(child).identity()
    assert set(first) == {"child.yaml", "sums.yaml", "data.jsonl"}
    appended(task.with_name("data.jsonl"), "\n")
    second = read_task(child).identity()
    appended(task, "description: other\n")
    third = read_task(child).identity()
    assert first["data.jsonl"] != second["data.jsonl"]
    assert second["sums.yaml"] != third["sums.yaml"]


def test_only_a_task_with_local_data_keeps_the_job_off_the_network(task: Path) -> None:
    def is_local(given: object) -> bool:
        return EvaluationJob(Path("x"), EvaluationSpec.model_validate({"tasks": [given]})).is_local

    assert is_local(str(task))
    assert not is_local("arc_easy")
    task.write_text("task: mine\ndataset_path: allenai/ai2_arc\n", encoding="utf-8")
    assert not is_local(str(task))
    answers = EvaluationSpec.model_validate({"answers": {"dataset": "org/name"}})
    assert not EvaluationJob(Path("x"), answers).is_local


def test_a_job_with_answers_travels(tmp_path: Path) -> None:
    spec = EvaluationSpec.model_validate({"tasks": ["arc_easy"], "answers": {"samples": 3}})
    job = EvaluationJob(tmp_path, spec, answers_file=tmp_path / "a", float_answers=tmp_path / "b", seen=("x", "y"))
    assert EvaluationJob.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dataset_kwargs: many\n", "'dataset_kwargs' is not a mapping"),
        ("metric_list: 3\n", "'metric_list' is not a list"),
        ('include: "a\\0b"\n', "to include"),
        (f"include: {'a' * 300}\n", "to include"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("task: again\n", "given twice"),
    ],
)
def test_what_a_task_file_cannot_say_is_one_line(task: Path, text: str, told: str) -> None:
    task.write_text(f"task: sums\n{text}", encoding="utf-8")
    with pytest.raises(EvaluationError, match=told):
        read_task(task)


def test_data_files_that_no_file_can_be_called_are_one_line(task: Path) -> None:
    task.write_text(f"task: a\ndataset_path: json\ndataset_kwargs: {{data_files: {'a' * 300}}}\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="there is no data file"):
        read_task(task).check(trusted=False)
    assert list(read_task(task).identity()) == [task.name]
