"""Chat templates that refuse a record are given it as they take it; what they take in no form is skipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from quantkit import records
from quantkit.calibration import audit_lines, build
from quantkit.errors import CalibrationError
from quantkit.evaluation.answers import load_questions
from quantkit.evaluation.texts import load_text
from quantkit.recipe import CalibrationSpec
from quantkit.recipe.evaluation import AnswerSpec, TextSpec
from quantkit.records import RefusedRecordError, sandbox
from quantkit.records.adapting import AS_TEXT, DEVELOPER, FOLDED, MERGED, NO_START, ONE_CALL
from quantkit.records.formats import parse
from quantkit.records.template_forms import REASONING_LOST, TOOLS_LOST
from tests.tiny import tiny_config, tiny_tokenizer

NO_SYSTEM = """
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '[' + role + ':' + message.content | trim + ']' }}{% endfor %}"""
"""Refuses what Gemma's does."""
NINE_CHARACTERS = """
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and message.tool_calls is not defined) %}
{%- if (message.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}
{%- set ns.turns = ns.turns + 1 %}
{%- endif %}
{%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids of length 9!') }}{% endif %}
{{- '[CALL]' + call.function | tojson + call.id }}{% endfor %}
{%- elif message.role == 'assistant' %}{{ message.content + '</s>' }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids of length 9!') }}{% endif %}
{{- '[RESULT]' + message.content + message.tool_call_id }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
"""Refuses what Mistral's do."""
ONE_AT_A_TIME = """
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once!') }}{% endif %}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson + '}' }}
{%- else %}{{ '<' + message.role + '>' + message.content }}{% endif %}
{%- endfor %}"""
"""Refuses what Llama 3's does."""
NULL_CALLS = """
{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['tool_calls'] %}
{%- for call in message['tool_calls'] %}{% set asked = call['function'] %}
{{- '<call>' + asked['name'] + '\\n' + asked['arguments'] }}{% endfor %}
{%- endif %}
{%- if message['role'] != 'assistant' or message['content'] is not none %}
{{- '<' + message['role'] + '>' + message['content'] }}{% endif %}
{%- endfor %}"""
"""Wants a content of null beside calls, and their arguments as JSON, as DeepSeek's do."""
THINKS = """
{%- for message in messages %}{{ '<' + message.role + '>' }}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}{% endfor %}"""
NOT_BOTH = """
{%- for message in messages %}
{%- if message.content and message.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{{- '<' + message.role + '>' + message.content }}{% endfor %}"""
"""Refuses what gpt-oss' does."""
KNOWS_TAGS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{# <think> #}"
BARE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
NO_DEVELOPER = """
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('Unexpected role') }}{% endif %}
{{- '<' + message.role + '>' + message.content }}{% endfor %}"""

USER, ASSISTANT, SYSTEM = ({"role": role, "content": text} for role, text in
                           (("user", "Ask"), ("assistant", "Tell"), ("system", "Be brief")))  # fmt: skip
ONE, TWO = ({"id": f"c_{name}", "function": {"name": name, "arguments": '{"x": 1}'}} for name in ("look", "find"))
CALLS_ONE = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [ONE]},
    {"role": "tool", "tool_call_id": "c_look", "content": '{"found": "42"}'},
    ASSISTANT,
]
CALLS_TWO = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [ONE, TWO]},
    {"role": "tool", "tool_call_id": "c_find", "content": "2"},
    {"role": "tool", "tool_call_id": "c_look", "content": "1"},
    ASSISTANT,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("template", "turns", "text", "changes"),
    [
        (NO_SYSTEM, [USER, ASSISTANT], "[user:Ask][model:Tell]", ()),
        (NO_SYSTEM, [SYSTEM, USER, ASSISTANT], "[user:Be brief\n\nAsk][model:Tell]", (FOLDED,)),
        (NO_SYSTEM, [{**SYSTEM, "role": "developer"}, USER], "[user:Be brief\n\nAsk]", (FOLDED,)),
        (NO_SYSTEM, [USER, USER, ASSISTANT], "[user:Ask\n\nAsk][model:Tell]", (MERGED,)),
        (NO_SYSTEM, [ASSISTANT, USER, ASSISTANT], "[user:Ask][model:Tell]", (NO_START,)),
        (
            NO_SYSTEM,
            [SYSTEM, ASSISTANT, USER, USER, ASSISTANT, ASSISTANT],
            "[user:Be brief\n\nAsk\n\nAsk][model:Tell\n\nTell]",
            (NO_START, FOLDED, MERGED),
        ),
        (NO_DEVELOPER, [{**SYSTEM, "role": "developer"}, USER], "<system>Be brief<user>Ask", (DEVELOPER,)),
        (
            NINE_CHARACTERS,
            CALLS_ONE,
            '[INST]Ask[/INST][CALL]{"name": "look", "arguments": {"x": 1}}call00000'
            '[RESULT]{"found": "42"}call00000Tell</s>',
            (),
        ),
        (
            ONE_AT_A_TIME,
            CALLS_TWO,
            '<user>Ask{"name": "look", "parameters": {"x": 1}}<tool>1{"name": "find", "parameters": {"x": 1}}<tool>2'
            "<assistant>Tell",
            (ONE_CALL,),
        ),
        (NULL_CALLS, CALLS_ONE, '<user>Ask<call>look\n{"x": 1}<tool>{"found": "42"}<assistant>Tell', ()),
        (
            BARE,
            CALLS_ONE,
            '<user>Ask<assistant>{"name": "look", "arguments": {"x": 1}}<user>{"found": "42"}<assistant>Tell',
            (AS_TEXT,),
        ),
        (
            NO_SYSTEM,
            CALLS_ONE,
            '[user:Ask][model:{"name": "look", "arguments": {"x": 1}}][user:{"found": "42"}][model:Tell]',
            (AS_TEXT,),
        ),
    ],
)
def test_a_conversation_is_given_as_its_template_takes_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, turns: Any, text: str, changes: tuple[str, ...]
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    found = records.rendered(parse({"messages": turns}), tokenizer, str(tmp_path / "own.jinja"))
    assert found.text == text
    assert found.changes == changes


