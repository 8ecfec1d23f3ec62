"""Chat records as people have them: whatever a column, a role or a turn is called, its conversation is read."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from quantkit import records
from quantkit.errors import CalibrationError, RecipeError
from quantkit.recipe import CalibrationSpec
from quantkit.recipe.evaluation import AnswerSpec, TextSpec
from quantkit.records import Call, Message, Record
from quantkit.records.dataset import collect
from quantkit.records.formats import parse
from quantkit.records.record import UnusableError
from quantkit.system.validation import parse_section

Q, A, S = Message("user", "Q"), Message("assistant", "A"), Message("system", "S")
ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TURNS = [ASKED, ANSWERED]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALLED = Message("assistant", "", calls=(Call("look", '{"x": 1}', "c1"),))
RETURNED = Message("tool", "42", call_id="c1")


def asked(row: Any, **options: Any) -> tuple[Message, ...]:
    return parse(row, **options).messages


@pytest.mark.parametrize("nothing", [None, "", []])
@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL])])
def test_calls_of_tools_stand_beside_no_content(nothing: Any, calls: Any) -> None:
    called = {"role": "assistant", "content": nothing, "tool_calls": calls}
    turns = [ASKED, called, {"role": "tool", "tool_call_id": "c1", "content": "42"}, ANSWERED]
    record = parse({"messages": turns, "tools": [TOOL]})
    assert record.messages == (Q, CALLED, RETURNED, A)
    assert [json.loads(tool) for tool in record.tools] == [TOOL]


def test_other_ways_to_call_a_tool_are_the_same_calls() -> None:
    """OpenAI's functions, ShareGPT's, and Anthropic's parts."""
    bare = Message("assistant", "", calls=(Call("look", '{"x": 1}'),))
    openai = [
        ASKED,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": {"x": 1}}},
        {"role": "function", "name": "look", "content": {"r": 42}},
        {**ANSWERED, "weight": 1},
    ]
    assert asked({"messages": openai}) == (Q, bare, Message("tool", '{"r": 42}', name="look"), A)
    sharegpt = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "A"},
    ]
    record = parse({"conversations": sharegpt, "tools": '[{"name": "look", "parameters": {}}]', "system": "S"})
    assert record.messages == (S, Q, bare, Message("tool", "42"), A)
    assert [json.loads(tool) for tool in record.tools] == [TOOL]
    anthropic = [
        ASKED,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"text": "42"}]}]},
        ANSWERED,
    ]
    assert asked({"messages": anthropic}) == (Q, CALLED, RETURNED, A)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(TURNS)},
        {"Messages": TURNS, "prompt": "Q", "prompt_id": "7"},
        {"messages": [TURNS]},
        {"messages": [ASKED, {"role": "robot", "content": "A"}]},
        {"messages": [{"role": "human", "content": "Q"}, {"role": "model", "content": "A"}]},
        {"messages": [{"role": "User", "content": "Q"}, {"role": "ChatGPT", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt-4", "value": "A"}]},
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "bot", "value": "A"}]},
        {"conversation": [{"human": "Q", "assistant": "A"}]},
        {"conversation": [{"input": "Q", "output": "A"}]},
        {"dialogue": [{"speaker": "Ann", "text": "Q"}, {"speaker": "Ben", "text": "A"}]},
        {"dialog": ["Q", "A"]},
        {"chat": "USER: Q\n\nASSISTANT: A"},
        {"contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
        {"anything": [{"type": "human", "content": "Q"}, {"type": "ai", "content": "A"}]},
        {"custom_id": "1", "body": {"model": "m", "messages": TURNS}},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"question": "Q", "answer": "A"},
        {"query": "Q", "response": "A"},
        {"INSTRUCTION": "Q", "RESPONSE": "A", "SOURCE": "x"},
        {"problem": "Q", "solution": "A", "answer": "4"},
        {"question": "Q", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}},
        {"instruction": "Q", "completions": [{"response": "A", "score": 2}, {"response": "B", "score": 1}]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": TURNS, "rejected": TURNS},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "A", "rejected": "B"},
        {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": [ANSWERED]},
        {"prompt": "Q", "completion": "A", "label": True},
    ],
)  # fmt: skip
def test_one_question_with_its_answer(row: dict[str, Any]) -> None:
    assert asked(row) == (Q, A)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "context": "C", "response": "A"}, (Message("user", "Q\nC"), A)),
        ({"question": "Q", "answer": 4}, (Q, Message("assistant", "4"))),
        ({"prompt": "Q"}, (Q,)),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]], "system": "S"}, (S, Q, A, Q, A)),
        ({"instruction": "Q", "output": "A", "history": TURNS}, (Q, A, Q, A)),
        ({"contents": TURNS, "systemInstruction": {"parts": [{"text": "S"}]}}, (S, Q, A)),
        ({"Question": "Q", "Complex_CoT": "T", "Response": "A"}, (Q, Message("assistant", "A", reasoning="T"))),
        (
            {"messages": [ASKED, {**ANSWERED, "reasoning_content": "T"}]},
            (Q, Message("assistant", "A", reasoning="T")),
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "thinking", "thinking": "T"}, "A"]}]},
            (Q, Message("assistant", "A", reasoning="T")),
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": "", "thinking": "T"}]},
         (Q, Message("assistant", "", reasoning="T"))),
    ],
)  # fmt: skip
def test_what_stands_beside_a_question(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert asked(row) == messages


@pytest.mark.parametrize("nothing", ["", None, " \n"])
def test_an_empty_turn_at_the_end_is_left_out_and_told(nothing: Any) -> None:
    record = parse({"messages": [*TURNS, {"role": "user", "content": nothing}]})
    assert record.messages == (Q, A)
    assert record.changes == ("an empty turn at its end left out",)
    with pytest.raises(UnusableError, match="has an empty message"):
        parse({"messages": [{"role": "user", "content": nothing}, ANSWERED]})


def test_parts_that_are_no_text_are_left_out_and_told() -> None:
    parts = [{"type": "input_text", "text": "Q"}, {"type": "input_audio", "input_audio": {"data": "x"}}]
    record = parse({"messages": [{"role": "user", "content": parts}, ANSWERED]})
    assert record.messages == (Q, A)
    assert record.changes == ("a part of type 'input_audio' left out",)


def test_text_is_text_whatever_stands_beside_it() -> None:
    for row in ({"content": "x"}, {"user": "ann", "text": "x"}, {"text": "x", "label": False}, {"Text": "x", "id": 1}):
        assert parse(row) == Record(text="x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": "A", "label": False}, "marked as not wanted ('label' is false)"),
        ({"q": "Q", "a": "A"}, "no known format (keys: q, a)"),
        ({"response": "A"}, "'response' has no question beside it (keys: response)"),
        ({"chosen": "A", "rejected": "B"}, "'chosen' has no question beside it"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}]}, "a tool without a name"),
    ],
)
def test_what_cannot_be_read_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        parse(row)
    assert reason in caught.value.reason


