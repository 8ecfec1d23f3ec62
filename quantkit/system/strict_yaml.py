"""YAML as recipes and task files are written in: without aliases and without repeated keys."""

from __future__ import annotations

from typing import Any

import yaml

from quantkit.errors import RecipeError

MAX_DIGITS = 64


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """The mapping that ``text`` stands for.

    Raises:
        RecipeError: it is not YAML, not a mapping, or uses what recipes do not need.
    """
    try:
        # ValueError: the safe loader passes on what Python says of a date or a number that cannot be.
        content = yaml.load(text, Loader=StrictLoader)
    except RecursionError as error:
        raise RecipeError(
            f"{origin} is not valid YAML: it is nested too deeply", "a recipe has at most a dozen levels"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        remedy = "write plain YAML: names, texts, numbers, lists and mappings, each key once"
        raise RecipeError(f"{origin} is not valid YAML: {error}", remedy) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{origin} is not a mapping of keys to values", "start with 'name:' and 'model:'")
    return content


class StrictLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines could unfold to gigabytes), without repeated keys, and with short numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, unless it stands for another."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping, each of whose keys is plain and stands once."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.YAMLError("a key must be a plain name")
            if key in seen:
                raise yaml.YAMLError(f"key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_short_int(self, node: Any) -> int:
        """A whole number; one of thousands of digits, or in base sixty, would take its time."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_short_int)
