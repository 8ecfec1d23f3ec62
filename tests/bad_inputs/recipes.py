"""Recipes that unfold, run on, name what nobody has, or ask for the impossible."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place


def text(place: Place, content: str | bytes, command: str = "validate") -> list[str]:
    return [command, str(place.write("recipe.yaml", content))]


def keys(place: Place, section: str | None = None, **changes: Any) -> list[str]:
    """A recipe with other keys, at the top or in a section."""

    def edit(data: dict[str, Any]) -> None:
        (data if section is None else data.setdefault(section, {})).update(changes)

    return ["run", place.recipe(edit)]


@case("is not a mapping")
def nothing(place: Place) -> list[str]:
    return text(place, "")


@case("not UTF-8")
def not_utf8(place: Place) -> list[str]:
    return text(place, b"name: \xff\xfe")


@case("not valid YAML")
def nulls(place: Place) -> list[str]:
    return text(place, b"name: a\0b")


@case("larger than")
def ten_megabytes(place: Place) -> list[str]:
    return text(place, "# " + "x" * 10_000_000)


@case("aliases")
def a_bomb_of_aliases(place: Place) -> list[str]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    return text(place, "\n".join(lines))


@case("aliases")
def an_alias_to_itself(place: Place) -> list[str]:
    return text(place, "name: &a [*a]")


@case("aliases")
def a_merge_of_an_alias(place: Place) -> list[str]:
    return text(place, "base: &b {name: x}\n<<: *b\n", "run")


@case("not valid YAML")
def a_tag_that_runs_code(place: Place) -> list[str]:
    command = f"name: !!python/object/apply:os.system ['touch {place.canary}']\n"
    return text(place, command, "run")


@case("not valid YAML")
def a_tag_that_makes_an_object(place: Place) -> list[str]:
    return text(place, "name: !!python/object/new:pathlib.Path ['x']\n")


@case("not valid YAML")
def a_tag_of_no_kind(place: Place) -> list[str]:
    return text(place, "name: !nonesuch {a: 1}\n", "import-recipe")


@case("given twice")
def a_key_given_twice(place: Place) -> list[str]:
    return text(place, "name: a\nname: b\n")


@case("a key must be")
def a_list_for_a_key(place: Place) -> list[str]:
    return text(place, "? [a, b]\n: c\n")


@case("nested")
def deep(place: Place) -> list[str]:
    return text(place, "name: " + "[" * 100_000)


@case("nested")
def deep_by_indentation(place: Place) -> list[str]:
    return text(place, "\n".join(" " * level + "a:" for level in range(1200)))


@case("not valid YAML")
def two_documents(place: Place) -> list[str]:
    return text(place, "name: a\n---\nname: b\n")


@case("number")
def a_number_of_base_sixty(place: Place) -> list[str]:
    return text(place, "name: 1" + ":10" * 300_000)


@case("number")
def a_number_of_a_million_digits(place: Place) -> list[str]:
    return text(place, "name: " + "9" * 1_000_000)


@case("number")
def a_hexadecimal_number_of_a_million_digits(place: Place) -> list[str]:
    return text(place, "name: x\nmodel: {source: 0x" + "f" * 1_000_000 + "}")


@case("not valid YAML")
def a_date_that_never_was(place: Place) -> list[str]:
    return text(place, "name: 2024-13-45")


@case("name")
def a_date_for_a_name(place: Place) -> list[str]:
    return keys(place, name=__import__("datetime").date(2024, 1, 1))


@case("name")
def a_path_for_a_name(place: Place) -> list[str]:
    return keys(place, name="../../outside/run")


@case("variants[0].name")
def a_path_for_a_variant(place: Place) -> list[str]:
    return keys(place, variants=[{"name": "../../../outside/x", "method": "rtn"}])


@case("calibration.samples")
def no_samples(place: Place) -> list[str]:
    return keys(place, "calibration", samples=0)


@case("context_length")
def windows_of_a_million_million_tokens(place: Place) -> list[str]:
    return keys(place, "evaluation", context_length=10**12, max_tokens=10**13)


@case("group_size")
def groups_of_a_million_million(place: Place) -> list[str]:
    return ["quantize", place.sound("single"), "-o", place.out, "--method", "rtn", "--group-size", str(10**12)]


@case("group_size")
def groups_of_no_number(place: Place) -> list[str]:
    return keys(place, variants=[{"name": "a", "method": "rtn", "group_size": float("nan")}])


@case("unknown method")
def a_method_that_is_a_path(place: Place) -> list[str]:
    return keys(place, variants=[{"name": "a", "method": "../../os"}])


@case("unknown key")
def a_key_of_python(place: Place) -> list[str]:
    return keys(place, variants=[{"name": "a", "method": "rtn", "__class__": "x"}])


@case("gate")
def a_gate_that_is_code(place: Place) -> list[str]:
    return keys(place, gates=[f"__import__('os').system('touch {place.canary}') <= 1"])


@case("gate")
def a_gate_that_is_long(place: Place) -> list[str]:
    return keys(place, gates=["perplexity." + "a" * 500_000 + " <= 1"])


@case("package")
def a_package_that_leads_out(place: Place) -> list[str]:
    return keys(place, "model", source="package:jinja2/../../../etc/passwd")


@case("model.source: there is no a")
def a_source_with_a_null(place: Place) -> list[str]:
    return keys(place, "model", source="a\0b")


def calibrated(place: Place, **changes: Any) -> list[str]:
    """A run that reads its calibration set."""

    def edit(data: dict[str, Any]) -> None:
        data["variants"] = [{"name": "a", "method": "gptq"}]
        data["calibration"].update(changes)

    return ["run", place.recipe(edit)]


@case("is not a plain file")
def a_data_set_that_is_a_device(place: Place) -> list[str]:
    return calibrated(place, dataset="/dev/zero")


@case("chat template")
def a_template_that_is_a_folder(place: Place) -> list[str]:
    return calibrated(place, chat_template=str(place.inside))


@case("model_name_or_path")
def an_import_of_nothing(place: Place) -> list[str]:
    return text(place, "export_dir: x\n", "import-recipe")


@case("model_name_or_path")
def an_import_of_wrong_types(place: Place) -> list[str]:
    return text(place, "model_name_or_path: [1]\nexport_dir: {a: b}\nadapter_name_or_path: 5\n", "import-recipe")
