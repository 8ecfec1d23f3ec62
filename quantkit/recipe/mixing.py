"""Mixed schemes: a variant with ``bits: auto``, whose layers get the choices that lose least within a budget.

It says what there is to choose from and what the file may take. Which layer gets what is measured; from that
:meth:`AutoSpec.with_choice` makes a variant as people would write it, with overrides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import TypeAdapter, model_validator

from quantkit.errors import RecipeError, SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.recipe.fields import Name
from quantkit.recipe.implied import DEFAULT_FORMAT, implied
from quantkit.recipe.layer_patterns import patterns_of
from quantkit.recipe.mix_budget import BUDGETS, MixBudget, budget_of
from quantkit.recipe.mix_choices import ChoosingSpec, kind_of
from quantkit.recipe.scheme import SchemePatch, written_keys
from quantkit.recipe.scheme_names import preset_named
from quantkit.recipe.spelling import spelled
from quantkit.recipe.steps import gathered
from quantkit.recipe.variant import HEAD, VariantSpec
from quantkit.schemes import Scheme, make_scheme
from quantkit.system.validation import located, parse_section

AUTO = "auto"
OWN = ("budget", "choices", "runtime", "allocation")
"""Keys of a variant with ``bits: auto`` alone."""
UNSHARED = "q4_k"
"""A type of block whose name no preset of llama.cpp has."""
TELLING = ("budget", "choices", "allocation")
"""Those that a variant has which means ``bits: auto`` and does not say it."""


class ChosenUnit(Protocol):
    """Layers that get one choice."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their full names."""

    @property
    def weights(self) -> int:
        """How many they have."""


