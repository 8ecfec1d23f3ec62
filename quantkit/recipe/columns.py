"""The keys ``columns`` and ``tags``: how the records of a data set call what a record has.

Both have the names that LLaMA-Factory's ``dataset_info.json`` gives them, and quantkit's own beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from quantkit.errors import RecipeError, did_you_mean
from quantkit.system.validation import located

MEANINGS = {
    "messages": "messages",
    "conversations": "messages",
    "prompt": "prompt",
    "instruction": "prompt",
    "question": "prompt",
    "query": "query",
    "input": "query",
    "context": "query",
    "response": "response",
    "output": "response",
    "answer": "response",
    "completion": "response",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "reasoning": "reasoning",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "wanted",
    "label": "wanted",
    "text": "text",
    "images": "images",
    "image": "images",
}
"""What each name of ``columns`` stands for."""
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
"""Of a conversation: the keys of a turn, and the names of its roles."""


def check_names(given: Mapping[str, Any], known: Mapping[str, Any] | tuple[str, ...], what: str) -> None:
    """Refuse names that are not known.

    Raises:
        RecipeError: with the nearest that is.
    """
    for name in given:
        if name not in known:
            raise RecipeError(f"unknown {what} '{name}'", did_you_mean(name, known))


ENTRY = ("file_name", "hf_hub_url", "formatting", "ranking", "columns", "tags")
"""Keys of an entry of ``dataset_info.json`` that a recipe may have in place of a data set's name."""


def with_entry(given: Any, key: str, *, hub_key: str | None = None) -> Any:
    """A section of which ``key`` may be an entry of ``dataset_info.json``, with that entry's keys in their places.

    Args:
        given: as it was written.
        key: of the data set.
        hub_key: of one on the hub; None where ``key`` is of that as well, and says ``hub:``.
    """
    entry = given.get(key) if isinstance(given, Mapping) else None
    if not isinstance(entry, Mapping):
        return given
    with located():
        for name in entry:
            if name not in ENTRY:
                remedy = "write the entry into dataset_info.json, and llamafactory:DIR/NAME here"
                raise RecipeError(f"{key}.{name} is not read in a recipe", remedy)
        places = [entry[name] for name in ("file_name", "hf_hub_url") if entry.get(name)]
        if len(places) != 1 or not isinstance(places[0], str):
            raise RecipeError(f"{key} lies neither in a file nor on the hub", "give one of file_name and hf_hub_url")
    rest = {name: value for name, value in given.items() if name != key}
    layout = {name: entry[name] for name in ("columns", "tags") if entry.get(name)}
    if entry.get("hf_hub_url"):
        return {**rest, **({key: f"hub:{places[0]}"} if hub_key is None else {hub_key: places[0]}), **layout}
    return {**rest, key: places[0], **layout}


def _without_nothing(given: Any) -> Any:
    """LLaMA-Factory takes ``null`` for a name that is not given."""
    return {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else given


def _columns(given: dict[str, str]) -> dict[str, str]:
    with located():
        check_names(given, MEANINGS, "column name")
        meant = [MEANINGS[name] for name in given]
        twice = next((name for name in given if meant.count(MEANINGS[name]) > 1), None)
        if twice is not None:
            raise RecipeError(f"column name '{twice}' is given twice, once by another name", "leave one out")
    return given


def _tags(given: dict[str, str]) -> dict[str, str]:
    with located():
        check_names(given, TAGS, "tag")
    return given


Columns = Annotated[dict[str, str], BeforeValidator(_without_nothing), AfterValidator(_columns)]
"""Names of :data:`MEANINGS` to columns of the data set."""
Tags = Annotated[dict[str, str], BeforeValidator(_without_nothing), AfterValidator(_tags)]
"""Names of :data:`TAGS` to keys and roles of the data set."""
