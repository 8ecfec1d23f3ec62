"""Records: every format is read, nothing is lost silently, templates are applied and confined."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from quantkit import records
from quantkit.errors import CalibrationError
from quantkit.records import Message, Record, Skipped
from tests.tiny import tiny_tokenizer

QUESTION, ANSWER = Message("user", "What is it?"), Message("assistant", "A test.")
TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]
SHAREGPT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A test."}]
ALPACA = {"instruction": "What is it?", "input": "", "output": "A test."}
SPECIAL_IDS = {"<s>": 1, "<|im_start|>": 3, "<|im_end|>": 4}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path: Path, row: Any, **options: Any) -> Record:
    """The record of a file that holds one row."""
    found = records.read_file(write_rows(path / "one.jsonl", [row]), **options)
    assert len(found.records) == 1
    assert not found.skipped
    return found.records[0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ALPACA, (QUESTION, ANSWER)),
        ({**ALPACA, "input": "This."}, (Message("user", "What is it?\nThis."), ANSWER)),
        ({**ALPACA, "system": "Be brief."}, (Message("system", "Be brief."), QUESTION, ANSWER)),
        ({**ALPACA, "system": "", "history": None}, (QUESTION, ANSWER)),
        (
            {**ALPACA, "history": [["Hi", "Hello"]]},
            (Message("user", "Hi"), Message("assistant", "Hello"), QUESTION, ANSWER),
        ),
        ({"messages": TURNS}, (QUESTION, ANSWER)),
        ({"messages": TURNS, "text": "ignored", "prompt": "ignored"}, (QUESTION, ANSWER)),
        ({"conversations": SHAREGPT}, (QUESTION, ANSWER)),
        ({"conversations": SHAREGPT, "system": "Be brief."}, (Message("system", "Be brief."), QUESTION, ANSWER)),
        ({"messages": [{"role": "system", "content": " "}, *TURNS]}, (QUESTION, ANSWER)),
        (
            {
                "conversations": [
                    {"from": "human", "value": "What is it?"},
                    {"from": "function_call", "value": "look()"},
                    {"from": "observation", "value": "a test"},
                    {"from": "gpt", "value": "A test."},
                ]
            },
            (QUESTION, Message("assistant", "look()"), Message("tool", "a test"), ANSWER),
        ),
    ],
)
def test_conversations_are_recognized(tmp_path: Path, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert only(tmp_path, row) == Record(messages=messages)


def test_plain_text_is_recognized(tmp_path: Path) -> None:
    assert only(tmp_path, {"text": "A line.\nAnother.", "messages": None}) == Record(text="A line.\nAnother.")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"q": "What is it?", "a": "A test."}, {"prompt": "q", "response": "a"}, Record(messages=(QUESTION, ANSWER))),
        ({"chat": SHAREGPT}, {"messages": "chat"}, Record(messages=(QUESTION, ANSWER))),
        ({"body": "A line.", "messages": TURNS}, {"text": "body"}, Record(text="A line.")),
    ],
)
def test_columns_are_renamed_first(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], expected: Record
) -> None:
    assert only(tmp_path, row, columns=columns) == expected


def test_unknown_column_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"unknown column name 'promt' \(did you mean 'prompt'"):
        records.read_file(write_rows(tmp_path / "a.jsonl", [ALPACA]), columns={"promt": "q"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"title": "x", "body": "y"}, "no known format (keys: title, body)"),
        ({}, "no known format (keys: none)"),
        ([1], "not an object but a list"),
        ({**ALPACA, "output": ""}, "'output' is empty"),
        ({**ALPACA, "instruction": 3}, "'instruction' holds a number where text should be"),
        ({**ALPACA, "history": [["one"]]}, "'history' is not a list of pairs"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "\ud800"}, "'text' holds text that is not valid Unicode"),
        ({"messages": []}, "'messages' holds no message"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "'messages' holds no message"),
        ({"messages": "hello"}, "'messages' is not a list but a string"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'messages' holds a message of unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages' is empty or has an empty message"),
        ({"messages": [{"role": "user", "content": ""}]}, "'messages' is empty or has an empty message"),
        ({"conversations": [{"from": "x", "value": "x"}]}, "'conversations' holds a message of unknown role 'x'"),
        (
            {"conversations": [{"text": "x"}]},
            "'conversations' holds a message with neither role and content nor from and value (keys: text)",
        ),
    ],
)
def test_unusable_rows_are_skipped_with_the_reason(tmp_path: Path, row: Any, reason: str) -> None:
    found = records.read_file(write_rows(tmp_path / "a.jsonl", [ALPACA, row, ALPACA]))
    assert found.skipped == [Skipped(1, reason)]
    assert len(found.records) == 2
    assert found.indices() == [0, 2]
    assert found.read == 3


def test_a_set_without_a_usable_record_names_reasons_and_keys(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"title": "x"}, {"title": "y"}, {"text": ""}])
    with pytest.raises(CalibrationError) as caught:
        records.read_file(path)
    assert "2 x no known format (keys: title), first in record 0" in caught.value.problem
    assert "1 x 'text' is empty, first in record 2 (keys: text)" in caught.value.problem
    assert "'columns: {prompt: COLUMN, response: COLUMN}'" in caught.value.remedy
    with pytest.raises(CalibrationError, match="holds no records"):
        records.read_file(write_rows(tmp_path / "b.jsonl", []))


def as_list(path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps([ALPACA, {"text": "A line."}]))
    return path.with_suffix(".json")


def as_data_object(path: Path) -> Path:
    path.with_suffix(".json").write_text(
        "\ufeff" + json.dumps({"data": [ALPACA, {"text": "A line."}]}), encoding="utf-8"
    )
    return path.with_suffix(".json")


def as_lines(path: Path) -> Path:
    text = json.dumps(ALPACA) + "\r\n\n" + json.dumps({"text": "A line."})
    path.with_suffix(".jsonl").write_bytes(text.encode())
    return path.with_suffix(".jsonl")


def as_parquet(path: Path) -> Path:
    rows = datasets.Dataset.from_list([{**ALPACA, "text": None}, {**dict.fromkeys(ALPACA), "text": "A line."}])
    rows.to_parquet(str(path.with_suffix(".parquet")))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("write", [as_list, as_data_object, as_lines, as_parquet])
def test_each_file_type_gives_the_same_records(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "mixed")
    found = records.load(str(path))
    assert found.records == [Record(messages=(QUESTION, ANSWER)), Record(text="A line.")]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.sha256 == sha256
    assert found.origin == {"kind": "file", "file": path.name, "sha256": sha256}
    assert found.origin == records.identify(str(path))


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First.\n\nSecond.\n")
    assert records.read_file(tmp_path / "a.txt").records == [Record(text="First.\n\nSecond.\n")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'\n\n{"text": \n', "not valid JSON at line 3, column"),
        ("a.json", b'[\n{"text": "x"},\n{"text" "y"}\n]', "not valid JSON at line 3, column"),
        ("a.json", b'{"rows": []}', "an object with the keys rows"),
        ("a.json", b"[" * 100_000, "cannot be read as JSON|not valid JSON"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8 text: byte 2"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.xls", b"text\nx", "suffix '.xls'"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        records.read_file(tmp_path / name)
    assert name in caught.value.problem


def test_references_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="did you mean 'alpaca_gpt4'"):
        records.load("alpaca-gpt4")
    with pytest.raises(CalibrationError, match="did you mean 'wikitext'"):
        records.read_named("wikitxt")
    with pytest.raises(CalibrationError, match="No such file"):
        records.load(str(tmp_path / "absent.jsonl"))
    with pytest.raises(CalibrationError, match="is a folder"):
        records.identify(str(tmp_path))
    with pytest.raises(CalibrationError, match="'nonsense' is not a hub id"):
        records.load("hub:nonsense")


def test_registry_is_whole() -> None:
    assert records.dataset_names() == ["alpaca_gpt4", "c4", "instructions_mini", "ultrachat", "wikitext"]
    for name in records.dataset_names():
        entry = records.named_dataset(name)
        assert entry.licence
        assert entry.description


def test_bundled_set_is_read_by_name() -> None:
    found = records.load("instructions_mini")
    assert found.name == "instructions_mini"
    assert found.origin["kind"] == "bundled"
    assert found.origin["licence"] == "Apache-2.0"
    assert found.origin == records.identify("instructions_mini")
    assert not found.skipped


def test_importing_records_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "pyarrow")
    code = f"import sys, quantkit.records; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the data set library reads in place of the hub's ``org/name``."""
    folder = tmp_path / "hub"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": f"Text {number}."} for number in range(6)])
    write_rows(folder / "other.jsonl", [ALPACA])
    real = datasets.load_dataset_builder

    def local(name: str, config: str | None = None, **options: Any) -> Any:
        assert name == "org/name"
        files = options["data_files"] or {"train": "train.jsonl"}
        return real(str(folder), config, data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    return folder


def test_hub_records_come_with_their_origin(hub: Path) -> None:
    found = records.load("hub:org/name")
    assert [record.text for record in found.records] == [f"Text {number}." for number in range(6)]
    assert found.origin == records.identify("hub:org/name")
    assert found.origin["kind"] == "hub"
    assert found.origin["dataset"] == "org/name"
    assert found.origin["revision"]
    lines = b"".join(b'[[],"Text %d."]\n' % number for number in range(6))
    assert found.sha256 == hashlib.sha256(lines).hexdigest()


def test_hub_split_slices_and_data_files(hub: Path) -> None:
    assert len(records.read_hub("org/name", split="train[1:3]").records) == 2
    found = records.read_hub("org/name", split="train[:1]", data_files="other.jsonl", columns={"text": "output"})
    assert found.records == [Record(text="A test.")]
    assert found.origin["data_files"] == "other.jsonl"
    assert found.origin["columns"] == {"text": "output"}


def test_hub_images_are_what_their_files_hold(hub: Path) -> None:
    """They are not opened, which takes Pillow, before anyone wants to see them."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "text": ["What?"]}, features=features)
    rows.to_parquet(str(hub / "seen.parquet"))
    found = records.read_hub("org/name", data_files="seen.parquet")
    assert found.records == [Record(text="<image>\nWhat?", images=(b"x",))]


def test_hub_mistakes_are_one_line(hub: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the hub data set .org/name.: .*validation"):
        records.read_hub("org/name", split="validation")
    with pytest.raises(CalibrationError, match="not at 0000"):
        records.read_hub("org/name", revision="0" * 40)


def test_hub_id_is_not_taken_for_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match="local folder of that name"):
        records.load("hub:org/name")


@pytest.mark.parametrize("reference", ["alpaca_gpt4", "hub:org/name"])
def test_offline_names_what_works_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(CalibrationError, match="cannot read the hub data set") as caught:
        records.load(reference)
    assert "local file" in caught.value.remedy
    assert "dataset: instructions_mini" in caught.value.remedy


CHAT = Record(messages=(QUESTION, ANSWER))
TEMPLATED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA test.<|im_end|>\n"


def test_rendering_follows_the_choice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}")
    assert records.render(CHAT, tokenizer, "auto") == TEMPLATED
    assert records.render(CHAT, tokenizer, "none") == "What is it?\n\nA test."
    assert records.render(CHAT, tokenizer, None) == "What is it?\n\nA test."
    assert records.render(CHAT, tokenizer, str(template)) == "<s>[What is it?][A test.]"
    assert records.render(CHAT, tiny_tokenizer(None), "auto") == "What is it?\n\nA test."
    assert records.render(Record(text="As it is."), tokenizer, str(template)) == "As it is."


def test_a_conversation_that_awaits_an_answer_ends_with_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = Record(messages=(QUESTION,))
    begun = TEMPLATED.partition("A test.")[0]
    assert records.render(asked, tokenizer, awaits_answer=True) == begun
    assert tokenizer.decode(records.encode(asked, tokenizer, awaits_answer=True)) == begun
    assert records.render(asked, tokenizer, "none", awaits_answer=True) == "What is it?\n\n"


def test_templates_are_described(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("x")
    assert records.describe_template("auto", tokenizer) == "model"
    assert records.describe_template("auto", tiny_tokenizer(None)) == "none"
    assert records.describe_template("none", tokenizer) == "none"
    sha256 = hashlib.sha256(b"x").hexdigest()
    assert records.describe_template(str(template), tokenizer) == {"file": "own.jinja", "sha256": sha256}


@pytest.fixture(scope="module")
def starting() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_special_tokens_come_from_template_or_tokenizer_not_both(
    tmp_path: Path, starting: PreTrainedTokenizerFast
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert records.encode(CHAT, starting, str(own)).count(SPECIAL_IDS["<s>"]) == 1
    assert SPECIAL_IDS["<s>"] not in records.encode(CHAT, starting, "auto")
    plain = records.encode(CHAT, starting, "none")
    assert plain[0] == SPECIAL_IDS["<s>"]
    assert starting.decode(plain[1:]) == "What is it?\n\nA test."
    assert records.encode(Record(text="Plain."), starting, "auto")[0] == SPECIAL_IDS["<s>"]


def test_template_tokens_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = records.encode(CHAT, tokenizer)
    assert tokenizer.decode(ids) == TEMPLATED
    assert [ids.count(SPECIAL_IDS[name]) for name in ("<|im_start|>", "<|im_end|>")] == [2, 2]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% for message in messages %}",
        "{{ raise_exception('no system message, please') }}",
        "{{ 'x' + 1 }}",
    ],
)
def test_bad_templates_are_refused_with_the_record(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    with pytest.raises(CalibrationError, match="the chat template fails on record 7: ") as caught:
        records.render(CHAT, tokenizer, str(path), index=7)
    assert "chat_template: none" in caught.value.remedy


def test_missing_template_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the chat template .*absent\.jinja"):
        records.render(CHAT, tokenizer, str(tmp_path / "absent.jinja"))


def test_the_date_in_a_template_is_fixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "dated.jinja"
    path.write_text(
        "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}\n"
        "{%- if strftime_now is defined %}{{ today() }}, {{ strftime_now('%Y-%m-%d') }}{% endif %}"
    )
    assert records.render(CHAT, tokenizer, str(path)) == "26 Jul 2024, 2024-07-26"


def test_a_record_is_a_conversation_or_a_text() -> None:
    with pytest.raises(ValueError, match="either messages or a text"):
        Record()
    with pytest.raises(ValueError, match="either messages or a text"):
        Record(messages=(QUESTION,), text="x")