@pytest.mark.parametrize(
    ("template", "text", "changes"),
    [
        (THINKS, "<user>Ask<assistant><think>Hm.</think>Tell", ()),
        (KNOWS_TAGS, "<user>Ask<assistant><think>\nHm.\n</think>\n\nTell", ()),
        (BARE, "<user>Ask<assistant>Tell", (REASONING_LOST,)),
        (NOT_BOTH, "<user>Ask<assistant>Tell", (REASONING_LOST,)),
    ],
)
def test_reasoning_goes_where_the_template_has_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, text: str, changes: tuple[str, ...]
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    record = parse({"messages": [USER, {**ASSISTANT, "reasoning_content": "Hm."}]})
    found = records.rendered(record, tokenizer, str(tmp_path / "own.jinja"))
    assert (found.text, found.changes) == (text, changes)


def test_tools_are_given_to_the_template_and_told_where_it_has_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    record = parse({"messages": [USER, ASSISTANT], "tools": '[{"name": "look", "description": "Looks."}]'})
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description }} {% endfor %}" + BARE
    )
    assert records.rendered(record, tokenizer, str(own)).text == "look: Looks. <user>Ask<assistant>Tell"
    assert records.rendered(record, tokenizer).changes == (TOOLS_LOST,)


def test_a_system_turn_of_which_a_template_writes_nothing_is_put_before_the_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    silent = "{% for m in messages if m.role != 'system' %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    tokenizer.chat_template = silent
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    found = records.rendered(parse({"messages": turns}), tokenizer)
    assert (found.text, found.changes) == ("[user:S\n\nQ][assistant:A]", (FOLDED,))