def test_a_recipe_says_what_columns_and_roles_are() -> None:
    assert asked({"q": "Q", "a": "A", "system": "S"}, columns={"prompt": "q", "response": "a"}) == (S, Q, A)
    assert asked({"messages": TURNS, "q": "Q", "a": "A"}, columns={"question": "q", "answer": "a"}) == (Q, A)
    turns = [{"who": "7", "what": "Q"}, {"who": "8", "what": "A"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "7", "assistant_tag": "8"}
    assert asked({"log": turns}, columns={"messages": "log"}, tags=tags) == (Q, A)
    with pytest.raises(UnusableError, match=r"has no 'a' \(keys: q\)"):
        parse({"q": "Q"}, columns={"prompt": "q", "response": "a"})


def test_the_key_columns_calibrates_and_scores(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "Q", "a": "A"}\n')
    spec = parse_section(CalibrationSpec, {"dataset": str(file), "columns": {"prompt": "q", "response": "a"}}, "x")
    assert records.load(spec.dataset, spec.columns, spec.tags).records == [Record(messages=(Q, A))]
    with pytest.raises(CalibrationError, match="none of its 1 records can be used"):
        records.load(spec.dataset)
    given = {"file": str(file), "columns": {"prompt": "q", "response": "a"}}
    sections: list[AnswerSpec | TextSpec] = [
        parse_section(AnswerSpec, given, "x"),
        parse_section(TextSpec, {"name": "x", **given}, "x"),
    ]
    for found in sections:
        read = records.read_reference(str(found.file), found.columns, found.tags)
        assert read.records == [Record(messages=(Q, A))]


def test_an_entry_of_dataset_info_stands_for_a_data_set() -> None:
    entry = {
        "file_name": "a.json",
        "formatting": "sharegpt",
        "columns": {"messages": "log"},
        "tags": {"role_tag": "by"},
    }
    spec = parse_section(CalibrationSpec, {"dataset": entry}, "calibration")
    assert (spec.dataset, spec.columns, spec.tags) == ("a.json", {"messages": "log"}, {"role_tag": "by"})
    assert parse_section(CalibrationSpec, {"dataset": {"hf_hub_url": "org/name"}}, "x").dataset == "hub:org/name"
    assert parse_section(AnswerSpec, {"file": {"hf_hub_url": "org/name"}}, "x").dataset == "org/name"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"promt": "q"}}, r"calibration: columns: unknown column name 'promt' \(did you mean 'prompt'"),
        ({"columns": {"prompt": "q", "question": "r"}}, "column name 'prompt' is given twice"),
        ({"tags": {"user": "u"}}, r"calibration: tags: unknown tag 'user' \(did you mean 'user_tag'"),
        ({"dataset": {"file_name": "a", "num_samples": 3}}, "dataset.num_samples is not read in a recipe"),
        ({"dataset": {"columns": {}}}, "lies neither in a file nor on the hub"),
    ],
)
def test_mistakes_in_columns_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_section(CalibrationSpec, keys, "calibration")