class Chosen(Protocol):
    """What :class:`quantkit.allocation.table.Allocation` has."""

    @property
    def choices(self) -> Mapping[str, Mapping[str, Any]]:
        """By name the keys of a patch."""

    @property
    def units(self) -> Sequence[ChosenUnit]:
        """What was chosen for."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """A name for each unit."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """``embedding`` and ``head``: their names in the checkpoint, where they take part."""


class AutoSpec(ChoosingSpec):
    """A variant that is mixed to a budget.

    Keys of a scheme beside ``bits: auto``, such as ``group_size``, are those of every choice of the variant's kind.
    Layers that ``ignore``, ``overrides``, ``first_blocks`` or ``last_blocks`` name take no part.

    Attributes:
        budget: what it may take; None where an allocation is given back.
        front: further budgets, each of which becomes a variant; see :meth:`expanded`.
    """

    bits: Literal["auto"]
    budget: MixBudget | None = None
    front: tuple[MixBudget, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        with located():
            read = gathered(_read(given), set(cls.model_fields) - {"front"})
            budgets = given.get("budget")
            if isinstance(budgets, list | tuple):
                if not budgets:
                    raise RecipeError("budget is an empty list", BUDGETS)
                front = tuple(budget_of(each, f"budget[{place}]") for place, each in enumerate(budgets))
                return {**read, "budget": front[0], "front": front}
            return read

    def _check(self) -> None:
        """Refuse what does not go together, the budget and the choices first."""
        if self.allocation is None:
            if self.budget is None:
                raise RecipeError("bits: auto needs a budget", BUDGETS)
            self._check_choices()
        for key in ("budget", "choices"):
            if self.allocation is not None and getattr(self, key) is not None:
                raise RecipeError(f"{key} has no meaning beside allocation", f"leave out {key}: all is chosen")
        super()._check()

    def __repr__(self) -> str:
        told = self.allocation or (self.budget and self.budget.describe())
        return f"AutoSpec({self.name!r}: {self.chain}, {told}, {self.format})"

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens are asked for: always, to measure with, unless an allocation is given back."""
        return self.allocation is None or super().calibrated

    @property
    def embeddings_take_part(self) -> bool:
        """Whether the input embedding is among the layers that are chosen for, and a head that is tied to it."""
        return FORMATS.get(self.format).shares_head and self.embeddings is None

    def takes_part(self, layer: str, block: int | None = None, blocks: int = 0, path: str | None = None) -> bool:
        """Whether a layer is chosen for, as no key of the variant says what becomes of it; see :meth:`scheme_of`."""
        if self.ignores(layer) or (path and self.ignores(path)) or self.override_of(layer, path) is not None:
            return False
        first, last = self.first_blocks, self.last_blocks
        if block is None:
            return True
        return not (first and block < first.count) and not (last and block >= blocks - last.count)

    def expanded(self) -> tuple[AutoSpec, ...]:
        """A variant for each budget, which is also in its name: ``mix-3.5``, ``mix-5GiB``; itself where it has one."""
        if not self.front:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "name": TypeAdapter(Name).validate_python(f"{self.name}-{budget.label}"),
                    "title": self.title and f"{self.title}, {budget.describe()}",
                    "budget": budget,
                    "front": (),
                }
            )
            for budget in self.front
        )

    def uniform(self, name: str, *, tied: bool = False) -> VariantSpec:
        """The variant in which every layer that takes part and that it suits gets one choice, however few they are.

        Args:
            name: of a choice that is quantized.
            tied: the model's head and embedding are one weight, which is quantized as the embedding then.

        Raises:
            SchemeError: there is no such choice, or it leaves layers as they are.
        """
        scheme = self.choice_schemes().get(name)
        if scheme is None:
            names = [each for each, found in self.choice_schemes().items() if found is not None]
            raise SchemeError(f"no choice that is quantized is called '{name}'", did_you_mean(name, names))
        both = self.embeddings_take_part
        base = _unshared(scheme)
        found = self._plain(
            base,
            overrides={} if base == scheme else {".": written_keys(scheme)},
            ignore=(*self.ignore, *([HEAD] if tied and both and not self.ignores(HEAD) else [])),
            embeddings=written_keys(scheme) if both else None,
        )
        return found.model_copy(update={"strict": False, "allow_float": True, "kv_cache": None})

    def stand_in(self) -> VariantSpec:
        """The variant in its first choice alone, which takes about as long to make as any; see :meth:`uniform`."""
        for name, scheme in self.choice_schemes().items():
            if scheme is not None:
                return self.uniform(name)
        return self._plain(self.base_scheme(), ignore=self.ignore, embeddings=None)

    def with_choice(self, allocation: Chosen) -> VariantSpec:
        """The variant in which each layer gets what was chosen for it.

        Args:
            allocation: see :class:`quantkit.allocation.table.Allocation`.

        Raises:
            RecipeError: a choice of it is no patch of a scheme.
            SchemeError: method or format do not take one.
        """
        schemes: dict[str, Scheme | None] = {}
        for name, keys in allocation.choices.items():
            place = f"allocation: choices.{name}"
            try:
                schemes[name] = self._choice_scheme(parse_section(SchemePatch, keys, place))
            except SchemeError as error:
                raise SchemeError(f"{place}: {error.problem}", error.remedy) from error
        by_choice: dict[Scheme | None, list[str]] = {}
        weights: dict[Scheme | None, int] = {}
        for unit, name in zip(allocation.units, allocation.chosen, strict=True):
            by_choice.setdefault(schemes[name], []).extend(unit.layers)
            weights[schemes[name]] = weights.get(schemes[name], 0) + unit.weights
        quantized = [scheme for scheme in weights if scheme is not None]
        if not quantized:
            raise SchemeError(
                f"{self.name}: every layer is chosen to stay float, so that none is quantized",
                "choose another scheme for one, or use format: float",
            )
        base = _unshared(max(quantized, key=lambda scheme: weights[scheme]))
        embedding, head = allocation.facts.get("embedding"), allocation.facts.get("head")
        every = [layer for layers in by_choice.values() for layer in layers]
        embedded = next((scheme for scheme, layers in by_choice.items() if embedding in layers), None)
        apart = {
            scheme: patterns_of([name for name in layers if name != embedding], every)
            for scheme, layers in by_choice.items()
        }
        left = [HEAD] if embedding in every and head not in every and not self.ignores(HEAD) else []
        return self._plain(
            base,
            ignore=(*self.ignore, *left, *apart.pop(None, [])),
            overrides={
                pattern: _beside(base, scheme)
                for scheme, patterns in apart.items()
                if scheme is not None and scheme != base
                for pattern in patterns
            },
            embeddings=None if embedded is None else written_keys(embedded),
        )

    def _plain(
        self,
        base: Scheme,
        *,
        ignore: Sequence[str],
        overrides: Mapping[str, Any] | None = None,
        embeddings: Mapping[str, Any] | None,
    ) -> VariantSpec:
        """The variant in a scheme, with what its own keys say of layers that take no part written out."""
        own = {f"overrides.{pattern}": pattern for pattern in self.overrides}
        fixed = {key: written_keys(self._patched(patch)) for key, patch in VariantSpec._patches(self).items()}
        given = self.embedding_scheme()
        blocks = {
            key: {"count": patch.count, **fixed[key]}
            for key, patch in (("first_blocks", self.first_blocks), ("last_blocks", self.last_blocks))
            if patch is not None
        }
        names = ("name", "title", "transforms", "method", "tune", "format", "strict", "allow_float", "options")
        keys = {
            **{name: getattr(self, name) for name in names},
            "kv_cache": self.kv_cache,
            **written_keys(base),
            **blocks,
            "ignore": tuple(ignore),
            "overrides": {**{pattern: fixed[key] for key, pattern in own.items()}, **(overrides or {})},
            "embeddings": embeddings if given is None else written_keys(given),
        }
        return parse_section(VariantSpec, keys, self.name)

    def resolved(self) -> dict[str, Any]:
        """The variant as JSON data, with every default filled in; its choices by their names."""
        found = super().resolved()
        given = {key: "none" if value is None else value for key, value in self.given().items()}
        left = {*written_keys(self.base_scheme()), "front"}
        rest = {key: value for key, value in found.items() if key not in left}
        choices = list(self._named) if self.choices is None else list(self.choices)
        return {**rest, "scheme": self.scheme, **given, "bits": AUTO, "choices": choices or None}


