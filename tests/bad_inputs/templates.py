"""Chat templates that never end, fill the memory, or reach for the system."""

from __future__ import annotations

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place

WORDS = "the chat template"


def rendered(place: Place, template: str) -> list[str]:
    """Calibrate with a model whose own template this is."""
    folder = place.copy("single")
    (folder / "chat_template.jinja").write_text(template)
    options = ["--method", "gptq", "--group-size", "32", "--calibration", place.sound("data.jsonl"), "--samples", "4"]
    return ["quantize", str(folder), "-o", place.out, *options]


def verified(place: Place, template: str) -> list[str]:
    """Verify a checkpoint whose own template this is."""
    folder = place.copy("export")
    (folder / "chat_template.jinja").write_text(template)
    return ["verify", str(folder), "--device", "cpu"]


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
LOOPS += "{% endfor %}"
SYSTEM = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"


@case(WORDS)
def loops(place: Place) -> list[str]:
    return rendered(place, LOOPS)


@case(WORDS)
def loops_to_verify(place: Place) -> list[str]:
    return verified(place, LOOPS)


@case(WORDS)
def a_power_that_never_ends(place: Place) -> list[str]:
    return rendered(place, "{{ 9 ** (9 ** (9 ** 9)) }}")


@case(WORDS)
def a_text_that_fills_the_memory(place: Place) -> list[str]:
    return rendered(place, "{{ 'x' * 100000000000 }}")


@case(WORDS)
def a_text_that_doubles(place: Place) -> list[str]:
    doubling = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
    return rendered(place, doubling)


@case(WORDS)
def a_text_that_doubles_to_verify(place: Place) -> list[str]:
    return verified(
        place, "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    )


@case(WORDS)
def a_field_as_wide_as_the_world(place: Place) -> list[str]:
    return rendered(place, "{{ '%99999999999d' % 1 }}")


@case(WORDS)
def an_output_without_end(place: Place) -> list[str]:
    return rendered(place, "{% for a in range(99999) %}{{ 'x' * 20000 }}{% endfor %}")


@case(WORDS)
def recursion(place: Place) -> list[str]:
    return rendered(place, "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}")


@case(WORDS)
def the_system_by_globals(place: Place) -> list[str]:
    return rendered(place, SYSTEM % place.canary)


@case(WORDS)
def the_system_by_globals_to_verify(place: Place) -> list[str]:
    return verified(place, SYSTEM % place.canary)


@case(WORDS)
def the_system_by_classes(place: Place) -> list[str]:
    classes = "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__name__ }}{% endfor %}"
    return rendered(place, classes)


@case(WORDS)
def the_system_by_format(place: Place) -> list[str]:
    return rendered(place, "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}")


@case(WORDS)
def the_system_by_attr(place: Place) -> list[str]:
    return rendered(place, "{{ (messages|attr('__class__'))('x') }}")


@case(WORDS)
def the_system_by_imports(place: Place) -> list[str]:
    return rendered(place, "{% include '/etc/passwd' %}")


@case(WORDS)
def changes_of_what_it_is_given(place: Place) -> list[str]:
    return rendered(place, "{{ messages.append({'role': 'user', 'content': 'x'}) }}")


@case(WORDS)
def no_template(place: Place) -> list[str]:
    return rendered(place, "{% for %}")


@case(WORDS)
def a_million_brackets(place: Place) -> list[str]:
    return rendered(place, "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}")


@case(WORDS)
def a_refusal(place: Place) -> list[str]:
    return rendered(place, "{{ raise_exception('no') }}")


@case("is not UTF-8")
def not_utf8(place: Place) -> list[str]:
    file = place.write("template.jinja", b"\xff\xfe")
    changes = {"variants": [{"name": "a", "method": "gptq"}]}
    return ["run", place.recipe(lambda data: data["calibration"].update(chat_template=str(file)), **changes)]