LINE = json.dumps({"prompt": "Q", "completion": "A"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", f"{LINE}\n{LINE}\n".encode()),
        ("a.json", json.dumps({"version": 1, "rows": [{"row": json.loads(LINE)}, {"row": json.loads(LINE)}]}).encode()),
        ("a.json", json.dumps({"prompt": ["Q", "Q"], "completion": ["A", "A"]}).encode()),
        ("a.json", json.dumps({"prompt": {"0": "Q", "1": "Q"}, "completion": {"0": "A", "1": "A"}}).encode()),
        ("a.jsonl", f"[{LINE}, {LINE}]".encode()),
        ("a.jsonl", "\n".join(json.dumps(json.loads(LINE), indent=1) for _ in range(2)).encode()),
        ("a.jsonl", f"\ufeff{LINE}\r\n\r\n{LINE}".encode()),
        ("a.jsonl", f"{LINE}\n{LINE}".encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(f"{LINE}\n{LINE}\n".encode(), mtime=0)),
        ("a.csv", b"\xef\xbb\xbfprompt,completion\nQ,A\n\nQ,A\n"),
        ("a.csv", b"prompt;completion\nQ;A\nQ;A\n"),
        ("a.tsv", b"prompt\tcompletion\nQ\tA\nQ\tA\n"),
    ],
    ids=itertools.count(),
)
def test_files_hold_rows_in_many_ways(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = records.read_file(tmp_path / name)
    assert found.records == [Record(messages=(Q, A))] * 2
    assert found.name == "a"


@pytest.mark.parametrize("content", [{"messages": TURNS}, TURNS, [TURNS]])
def test_a_file_may_hold_one_conversation(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert records.read_file(tmp_path / "a.json").records == [Record(messages=(Q, A))]


def test_a_list_of_texts_is_texts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["One.", "Two."]))
    assert records.read_file(tmp_path / "a.json").records == [Record(text="One."), Record(text="Two.")]