@pytest.mark.parametrize("calls", [False, True])
def test_a_template_that_refuses_tools_is_given_the_conversation_without_them(
    tokenizer: PreTrainedTokenizerFast, calls: bool
) -> None:
    tokenizer.chat_template = (
        "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    middle = [called, {"role": "tool", "content": {"r": 42}}] if calls else []
    turns = [{"role": "user", "content": "Q"}, *middle, {"role": "assistant", "content": "A"}]
    tools = [{"type": "function", "function": {"name": "peek"}}]
    found = records.rendered(parse({"messages": turns, "tools": tools}), tokenizer)
    assert found.text.startswith("[user:Q]")
    assert found.text.endswith("[assistant:A]")
    assert ('"look"' in found.text) == calls
    assert found.changes == ((AS_TEXT, TOOLS_LOST) if calls else (TOOLS_LOST,))


def test_of_several_templates_that_for_tools_is_taken() -> None:
    several: Any = tiny_tokenizer()
    several.chat_template = {"default": BARE, "tool_use": "{{ tools[0].function.name }}!" + BARE}
    tools = [{"name": "look"}]
    assert records.render(parse({"messages": [USER], "tools": tools}), several) == "look!<user>Ask"
    assert records.render(parse({"messages": [USER]}), several) == "<user>Ask"


def test_without_a_template_calls_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    found = records.rendered(parse({"messages": CALLS_ONE}), tokenizer, "none")
    assert found.text == 'Ask\n\n{"name": "look", "arguments": {"x": 1}}\n\n{"found": "42"}\n\nTell'
    assert found.changes == (AS_TEXT,)


def test_a_text_that_begins_with_bos_is_not_given_another(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tiny_tokenizer()
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert records.encode(parse({"text": "<s>[INST] Hi"}), starting).count(1) == 1
    assert records.encode(parse({"text": "Hi"}), starting).count(1) == 1


# What no form helps


PICKY = (
    """
{%- if 'bad' in messages[0].content %}{{ raise_exception('no bad words') }}{% endif %}"""
    + BARE
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(folder)
    tiny_tokenizer(PICKY).save_pretrained(folder)
    return folder


def dataset(folder: Path, bad: int, good: int) -> Path:
    rows = [{"prompt": f"{word} {place}", "completion": "Tell"} for word, count in (("bad", bad), ("good", good))
            for place in range(count)]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_refused_record_is_skipped_and_counted(tmp_path: Path, model: Path) -> None:
    spec = CalibrationSpec(dataset=str(dataset(tmp_path, 2, 8)), samples=8, max_length=64)
    audit = build(spec, model, tmp_path / "out").audit
    assert audit["records"]["used"] == 8
    assert audit["records"]["dropped"] == {"the chat template refuses it: no bad words": 2}
    assert audit["records"]["usable"] == 8 + 2
    lines = audit_lines(audit)
    assert "calibration: dropped 2: the chat template refuses it: no bad words; first in record 0" in lines
    assert "warning: calibration: records dropped: 2 of 10" in lines


def test_a_run_stops_where_more_is_lost_than_the_recipe_allows(tmp_path: Path, model: Path) -> None:
    file = dataset(tmp_path, 6, 4)
    with pytest.raises(CalibrationError, match=r"fails on record \d+: no bad words; 6 of 10 records") as told:
        build(CalibrationSpec(dataset=str(file), samples=8, max_length=64), model, tmp_path / "out")
    assert "raise calibration.max_lost" in told.value.remedy
    audit = build(
        CalibrationSpec(dataset=str(file), samples=8, max_length=64, max_lost=0.7), model, tmp_path / "o"
    ).audit
    assert audit["records"]["used"] == 4


def test_a_template_that_never_ends_stops_the_run_soon(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def never_ends(*given: Any) -> str:
        asked.append(given)
        raise sandbox.TemplateEnded("it takes more than 10 seconds")

    monkeypatch.setattr(sys.modules["quantkit.records.render"], "render_chat", never_ends)
    spec = CalibrationSpec(dataset=str(dataset(tmp_path, 0, 40)), samples=32, max_length=64)
    with pytest.raises(CalibrationError, match="takes more than 10 seconds"):
        build(spec, model, tmp_path / "out")
    assert len(asked) == 3


def test_what_is_scored_skips_refused_records_too(tmp_path: Path, model: Path) -> None:
    tokenizer = tiny_tokenizer(PICKY)
    file = dataset(tmp_path, 2, 3)
    assert load_text(TextSpec(name="x", file=str(file)), tokenizer, 1000).skipped_records == 2
    questions = load_questions(AnswerSpec(file=str(file), samples=5, max_new_tokens=4), tokenizer, set(), 200)
    assert len(questions.items) == 3
    assert questions.left_out == {"refused by the chat template": 2}
    with pytest.raises(RefusedRecordError, match="fails on record 0: no bad words"):
        load_text(TextSpec(name="x", file=str(dataset(tmp_path, 2, 0))), tokenizer, 1000)
