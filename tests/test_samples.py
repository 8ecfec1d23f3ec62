"""Continuations to read side by side: which prompts, what is written after them, and where files part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation import stage as scores
from quantkit.evaluation.answers import Question
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.samples import Prompts, sample_prompts, samples
from quantkit.evaluation.stage import evaluation_identity
from quantkit.evaluation.texts import Tokens, Windows, cut
from quantkit.pipeline import run
from quantkit.recipe import EvaluationSpec, SampleSpec
from quantkit.records import Message, Record
from quantkit.runtimes._packed import load_packed
from quantkit.runtimes.base import LoadedModel, LoadOptions
from tests.runs import Notebook, make_recipe, score_here
from tests.tiny import tiny_tokenizer

LONG = 512
END = 1


def windows(count: int = 12, name: str = "prose") -> Windows:
    return cut(Tokens(name, [5 + index % 40 for index in range(count * 32)], None), 32, count * 32)


def prompts_of(spec: SampleSpec, longest: int = LONG, **found: Any) -> Prompts:
    given: dict[str, Any] = {"questions": (), "conversations": {}, "windows": {"prose": windows()}}
    return sample_prompts(spec, tiny_tokenizer(), longest, **(given | found))


def conversation(text: str) -> Record:
    return Record(messages=(Message("user", text), Message("assistant", "yes")))


class Counting(LoadedModel):
    """After token ``t`` comes ``t + 1``, but for what ``odd`` says; reads are counted."""

    vocabulary, dtype, device = 400, "float32", "cpu"

    def __init__(self, odd: dict[int, int] | None = None) -> None:
        self.odd = odd or {}
        self.reads = 0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        after = torch.tensor([self.odd.get(int(token), int(token) + 1) for token in ids])
        return torch.nn.functional.one_hot(after, self.vocabulary).float()

    def prefill(self, ids: torch.Tensor) -> None:
        raise NotImplementedError

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        raise NotImplementedError

    def weights_bytes(self) -> int:
        raise NotImplementedError


def written(model: LoadedModel, beside: Any = None, new_tokens: int = 6, ends: Sequence[int] = (END,)) -> Any:
    prompts = Prompts("recipe", ["first", "second"], [[8, 9, 10], [20]], new_tokens)
    return samples(model, tiny_tokenizer(), prompts, ends, beside, lambda done, total: None)["items"]


# Which prompts


def test_prompts_of_the_recipe_are_turns_of_a_user(tmp_path: Path) -> None:
    found = prompts_of(SampleSpec(prompts=("Who are you?", "¿Quién eres?")))
    assert (found.origin, found.texts) == ("evaluation.samples", ["Who are you?", "¿Quién eres?"])
    template = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert found.ids[0] == tiny_tokenizer()(template).input_ids
    bare = tiny_tokenizer()
    bare.chat_template = None
    plain = sample_prompts(SampleSpec(prompts=("Once",)), bare, LONG, questions=(), conversations={}, windows={})
    assert plain.ids == [bare("Once").input_ids]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "One?\n\n  Two?\n"),
        ("p.jsonl", '{"prompt": "One?"}\n{"messages": [{"role": "user", "content": "Two?"}]}'),
        ("p.jsonl", '{"instruction": "One?", "output": "1"}\n{"instruction": "Two?", "output": "2"}'),
        ("p.json", '["One?", "Two?"]'),
    ],
)
def test_a_file_holds_prompts_in_any_form(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    found = prompts_of(SampleSpec(file=str(file)))
    assert (found.origin, found.texts) == (name, ["One?", "Two?"])
    assert found.ids == prompts_of(SampleSpec(prompts=("One?", "Two?"))).ids


def test_without_prompts_five_of_the_evaluations_records_are_asked() -> None:
    lengths = (300, 200, 9, 9, 9, 9)
    questions = [Question(str(n), f"q{n}", "a", [7] * length) for n, length in enumerate(lengths)]
    asked = prompts_of(SampleSpec(), questions=questions, conversations={"chat": [conversation("c")]})
    assert (asked.origin, asked.texts) == (
        "evaluation.answers",
        ["q2", "q3", "q4", "q5", "q1"],
    )  # short ones first, none too long
    talk = {"prose": (), "chat": [conversation("x" * 400), *(conversation(f"c{n}") for n in range(9))]}
    assert prompts_of(SampleSpec(), conversations=talk).texts == ["c0", "c1", "c2", "c3", "c4"]
    plain = prompts_of(SampleSpec(count=3))
    assert plain.origin == "prose"
    assert plain.ids == [windows().ids[place, :24].tolist() for place in (0, 4, 8)]


def test_what_is_too_long_is_told_for_a_given_prompt() -> None:
    with pytest.raises(EvaluationError, match=r"prompt 2 has \d+ tokens, and the model reads 52 before"):
        prompts_of(SampleSpec(prompts=("a", "b" * 90)), longest=64)


def test_short_forms_of_the_key() -> None:
    def given(samples: Any) -> SampleSpec | None:
        return EvaluationSpec(samples=samples).samples

    assert given(False) is given(0) is None
    assert given(True) == EvaluationSpec().samples == SampleSpec()
    assert given(["a", "b"]) == SampleSpec(prompts=("a", "b"))
    assert given("p.jsonl") == SampleSpec(file="p.jsonl")
    assert given(3) == SampleSpec(count=3)
    with pytest.raises(ValueError, match="at most one of 'prompts' and 'file'"):
        given({"prompts": ["a"], "file": "b.txt"})


# What is written


def test_the_float_model_writes_and_a_file_parts_where_it_parts() -> None:
    float_model = written(Counting())
    assert [each["token_ids"] for each in float_model] == [[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]]
    assert {each["parts_at"] for each in float_model} == {None}
    same = Counting()
    assert [each["parts_at"] for each in written(same, float_model)] == [None, None]
    assert same.reads == 2  # one read a prompt: nothing had to be written anew
    found = written(Counting({13: 40}), float_model)
    assert found[0]["token_ids"] == [11, 12, 13, 40, 41, 42]
    assert [each["parts_at"] for each in found] == [3, None]
    tokenizer = tiny_tokenizer()
    assert found[0]["pieces"] == [tokenizer.decode(ids) for ids in ([11, 12, 13], [40], [41, 42])]


def test_an_end_is_a_place_where_texts_part() -> None:
    float_model = written(Counting({13: END}))
    assert (float_model[0]["token_ids"], float_model[0]["end"]) == ([11, 12, 13], END)
    assert written(Counting({13: END}), float_model)[0]["parts_at"] is None
    longer = written(Counting(), float_model)[0]
    assert (longer["parts_at"], longer["end"], len(longer["token_ids"])) == (3, None, 6)
    shorter = written(Counting({13: END}), written(Counting()))[0]
    assert (shorter["parts_at"], shorter["end"], shorter["pieces"][1:]) == (3, END, ["", ""])


def test_a_character_of_several_tokens_is_not_cut() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("né!").input_ids
    assert len(ids) == 4  # é is two bytes, and each is a token
    model = Counting(dict(zip([9, *ids[:-1]], ids, strict=True)))
    prompts = Prompts("recipe", ["x"], [[9]], 4)
    float_model = samples(model, tokenizer, prompts, (), None, lambda done, total: None)["items"]
    beside = [{**float_model[0], "token_ids": [*ids[:2], ids[2] + 1, ids[3]]}]
    (found,) = samples(model, tokenizer, prompts, (), beside, lambda done, total: None)["items"]
    assert (found["parts_at"], found["pieces"]) == (2, ["n", "é", "!"])


def test_other_prompts_than_the_float_models_are_refused() -> None:
    with pytest.raises(EvaluationError, match="other prompts"):
        written(Counting(), [{**each, "prompt": "another"} for each in written(Counting())])


# In a run


def test_a_run_has_samples_of_the_float_model_and_of_each_file_as_exported(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    asked = tmp_path / "prompts.txt"
    asked.write_text("Say one.\nSay two.\n", encoding="utf-8")
    variants = [{"name": "two", "bits": 2, "method": "rtn"}, {"name": "eight", "bits": 8, "method": "rtn"}]
    recipe = make_recipe(model, records, tmp_path / "out", variants)
    sampled = recipe.evaluation.model_copy(update={"samples": SampleSpec(file=str(asked), max_new_tokens=5)})
    recipe = recipe.model_copy(update={"evaluation": sampled})
    report = run(recipe, Notebook())
    assert [each["prompt"] for each in report["baseline"]["samples"]["items"]] == ["Say one.", "Say two."]
    for variant in report["variants"]:
        loaded = load_packed(Path(variant["checkpoint"]), LoadOptions())
        for found, other in zip(variant["samples"]["items"], report["baseline"]["samples"]["items"], strict=True):
            ids = prompts_of(SampleSpec(prompts=(found["prompt"],))).ids[0]
            greedy = loaded.greedy(torch.tensor(ids))
            expected = [next(greedy) for _ in range(len(found["token_ids"]))]
            assert found["token_ids"] == expected
            parts = found["parts_at"]
            assert found["token_ids"][:parts] == other["token_ids"][:parts]
            assert "".join(found["pieces"]) == tiny_tokenizer().decode(found["token_ids"])
    again = Notebook()
    run(recipe, again)
    assert len([note for note in again.notes if "reused the finished evaluation" in note]) == 3
    before = evaluation_identity(sampled)
    asked.write_text("Say one.\nSay three.\n", encoding="utf-8")
    assert evaluation_identity(sampled) != before  # so that it is scored anew
    off = sampled.model_copy(update={"samples": None})
    assert "samples" not in evaluate(EvaluationJob(model, off, tmp_path / "x", writes_reference=True), lambda *a: None)
