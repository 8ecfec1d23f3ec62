"""YAML as recipes and task files are written in: without aliases and without repeated keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quantkit.errors import RecipeError
from quantkit.system.variables import expanded

MAX_DIGITS = 64
_VARIABLE = re.compile(r"\$\{([^{}\n]*)\}")
_BRACES = "\ue000\ue001"
"""Stand for the braces of a variable while YAML is read, which in ``{bits: ${BITS}}`` would take them for a mapping."""
_BACK = str.maketrans(_BRACES, "{}")
_SHARED = "write it out; what variants share goes into 'defaults'"
_WAYS_OUT = {
    "'\\t'": "indent with spaces: YAML takes no tabs there",
    "yaml.org,2002:merge": _SHARED,
    "aliases": _SHARED,
}
"""By what PyYAML says."""


def parse_mapping(text: str, origin: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The mapping that ``text`` stands for.

    Args:
        text: YAML.
        origin: names it in messages.
        variables: what ``${NAME}`` in a value stands for, see :mod:`quantkit.system.variables`; None leaves it.

    Raises:
        RecipeError: it is not YAML, not a mapping, or uses what recipes do not need; a variable is not set, or secret.
    """
    mistakes: list[tuple[int, RecipeError]] = []
    try:
        # ValueError: the safe loader passes on what Python says of a date or a number that cannot be.
        content = _content(text, variables, mistakes)
    except RecursionError as error:
        raise RecipeError(
            f"{origin} is not valid YAML: it is nested too deeply", "a recipe has at most a dozen levels"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise _not_yaml(error, origin, text) from error
    if mistakes:
        found = [RecipeError(f"{origin}:{line}: {error.problem}", error.remedy) for line, error in mistakes]
        raise RecipeError.together(found)
    if not isinstance(content, dict):
        raise RecipeError(f"{origin} is not a mapping of keys to values", "start with 'name:' and 'model:'")
    return content


def _not_yaml(error: ValueError | yaml.YAMLError, origin: str, text: str) -> RecipeError:
    """What is wrong with a text, and of one of several lines where."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    said = error.problem if isinstance(error, yaml.MarkedYAMLError) and error.problem else str(error)
    where = f"{origin}:{mark.line + 1}" if mark is not None and "\n" in text.strip() else origin
    usual = "write plain YAML: names, texts, numbers, lists and mappings, each key once"
    remedy = next((way for sign, way in _WAYS_OUT.items() if sign in said), usual)
    return RecipeError(f"{where} is not valid YAML: {said.translate(_BACK)}", remedy)


def _content(text: str, variables: Mapping[str, str] | None, mistakes: list[tuple[int, RecipeError]]) -> Any:
    loader = StrictLoader(text)
    loader.variables, loader.mistakes = variables, mistakes
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def line_of(text: str, place: Sequence[int | str]) -> int | None:
    """The line on which a key or an entry of a list stands, or the nearest thing around it; None in an empty text.

    Args:
        text: YAML that :func:`parse_mapping` read.
        place: keys and indices from the top.
    """
    node, line = yaml.compose(text, Loader=StrictLoader), None
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next((pair for pair in node.value if pair[0].value == part), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


class StrictLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines could unfold to gigabytes), without repeated keys, and with short numbers.

    Attributes:
        variables: what ``${NAME}`` stands for in values; None leaves it.
        mistakes: lines with a variable that has no value, or a secret one.
    """

    def __init__(self, stream: Any) -> None:
        protected = isinstance(stream, str) and not any(brace in stream for brace in _BRACES)
        super().__init__(_VARIABLE.sub(rf"${_BRACES[0]}\1{_BRACES[1]}", stream) if protected else stream)
        self.variables: Mapping[str, str] | None = None
        self.mistakes: list[tuple[int, RecipeError]] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, unless it stands for another; variables in a value give way to what they stand for."""
        if self.check_event(yaml.events.AliasEvent):
            peek_event: Any = self.peek_event
            mark = peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            node.value = node.value.translate(_BACK)
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if self.variables is None or is_key or not isinstance(node, yaml.ScalarNode) or "$" not in node.value:
            return node
        try:
            value = expanded(node.value, self.variables)
        except RecipeError as error:
            self.mistakes.append((node.start_mark.line + 1, error))
            return node
        resolve: Any = self.resolve  # a number that stands there plainly is a number
        tag = node.tag if node.style or value == node.value else resolve(yaml.ScalarNode, value, (True, False))
        return yaml.ScalarNode(tag, value, node.start_mark, node.end_mark, node.style)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping, each of whose keys is plain and stands once."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.YAMLError("a key must be a plain name")
            if key in seen:
                said = f"key '{key}' is given twice"
                raise yaml.MarkedYAMLError(problem=said, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_short_int(self, node: Any) -> int:
        """A whole number; one of thousands of digits, or in base sixty, would take its time."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_short_int)
