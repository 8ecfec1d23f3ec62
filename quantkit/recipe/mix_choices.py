"""What a mix has to choose from: schemes by name or as patches of a variant's, that its format and runtime serve."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import ValidationInfo, field_validator

from quantkit.errors import QuantkitError, RecipeError, SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.recipe.fields import Place
from quantkit.recipe.implied import DEFAULT_FORMAT
from quantkit.recipe.scheme import SchemePatch
from quantkit.recipe.scheme_names import scheme_named
from quantkit.recipe.spelling import patch_spelled
from quantkit.recipe.variant import VariantSpec
from quantkit.schemes import DEFAULT_KIND, GgmlMixture, PlainScheme, Scheme, make_scheme
from quantkit.system.names import chosen
from quantkit.system.validation import located, parse_section
from quantkit.transforms import TRANSFORMS

FLOAT = "float"
"""The choice of what is left in 16 bits."""


class ChoosingSpec(VariantSpec):
    """A variant each of whose layers gets one of several schemes.

    Attributes:
        choices: names of schemes or patches of the variant's, ``float`` for layers that stay as they are; None is
            what format and runtime usually serve.
        runtime: that must load the file; None is any that loads its format.
        allocation: file of an allocation that is given back; then nothing is measured.
    """

    choices: tuple[str | dict[str, Any], ...] | None = None
    runtime: str | None = None
    allocation: Place | None = None

    @field_validator("runtime")
    @classmethod
    def _runtime_loads_it(cls, runtime: str | None, info: ValidationInfo) -> str | None:
        store = info.data.get("format")
        if runtime is None or store is None:
            return runtime
        able = FORMATS.get(store).runtimes
        found = chosen(runtime, able)
        with located():
            if found is None:
                raise RecipeError(f"{runtime} does not load format {store}", f"these do: {', '.join(able)}")
        return found

    def _check_choices(self) -> None:
        """Refuse choices that are none, that are too few, or that the format cannot store."""
        store, schemes = FORMATS.get(self.format), self.choice_schemes()
        if len(schemes) < 2:
            if self.choices is None:
                mixing = ", ".join(each.name for each in FORMATS if each.choices())
                told = f"method {self.chain} and format {self.format} have no two to choose from"
                raise SchemeError(f"choices: {told}", f"give two or more, or another format: {mixing}")
            told = f"there is nothing to choose but {next(iter(schemes))}" if schemes else "there are none"
            raise SchemeError(f"choices: {told}", "give two or more, such as choices: [int3, int4, int8]")
        for name, scheme in schemes.items():
            if isinstance(scheme, GgmlMixture):
                remedy = "write types of blocks, such as q4_k and q6_k"
                raise SchemeError(f"choices: {name} is a mixture of llama.cpp, which chooses by layer itself", remedy)
            try:
                if scheme is not None:
                    store.check(scheme)
            except SchemeError as error:
                able = [each.name for each in FORMATS if not each.read_only and _stores(each, scheme)]
                others = f"these do: {', '.join(able)}" if able else ""
                raise SchemeError(
                    f"choices: format {store.name} does not store {name}", others or error.remedy
                ) from error
        if self.runtime is not None:
            reason = store.refusal(self.runtime, [each for each in schemes.values() if each is not None])
            if reason:
                raise SchemeError(f"choices: {reason}", "leave out that choice, or the runtime")

    def given(self) -> dict[str, Any]:
        """The keys of the scheme that every choice of the variant's kind has."""
        return {key: value for key, value in super().given().items() if key != "bits"}

    def base_scheme(self) -> Scheme:
        """The first choice that is quantized; of an allocation that is given back what keys and format say."""
        found = next((scheme for scheme in self.choice_schemes().values() if scheme is not None), None)
        return make_scheme(self.scheme, self.given()) if found is None else found

    def choice_patches(self) -> dict[str, SchemePatch]:
        """By name the choices, as patches of the variant's scheme; ``scheme: float`` leaves a layer as it is.

        Nothing where an allocation is given back, which has its own.
        """
        return dict(self._named)

    def choice_schemes(self) -> dict[str, Scheme | None]:
        """By name their schemes; None leaves a layer as it is."""
        return {name: self._choice_scheme(patch) for name, patch in self._named.items()}

    @cached_property
    def _named(self) -> dict[str, SchemePatch]:
        if self.allocation is not None:
            return {}
        if self.choices is None:
            usual = {name: choice_patch(name) for name in FORMATS.get(self.format).choices(self.runtime)}
            return {name: patch for name, patch in usual.items() if self._suits(patch)}
        found: dict[str, SchemePatch] = {}
        schemes: list[Scheme | None] = []
        for each in self.choices:
            patch = choice_patch(each, FORMATS.get(self.format).name)
            scheme = self._choice_scheme(patch)
            name = FLOAT if scheme is None else each.strip().lower() if isinstance(each, str) else scheme.describe()
            if name in found or scheme in schemes:
                raise SchemeError(f"choices: {name} is given twice", "leave one out")
            schemes.append(scheme)
            found[name] = patch
        return found

    def _choice_scheme(self, patch: SchemePatch) -> Scheme | None:
        return None if patch.scheme == FLOAT else self._patched(patch)

    def _suits(self, patch: SchemePatch) -> bool:
        """Whether method, transforms and format take a choice."""
        if patch.scheme == FLOAT:
            return True
        try:
            scheme = self._patched(patch)
            FORMATS.get(self.format).check(scheme)
            self._steps.check(scheme)
            for spec in self.transforms:
                TRANSFORMS.get(spec.name).check(scheme)
        except SchemeError:
            return False
        return self.runtime is None or FORMATS.get(self.format).refusal(self.runtime, [scheme]) is None

    def _patches(self) -> dict[str, SchemePatch]:
        choices = {f"choices.{name}": patch for name, patch in self._named.items() if patch.scheme != FLOAT}
        return {**super()._patches(), **choices}


def choice_patch(given: str | Mapping[str, Any], store: str = DEFAULT_FORMAT) -> SchemePatch:
    """A choice as a patch of a scheme.

    Args:
        given: a name of a scheme, ``float``, or the keys of a patch.
        store: the format, whose usual choices messages tell.

    Raises:
        SchemeError: it is none.
    """
    if isinstance(given, str):
        try:
            kind = scheme_named(given)["scheme"]
        except SchemeError as error:
            near = did_you_mean(given, FORMATS.get(store).choices())
            raise SchemeError(f"choices: {error.problem}", near) from error
        if isinstance(make_scheme(kind, {}), PlainScheme):
            return SchemePatch.model_validate({"scheme": FLOAT})
    return parse_section(SchemePatch, patch_spelled(given), "choices")


def kind_of(choices: Any) -> str | None:
    """The kind of scheme of choices none of which is of the usual kind; None where one is, or a choice is mistaken."""
    try:
        kinds = [choice_patch(each).scheme or DEFAULT_KIND for each in choices or ()]
    except (QuantkitError, TypeError):
        return None  # the validator of the key says why, with its place
    kinds = [kind for kind in kinds if kind != FLOAT]
    return kinds[0] if kinds and DEFAULT_KIND not in kinds else None


def _stores(store: Any, scheme: Scheme | None) -> bool:
    try:
        if scheme is not None:
            store.check(scheme)
    except SchemeError:
        return False
    return True
