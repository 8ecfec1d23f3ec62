"""The steps of a variant: any number of transforms, then a method, and the options of all of them.

``transforms: [awq]`` with ``method: gptq`` and the short form ``method: awq+gptq`` say the same. In the short form, and
where a method brings a transform itself as ``method: awq`` does, the options of all steps stand beside the variant's
other keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeGuard, cast

from pydantic import Field, create_model, field_validator, model_validator

from quantkit.errors import QuantkitError, RecipeError, did_you_mean
from quantkit.methods import METHODS
from quantkit.methods.base import Method, MethodOptions
from quantkit.methods.tuning import TUNE
from quantkit.recipe.fields import Section, options_apart
from quantkit.schemes import Scheme
from quantkit.system.validation import located, unknown_key
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Transform, TransformOptions

DEFAULT_METHOD = "gptq"


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that the key ``method`` stands for.

    Attributes:
        transforms: that come right before the method.
        method: chooses the codes.
        Options: those of all of them, side by side.
    """

    transforms: tuple[type[Transform], ...]
    method: type[Method]
    Options: type[MethodOptions]

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme that the method or a transform cannot do.

        Raises:
            SchemeError: one of them cannot.
        """
        for transform in self.transforms:
            transform.check(scheme)
        self.method.check(scheme)

    def build_method(self, options: MethodOptions) -> Method:
        """The method with its own options among those given."""
        return self.method(_own(self.method.Options, options))

    def build_transforms(self, options: MethodOptions) -> tuple[Transform, ...]:
        """The transforms with their own options among those given."""
        return tuple(transform(_own(transform.Options, options)) for transform in self.transforms)


@cache
def steps_of(method: str) -> Steps:
    """The steps that a method is, by its name or a short form such as ``awq+gptq``.

    Raises:
        RecipeError: no such method or transform, or a transform that the method brings itself.
        QuantkitError: a plugin is there but cannot be imported.
    """
    *before, last = method.split("+")
    if before and TUNE in (*before, last):
        rest = "+".join(name for name in (*before, last) if name != TUNE)
        raise RecipeError(
            f"method '{method}': {TUNE} comes once, when the codes are there", f"put it at the end: {rest}+{TUNE}"
        )
    if before and last not in METHODS and get_close_matches(last.lower(), [TUNE, *METHODS.names()], 1) == [TUNE]:
        raise RecipeError(f"method '{method}': '{last}' cannot come behind {before[-1]}", did_you_mean(last, [TUNE]))
    for name in before:
        if name not in TRANSFORMS.names() and name in METHODS.names():
            raise RecipeError(
                f"method '{method}': {name} chooses codes, and what stands before a '+' only changes weights",
                f"put a transform there: {', '.join(TRANSFORMS.names())}",
            )
    solver = METHODS.get(last)
    twice = set(before) & set(solver.transforms)
    if twice:
        raise RecipeError(f"method '{method}': {last} brings the transform {', '.join(twice)} itself", f"write {last}")
    transforms = tuple(TRANSFORMS.get(name) for name in (*before, *solver.transforms))
    if not transforms:
        return Steps(transforms, solver, solver.Options)
    return Steps(transforms, solver, _joined([*(transform.Options for transform in transforms), solver.Options]))


def _joined(kinds: Sequence[type[MethodOptions]]) -> type[MethodOptions]:
    """Options of several kinds, side by side."""
    return cast(type[MethodOptions], create_model("And".join(kind.__name__ for kind in kinds), __base__=tuple(kinds)))


def is_method(name: object) -> TypeGuard[str]:
    """Whether the key ``method`` may have this value."""
    if not isinstance(name, str):
        return False
    try:
        steps_of(name)
    except QuantkitError:
        return False
    return True


class TransformSpec(Section):
    """A transform of a variant: its name, or a mapping with its name and its options.

    Attributes:
        name: of ``quantkit methods``.
        options: its own; in YAML they stand beside the name.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"name": given}
        if not isinstance(given, Mapping) or given.get("name") not in TRANSFORMS:
            return given
        known = set(TRANSFORMS.get(given["name"]).Options.model_fields)
        for key in given:
            if isinstance(key, str) and key not in known | set(cls.model_fields):
                raise unknown_key(key, known | {"name"}, "")
        return options_apart(given, known)

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        with located():
            return TRANSFORMS.name_of(name)

    @model_validator(mode="after")
    def _options_are_valid(self) -> TransformSpec:
        self.transform_options()
        return self

    def transform_options(self) -> TransformOptions:
        """Its options, validated, with its defaults filled in."""
        return TRANSFORMS.get(self.name).Options.model_validate(self.options)

    def build(self) -> Transform:
        """The transform with these options."""
        return TRANSFORMS.get(self.name)(self.transform_options())

    def resolved(self) -> dict[str, Any]:
        """The transform as JSON data, with every option filled in."""
        return {"name": self.name, **self.transform_options().model_dump(mode="json")}


def _own(kind: type[MethodOptions], options: MethodOptions) -> Any:
    """The options that one of the steps knows."""
    return kind.model_validate({name: getattr(options, name) for name in kind.model_fields})


def gathered(given: Mapping[Any, Any], own: Collection[str]) -> Mapping[Any, Any]:
    """A variant with the options of its method under ``options``.

    Args:
        given: the variant as it was written.
        own: the keys of a variant itself, which come before options of the same name.

    Raises:
        PydanticCustomError: neither the variant nor its method has a key.
    """
    method = given.get("method", DEFAULT_METHOD)
    if is_method(method):
        _check_keys(given, method, own)
    return options_apart(given, option_names(method) - set(own))


def option_names(method: object) -> set[str]:
    """The options of a method; none for what is not a method, which the field's own validator reports."""
    return set(steps_of(method).Options.model_fields) if is_method(method) else set()


def _check_keys(given: Mapping[Any, Any], method: str, own: Collection[str]) -> None:
    known = set(own) | option_names(method)
    for key in given:
        if isinstance(key, str) and key not in known:
            owners = [name for name in METHODS.names() if key in option_names(name)]
            foreign = f"it is an option of {', '.join(owners)}, and the method is {method}" if owners else ""
            raise unknown_key(key, known, foreign)
