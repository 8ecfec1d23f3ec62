"""Conversations as a chat template takes them.

Templates refuse some: Gemma's have no system turn, Mistral's want user and assistant to alternate and calls with ids of
nine characters, Llama's take one call at a time. What their users do then is done here, step by step, the least first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from quantkit.records.record import Message

DEVELOPER = "its developer turn made a system turn"
ONE_CALL = "its calls of tools made one after another"
AS_TEXT = "its calls of tools written as text: the chat template has none"
NO_START = "an answer before its first question left out: the chat template begins with a user"
FOLDED = "its system turn put before the first question: the chat template has none"
MERGED = "neighbours of one role merged: the chat template wants turns to alternate"
JOINT = "\n\n"


def adapted(messages: Sequence[Message]) -> Iterator[tuple[list[Message], tuple[str, ...]]]:
    """A conversation as it is, and then with what may be changed of it, from the fewest steps to all.

    Yields:
        Messages, and what was changed, in words.
    """
    seen = [list(messages)]
    yield seen[0], ()
    for count in range(1, len(STEPS) + 1):
        for steps in combinations(STEPS, count):
            found, done = list(messages), []
            for name in steps:
                changed = STEPS[name](found)
                done += [name] if changed != found else []
                found = changed
            if len(done) == count and found and found not in seen:
                seen.append(found)
                yield found, tuple(done)


def _developer_is_system(messages: Sequence[Message]) -> list[Message]:
    return [replace(each, role="system") if each.role == "developer" else each for each in messages]


def _one_call_at_a_time(messages: Sequence[Message]) -> list[Message]:
    """Each call followed by its result, where a turn has several."""
    found: list[Message] = []
    rest = list(messages)
    while rest:
        turn = rest.pop(0)
        results = []
        while len(turn.calls) > 1 and rest and rest[0].role == "tool":
            results.append(rest.pop(0))
        if len(turn.calls) != len(results) or len(results) < 2:
            found += [turn, *results]
            continue
        by_id = {result.call_id: result for result in results}
        for place, call in enumerate(turn.calls):
            said = turn if place == 0 else Message("assistant", "")
            found += [replace(said, calls=(call,)), by_id.get(call.id, results[place])]
    return found


def _calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """What is called as JSON in the turn's text, and what is returned as said by the user."""
    found = []
    for each in messages:
        calls = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in each.calls]
        if calls:
            each = replace(each, content="\n".join(filter(None, [each.content, *calls])), calls=())
        found.append(Message("user", each.content or "{}") if each.role == "tool" else each)
    return found


def _from_first_question(messages: Sequence[Message]) -> list[Message]:
    begins = next((place for place, each in enumerate(messages) if each.role == "user"), None)
    if begins is None:
        return list(messages)
    return [*(each for each in messages[:begins] if each.role in ("system", "developer")), *messages[begins:]]


def _system_in_question(messages: Sequence[Message]) -> list[Message]:
    """Each system turn put before the user's next, which it becomes where there is none."""
    found: list[Message] = []
    waiting: list[str] = []
    for each in messages:
        if each.role in ("system", "developer"):
            waiting.append(each.content)
        elif each.role == "user" and waiting:
            found.append(replace(each, content=JOINT.join([*waiting, each.content])))
            waiting = []
        else:
            found.append(each)
    return [*found, *([Message("user", JOINT.join(waiting))] if waiting else [])]


def _neighbours_merged(messages: Sequence[Message]) -> list[Message]:
    found: list[Message] = []
    for each in messages:
        before = found[-1] if found else None
        if before is None or before.role != each.role or each.role == "tool":
            found.append(each)
            continue
        content = JOINT.join(filter(str.strip, [before.content, each.content]))
        reasoning = JOINT.join(filter(None, [before.reasoning, each.reasoning]))
        found[-1] = replace(before, content=content, reasoning=reasoning, calls=(*before.calls, *each.calls))
    return found


STEPS: dict[str, Callable[[Sequence[Message]], list[Message]]] = {
    DEVELOPER: _developer_is_system,
    ONE_CALL: _one_call_at_a_time,
    AS_TEXT: _calls_as_text,
    NO_START: _from_first_question,
    FOLDED: _system_in_question,
    MERGED: _neighbours_merged,
}
"""What may be done with a conversation, by what is said of it, in the order in which it is done."""