def is_mixed(given: Any) -> bool:
    """Whether a variant, as it is written or read, is mixed to a budget."""
    if not isinstance(given, Mapping):
        return isinstance(given, AutoSpec)
    bits = given.get("bits")
    return (isinstance(bits, str) and bits.strip().lower() == AUTO) or any(
        given.get(key) is not None for key in TELLING
    )


def spec_class(given: Mapping[str, Any]) -> type[VariantSpec]:
    """What reads the keys of a variant that quantkit quantizes itself."""
    return AutoSpec if is_mixed(given) else VariantSpec


def _read(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """A variant as written, with what it implies."""
    bits = given.get("bits")
    if bits is not None and str(bits).strip().lower() != AUTO:
        key = next(key for key in TELLING if given.get(key) is not None)
        raise RecipeError(f"{key} says that bits are chosen, and bits: {bits} stands beside it", "write bits: auto")
    own = {key: given[key] for key in OWN if given.get(key) is not None}
    rest = {key: value for key, value in given.items() if key not in (*OWN, "bits")}
    if rest.get("scheme") is None and (kind := kind_of(own.get("choices"))) is not None:
        rest["scheme"] = kind
    read = implied(spelled(rest))
    store = read.get("format", DEFAULT_FORMAT)
    if given.get("ignore") is None and store in FORMATS and FORMATS.get(store).shares_head:
        read["ignore"] = ()
    return {**read, **own, "bits": AUTO}


def _unshared(scheme: Scheme) -> Scheme:
    """A scheme that a variant as a whole can have, whose name would mean a preset of llama.cpp otherwise."""
    return scheme if preset_named(scheme.kind) == scheme.kind else make_scheme(UNSHARED, {})


def _beside(base: Scheme, scheme: Scheme) -> dict[str, Any]:
    """The keys of a patch that makes ``scheme`` of ``base``."""
    keys, others = written_keys(scheme), written_keys(base)
    if scheme.kind != base.kind:
        return keys
    return {key: value for key, value in keys.items() if others[key] != value}