def test_a_broken_line_loses_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{LINE}\n{{"prompt": \n{LINE}\n')
    found = records.read_file(tmp_path / "a.jsonl")
    assert len(found.records) == 2
    assert [(row.index, row.reason) for row in found.skipped] == [(1, "not valid JSON")]


def test_what_no_text_can_hold_loses_its_record_alone(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(600):
        deep = {"content": [{"type": "tool_result", "content": deep}]}
    broken = {"name": "look", "arguments": {"x": "\ud800"}}
    rows = [
        {"messages": [{"role": "user", "content": deep}]},
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": broken}]}]},
        {"messages": TURNS, "tools": [{"name": "\ud800"}]},
        {"messages": TURNS},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    found = records.read_file(tmp_path / "a.jsonl")
    assert [row.reason for row in found.skipped] == [
        "'tool_calls' holds text that is not valid Unicode",
        "'tools' holds text that is not valid Unicode",
    ]
    kept, skipped = collect("rows", rows[::3])
    assert len(kept) == 1
    assert [row.reason for row in skipped] == ["nested too deeply"]


def test_a_list_of_data_sets_is_none(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"lists data sets and is none \(write llamafactory:.*/NAME"):
        records.load(str(tmp_path / "dataset_info.json"))


def called_and_returned(call_id: str = "") -> tuple[Message, ...]:
    return (
        Q,
        Message("assistant", "", calls=(Call("look", '{"x": 1}', call_id),)),
        Message("tool", "42", "", (), "", call_id),
        A,
    )


@pytest.mark.parametrize(
    ("turns", "call_id"),
    [
        (
            [
                {"role": "user", "content": [{"text": "Q"}]},
                {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c", "name": "look", "input": {"x": 1}}}]},
                {"role": "user", "content": [{"toolResult": {"toolUseId": "c", "content": [{"text": "42"}]}}]},
                {"role": "assistant", "content": [{"text": "A"}]},
            ],
            "c",
        ),
        (
            [
                {"role": "user", "parts": [{"text": "Q"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "look", "args": {"x": 1}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": "42"}}]},
                {"role": "model", "parts": [{"text": "A"}]},
            ],
            "",
        ),
        (
            [
                ASKED,
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"x": 1}'},
                {"type": "function_call_output", "call_id": "c", "output": "42"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
            ],
            "c",
        ),
    ],
)
def test_calls_are_read_as_each_server_writes_them(turns: list[Any], call_id: str) -> None:
    """Bedrock's parts, Gemini's, and OpenAI's items."""
    read = asked({"messages": turns})
    assert [(each.role, each.content, each.call_id) for each in read] == [
        (each.role, each.content, each.call_id) for each in called_and_returned(call_id)
    ]
    assert [(call.name, call.arguments) for call in read[1].calls] == [("look", '{"x": 1}')]


@pytest.mark.parametrize(
    "thinks",
    [
        [{"role": "assistant", "channel": "analysis", "content": "T"}, {**ANSWERED, "channel": "final"}],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "T"}]}, ANSWERED],
        [{"role": "assistant", "content": [{"type": "thinking", "thinking": [{"text": "T"}]}, {"text": "A"}]}],
        [{**ANSWERED, "reasoning_details": [{"type": "reasoning.text", "text": "T"}]}],
        [{"role": "assistant", "content": [{"reasoningContent": {"text": "T"}}, {"text": "A"}]}],
    ],
)
def test_what_was_thought_is_the_reasoning_of_what_is_said_next(thinks: list[Any]) -> None:
    assert asked({"messages": [ASKED, *thinks]}) == (Q, Message("assistant", "A", reasoning="T"))
    if len(thinks) == 2:
        assert asked({"messages": [ASKED, thinks[0]]}) == (Q, Message("assistant", "", reasoning="T"))
        assert asked({"messages": [ASKED, thinks[0], ASKED, ANSWERED]})[1].reasoning == "T"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ("[1, 2]", "[1, 2]"),
        ({"a": "é"}, '{"a": "é"}'),
        ([{"a": 1}, {"a": 2}], '[{"a": 1}, {"a": 2}]'),
        (["A", "B"], "A"),
        ({"choices": [{"message": ANSWERED}]}, "A"),
        ({"content": "A", "score": 1}, "A"),
        (json.dumps([ANSWERED]), "A"),
    ],
)
def test_an_answer_that_is_json_stays_it(answer: Any, said: str) -> None:
    assert asked({"instruction": "Q", "output": answer}) == (Q, Message("assistant", said))


def test_a_question_that_is_json_stays_it_and_what_is_beside_it_is_asked_too() -> None:
    assert asked({"prompt": '{"a": 1}', "completion": "A"})[0].content == '{"a": 1}'
    assert asked({"prompt": json.dumps([ASKED]), "completion": "A"}) == (Q, A)
    assert asked({"instruction": "Q", "input": {"a": 1}, "output": "A"})[0].content == 'Q\n{"a": 1}'
    assert asked({"instruction": "Q", "input": ["b", "c"], "output": "A"})[0].content == "Q\nb\nc"


def test_calls_that_are_the_answer_are_calls() -> None:
    row = {"query": "Q", "tools": json.dumps([TOOL]), "answers": '[{"name": "look", "arguments": {"x": 1}}]'}
    assert asked(row) == (Q, Message("assistant", "", calls=(Call("look", '{"x": 1}'),)))


def test_threads_lists_and_further_names_are_read() -> None:
    """OpenAssistant's trees, UltraChat's lists of texts, Cohere's requests, and marks of a table."""
    best = {"role": "assistant", "text": "A", "replies": []}
    tree = {"role": "prompter", "text": "Q", "replies": [best, {"role": "assistant", "text": "worse", "replies": []}]}
    assert asked({"message_tree_id": "1", "prompt": tree}) == (Q, A)
    assert asked({"id": "1", "data": ["Q", "A"]}) == (Q, A)
    before = [{"role": "USER", "message": "q"}, {"role": "CHATBOT", "message": "a"}]
    assert [each.content for each in asked({"message": "Q", "chat_history": before, "response": "A"})] == [
        "q",
        "a",
        "Q",
        "A",
    ]
    assert asked({"prompt": "Q", "full_chosen": "A", "full_rejected": "B"}) == (Q, A)
    with pytest.raises(UnusableError, match="not wanted"):
        parse({"prompt": "Q", "completion": "A", "label": "False"})


def saved(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A split as ``datasets`` saves it, in a shard a row."""
    import pyarrow

    folder.mkdir(parents=True)
    names = [f"data-{place:05d}-of-{len(rows):05d}.arrow" for place in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        table = pyarrow.Table.from_pylist([row])
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def texts_of(folder: Path) -> list[str | None]:
    found = records.load(str(folder))
    assert records.identify(str(folder)) == found.origin
    return [record.text for record in found.records]


def test_a_folder_that_datasets_saved_is_a_data_set(tmp_path: Path) -> None:
    saved(tmp_path / "both" / "train", [{"text": "a"}, {"text": "b"}])
    saved(tmp_path / "both" / "test", [{"text": "c"}])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    before = records.identify(str(tmp_path / "both"))["sha256"]
    assert texts_of(tmp_path / "both" / "test") == ["c"]
    assert texts_of(tmp_path / "both") == ["a", "b"]
    shard = tmp_path / "both" / "train" / "data-00000-of-00002.arrow"
    assert texts_of(shard) == ["a"]
    (tmp_path / "both" / "train" / "data-00001-of-00002.arrow").write_bytes(shard.read_bytes())
    assert texts_of(tmp_path / "both") == ["a", "a"]
    assert records.identify(str(tmp_path / "both"))["sha256"] != before
    shard.write_bytes(b"no table")
    with pytest.raises(CalibrationError, match="not a readable Arrow file"):
        records.load(str(tmp_path / "both"))


def test_a_folder_of_parts_is_a_data_set_and_one_of_several_is_refused(tmp_path: Path) -> None:
    parts = tmp_path / "cloned" / "data"
    parts.mkdir(parents=True)
    for place in (1, 0):
        (parts / f"train-0000{place}-of-00002.jsonl").write_text(json.dumps({"text": f"part {place}"}))
    (parts / "test-00000-of-00001.jsonl").write_text('{"text": "other"}')
    (tmp_path / "cloned" / "README.md").write_text("about")
    assert texts_of(tmp_path / "cloned") == ["part 0", "part 1"]
    (parts / "training.jsonl").write_text("{}")
    assert texts_of(tmp_path / "cloned" / "data") == ["part 0", "part 1"]
    for name in ("alpaca.json", "chats.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CalibrationError, match=r"several data sets: alpaca\.json, chats\.json \(give a file"):
        records.load(str(tmp_path))
