"""The catalogue of choices: what each method needs and takes, what each format stores, and the schemes.

All of it is asked of the parts themselves: a scheme is taken where ``check`` does not refuse it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from quantkit.errors import SchemeError
from quantkit.methods.base import MethodOptions, Statistic
from quantkit.recipe.steps import Steps
from quantkit.schemes import INTEGER_BITS, PER_CHANNEL, SCHEMES, Fp8Scheme, IntScheme, Scheme, make_scheme
from quantkit.schemes.kinds import all_kinds, keys_of

SHOWN_COLUMNS = 4096
"""Rows and columns of the layer for which bits per weight are given."""
STATISTIC_WORDS = {
    Statistic.ABS_MEAN: "mean |x|",
    Statistic.SQUARE_MEAN: "mean x²",
    Statistic.GRAM: "XᵀX",
    Statistic.ABS_MAX: "max |x|",
    Statistic.SAMPLE: "some of the inputs",
}
SMALL_GROUP = 32
FURTHER = {
    "float zeros too": IntScheme(4, SMALL_GROUP, symmetric=False, zeros="float"),
    "axis 0 too": IntScheme(4, SMALL_GROUP, symmetric=False, zeros="float", axis=0),
    "w8a8 too": IntScheme(8, PER_CHANNEL, activations="dynamic"),
    "w4a8 too": IntScheme(4, SMALL_GROUP, activations="dynamic"),
    "desc_act too": IntScheme(4, SMALL_GROUP, desc_act=True),
}
"""Integers that not everything takes which takes the plain ones."""
Check = Callable[[Scheme], None]


@dataclass(frozen=True, slots=True)
class Option:
    """A key that may be given: what it is by default, and what it does."""

    name: str
    default: str
    meaning: str


def options_of(options: type[MethodOptions]) -> list[Option]:
    """The options of a method or a transform."""
    documented = _documented(options)
    return [
        Option(
            name,
            "required" if field.is_required() else written(field.default),
            field.description or documented.get(name, ""),
        )
        for name, field in options.model_fields.items()
    ]


def needs_of(steps: Steps) -> str:
    """The data that a method needs: none, or which statistics, and the options that change it."""
    usual = _needs(steps, {})
    others = {
        f"{name}: {written(value)}": needs
        for name, value in _choices(steps.Options)
        if (needs := _needs(steps, {name: value})) not in (None, usual)
    }
    texts = [statistics_words(steps.method.needs if usual is None else usual)]
    texts += [f"with {choice} {statistics_words(needs)}" for choice, needs in others.items() if needs is not None]
    return "; ".join(texts)


def schemes_taken(check: Check) -> list[str]:
    """The kinds of scheme that pass ``check``, each with its bits or its granularities."""
    words = {"int": _integers(check), "fp8": _floats(check)}
    plain = {kind: kind if _takes(check, make_scheme(kind, {})) else "" for kind in all_kinds()}
    return [text for text in (plain | words).values() if text]


def bits_taken(check: Check) -> str:
    """The widths of codes that pass ``check``, as a range where they have no gap."""
    widths = {scheme.bits for scheme in _integer_probes() if _takes(check, scheme)}
    widths |= {scheme.bits for kind in SCHEMES.names() if _takes(check, scheme := make_scheme(kind, {}))}
    return _ranges(sorted(widths))


def scheme_keys(kind: str) -> list[Option]:
    """The keys of a kind of scheme with their defaults."""
    documented = _documented(SCHEMES.get(kind))
    defaults = SCHEMES.get(kind).defaults()
    return [
        Option(key, "required" if defaults[key] is MISSING else written(defaults[key]), documented.get(key, ""))
        for key in keys_of(kind)
    ]


def shown_bits(kind: str) -> float:
    """Bits per weight of a kind of scheme as it is by default, with 16-bit scales."""
    return make_scheme(kind, {}).bits_per_weight(SHOWN_COLUMNS, 16, SHOWN_COLUMNS)


def _needs(steps: Steps, given: dict[str, Any]) -> frozenset[Statistic] | None:
    """The statistics that a method and its transforms ask for under some options; None where they cannot be."""
    try:
        options = steps.Options(**given)
    except ValidationError:
        return None
    return steps.build_method(options).needs.union(*(each.needs for each in steps.build_transforms(options)))


def statistics_words(needs: frozenset[Statistic]) -> str:
    """Which statistics are asked for, in a few words."""
    words = [STATISTIC_WORDS[each] for each in Statistic if each in needs]
    return f"calibration: {', '.join(words)} of the inputs" if words else "no data"


def _choices(options: type[MethodOptions]) -> Iterator[tuple[str, Any]]:
    """Each value of each option that has a few, but for its default."""
    for name, field in options.model_fields.items():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        values = (True, False) if field.annotation is bool else values
        yield from ((name, value) for value in values if value != field.default)


def _takes(check: Check, scheme: Scheme) -> bool:
    try:
        check(scheme)
    except SchemeError:
        return False
    return True


def _integer_probes() -> list[IntScheme]:
    return [
        IntScheme(bits, group_size, symmetric)
        for bits in INTEGER_BITS
        for group_size in (SMALL_GROUP, 64, PER_CHANNEL)
        for symmetric in (True, False)
        if bits > 1 or not symmetric
    ]


def _integers(check: Check) -> str:
    taken = [scheme for scheme in _integer_probes() if _takes(check, scheme)]
    further = [words for words, scheme in FURTHER.items() if _takes(check, scheme)]
    if not taken:
        return "int8 (w8a8 only)" if further else ""
    signs, groups = {scheme.symmetric for scheme in taken}, {scheme.group_size for scheme in taken}
    limits = [] if len(signs) == 2 else ["symmetric only" if True in signs else "asymmetric only"]
    if groups == {PER_CHANNEL}:
        limits.append("per channel only")
    elif groups == {SMALL_GROUP}:
        limits.append(f"group_size {SMALL_GROUP} only")
    elif PER_CHANNEL not in groups:
        limits.append("grouped only")
    limits += further
    return f"int{_ranges(sorted({scheme.bits for scheme in taken}))}" + (f" ({', '.join(limits)})" if limits else "")


def _floats(check: Check) -> str:
    taken = [
        shape for shape in ("tensor", "channel", "block") if _takes(check, make_scheme("fp8", {"granularity": shape}))
    ]
    activations = ["a8 too"] if _takes(check, Fp8Scheme(activations="dynamic")) else []
    return f"fp8 ({', '.join([*taken, *activations])})" if taken else ""


def _ranges(numbers: list[int]) -> str:
    """``1-8`` or ``2, 3, 4, 8``."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return "/".join(map(str, numbers))


def written(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _documented(cls: type) -> dict[str, str]:
    """The words of a class's docstring and its bases' on each attribute or argument, on one line.

    Where a text points to another class, what that class says of the same name is added.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(base.__doc__ or ""), re.M)
        for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M):
            found |= {name: _plain(name, text) for name in names.split(", ")}
    return found


def _plain(name: str, text: str) -> str:
    """A docstring's words without its markup, and with those of the class that it points to."""
    words = " ".join(re.sub(r"``([^`]*)``", r"\1", text).split())
    pointer = re.search(r"see :class:`([\w.]+)\.(\w+)`\.?", words)
    if pointer is not None:
        there = getattr(importlib.import_module(pointer[1]), pointer[2])
        words = words.replace(pointer[0], _documented(there).get(name, ""))
    return re.sub(r":\w+:`([^`]*)`", r"\1", words)
