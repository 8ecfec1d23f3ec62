"""A whole recipe: its sections, the defaults of its variants, and how it is read and written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from quantkit.errors import RecipeError, SchemeError, did_you_mean
from quantkit.gates import check_gate_syntax, parse_gate
from quantkit.methods.tuning import TUNE
from quantkit.recipe.evaluation import METRICS, EvaluationSpec, check_further_gate
from quantkit.recipe.fields import Name, Section, Title, require_distinct
from quantkit.recipe.implied import NAMES, implied
from quantkit.recipe.library import LibrarySpec, taken_keys
from quantkit.recipe.local_files import beside_recipe
from quantkit.recipe.memory_bounds import MaxMemory
from quantkit.recipe.mixing import OWN, AutoSpec, is_mixed
from quantkit.recipe.model import MergeSpec, ModelSpec
from quantkit.recipe.outputs import BudgetSpec, HistorySpec, ReportSpec, RetentionSpec, TrackingSpec, WebhookSpec
from quantkit.recipe.quantization import CalibrationSpec, QuantizationSpec
from quantkit.recipe.recovering import RECOVER, RecoverSpec
from quantkit.recipe.spelling import spelled
from quantkit.recipe.steps import DEFAULT_METHOD, option_names
from quantkit.recipe.variant import VariantSpec
from quantkit.schemes import DEFAULT_KIND, SCHEMES, scheme_keys
from quantkit.schemes.kinds import keys_of
from quantkit.system.memory_bounds import NO_BOUNDS
from quantkit.system.strict_yaml import parse_mapping
from quantkit.system.validation import located, parse_section
from quantkit.system.variables import escaped

MAX_RECIPE_BYTES = 1 << 20
MAX_GATE = 500
"""Characters of a gate."""


def _kind_of_variant(given: Any) -> str:
    """The tag of a variant by a key that tells its kind. Messages leave out what stands in brackets."""
    keys = given if isinstance(given, Mapping) else ()
    if isinstance(given, RecoverSpec) or RECOVER in keys:
        return "[RecoverSpec]"
    if isinstance(given, LibrarySpec) or "library" in keys:
        return "[LibrarySpec]"
    return "[AutoSpec]" if is_mixed(given) else "[VariantSpec]"


AnyVariant = Annotated[
    Annotated[VariantSpec, Tag("[VariantSpec]")]
    | Annotated[AutoSpec, Tag("[AutoSpec]")]
    | Annotated[LibrarySpec, Tag("[LibrarySpec]")]
    | Annotated[RecoverSpec, Tag("[RecoverSpec]")],
    Discriminator(_kind_of_variant),
]


class Recipe(Section):
    """One run: a model, a calibration set, variants, and how they are scored.

    Attributes:
        name: of the run, its folder and its history.
        title: what people read in its place; any text.
        max_memory: what the stages may take of each device, and where activations may wait on disk.
        gates: conditions such as ``kl_divergence.prose.mean <= 0.05`` that every variant must meet.
    """

    name: Name
    title: Title | None = None
    model: ModelSpec
    merge: MergeSpec = MergeSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    defaults: dict[str, Any] = Field(default_factory=dict)
    variants: Annotated[tuple[AnyVariant, ...], Field(min_length=1)]
    quantization: QuantizationSpec = QuantizationSpec()
    max_memory: MaxMemory = NO_BOUNDS
    evaluation: EvaluationSpec = EvaluationSpec()
    report: ReportSpec = ReportSpec()
    tracking: TrackingSpec = TrackingSpec()
    gates: tuple[Annotated[str, Field(max_length=MAX_GATE)], ...] = ()
    budget: BudgetSpec = BudgetSpec()
    history: HistorySpec = HistorySpec()
    retention: RetentionSpec = RetentionSpec()
    webhook: WebhookSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        defaults, variants = given.get("defaults") or {}, given.get("variants")
        if not isinstance(defaults, Mapping) or not isinstance(variants, list | tuple):
            return given
        with located():
            usual = spelled(defaults)
        own = [_as_written(variant) for variant in variants]
        with located():
            _check_default_keys(usual, own)
        return {**given, "variants": [_filled(defaults, usual, variant) for variant in own]}

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, variants: tuple[AnyVariant, ...]) -> tuple[AnyVariant, ...]:
        variants = tuple(
            each
            for variant in variants
            for each in (variant.expanded() if isinstance(variant, AutoSpec) else (variant,))
        )
        require_distinct([variant.name for variant in variants], "variants")
        before: list[str] = []
        for variant in variants:
            with located():
                if isinstance(variant, RecoverSpec) and variant.recover not in before:
                    problem = f"variant {variant.name}: no variant '{variant.recover}' comes before it"
                    raise RecipeError(problem, did_you_mean(variant.recover, before))
            before.append(variant.name)
        return variants

    @model_validator(mode="after")
    def _merge_fits(self) -> Recipe:
        row = f"merged-{self.merge.compare}"
        with located():
            if self.merge != MergeSpec() and not self.model.adapter:
                raise RecipeError("section 'merge' has no meaning without model.adapter", "give model.adapter")
            if self.merge.compare and any(variant.name == row for variant in self.variants):
                raise RecipeError(f"a variant is called '{row}', as the row of merge.compare is", "rename the variant")
        return self

    @field_validator("gates")
    @classmethod
    def _gates_fit(cls, gates: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        scoring, mistakes = info.data.get("evaluation"), []
        for gate in gates:
            try:
                _check_gate(gate, scoring)
            except RecipeError as error:
                mistakes.append(error)
        with located():
            if mistakes:
                raise RecipeError.together(mistakes)
        return gates

    def __repr__(self) -> str:
        variants = ", ".join(variant.name for variant in self.variants)
        return f"Recipe({self.name!r}, model={self.model.source!r}, variants: {variants})"

    @property
    def own_variants(self) -> tuple[VariantSpec, ...]:
        """The variants that quantkit quantizes itself."""
        return tuple(variant for variant in self.variants if isinstance(variant, VariantSpec))

    @property
    def library_variants(self) -> tuple[LibrarySpec, ...]:
        """The variants that one of the field's libraries quantizes."""
        return tuple(variant for variant in self.variants if isinstance(variant, LibrarySpec))

    @property
    def recover_variants(self) -> tuple[RecoverSpec, ...]:
        """The variants that are others, trained."""
        return tuple(variant for variant in self.variants if isinstance(variant, RecoverSpec))

    @property
    def folder(self) -> Path:
        """The folder of everything of the run."""
        return Path(self.report.folder) if self.report.folder else Path("reports") / self.name

    @property
    def history_file(self) -> Path:
        """The file in which runs are recorded, if they are."""
        return Path(self.history.file) if self.history.file else self.folder.parent / "history.sqlite"

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and validate a recipe file.

        Relative paths in it lead from the working folder, or where nothing lies there, from the recipe's.

        Raises:
            RecipeError: the file is missing, not YAML, or not a valid recipe.
        """
        path = Path(path)
        found = cls.parse(text_of(path, f"recipe {path}", "is this a recipe?"), origin=str(path))
        return beside_recipe(found, path.parent)

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Validate the text of a recipe; ``origin`` names it in messages.

        Variables of the environment stand for what they hold, see :mod:`quantkit.system.variables`.

        Raises:
            RecipeError: the text is not YAML or not a valid recipe; further mistakes are beside the first.
        """
        return parse_section(cls, parse_mapping(text, origin, os.environ), origin, text)

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from what people have of one: itself, its keys and values, or the path of its file.

        Raises:
            RecipeError: it is not a valid recipe.
        """
        if isinstance(given, Recipe):
            return given
        if isinstance(given, Mapping):
            return parse_section(cls, given, "recipe")
        return cls.load(given)

    def warnings(self) -> tuple[str, ...]:
        """Warnings of what can be run and is known to go badly, each with the name of its variant."""
        return tuple(f"variant {variant.name}: {text}" for variant in self.variants for text in variant.warnings())

    def to_yaml(self) -> str:
        """A recipe file that means the same: the defaults are merged into the variants, what is usual left out."""
        data = self.model_dump(mode="json", exclude={"defaults"}, exclude_defaults=True)
        return yaml.safe_dump(_without_variables(data), sort_keys=False, allow_unicode=True)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as JSON data, with every default, key of a scheme and method option filled in."""
        return {**self.model_dump(mode="json"), "variants": [variant.resolved() for variant in self.variants]}


def _without_variables(data: Any) -> Any:
    """Values in which nothing is a variable when they are read again."""
    if isinstance(data, dict):
        return {key: _without_variables(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_variables(value) for value in data]
    return escaped(data) if isinstance(data, str) else data


def text_of(path: Path, name: str, remedy: str) -> str:
    """The text of a recipe or of what may become one, which messages call ``name``.

    Raises:
        RecipeError: the file cannot be read, is larger than a recipe can be, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read {name}: {error.strerror}", "check the path") from error
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{name} is larger than {MAX_RECIPE_BYTES} bytes", remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text", remedy) from error


def _check_gate(gate: str, scoring: EvaluationSpec | None) -> None:
    """Refuse a gate that is none, or about what is not measured; ``scoring`` is None where that section is mistaken.

    Raises:
        RecipeError: with what is allowed.
    """
    read = parse_gate(gate)
    if scoring is None:
        return
    check_gate_syntax(gate, [text.name for text in scoring.texts])
    check_further_gate(read, scoring.tasks, scoring.answers)
    if read.metric in METRICS and read.metric not in scoring.metrics:
        raise RecipeError(f"gate '{gate}' needs {read.metric}", f"add {read.metric} to evaluation.metrics")


def _as_written(variant: Any) -> Any:
    """A variant with names as quantkit writes them; one with a mistake stays, and is told of when it is checked."""
    if not isinstance(variant, Mapping) or "library" in variant or RECOVER in variant:
        return variant
    try:
        return spelled(variant)
    except SchemeError:
        return variant


def _filled(defaults: Mapping[str, Any], usual: Mapping[str, Any], variant: Any) -> Any:
    """A variant with the defaults; what the name of a default scheme says goes with that scheme, and so with a method.

    Args:
        defaults: as they were written.
        usual: the same with names as quantkit writes them.
        variant: one of the recipe.
    """
    if not isinstance(variant, Mapping):
        return variant
    own = dict(usual)
    if "scheme" in variant:
        own = {key: usual[key] for key in usual if key in (TUNE, *defaults) and key != "scheme"}
    if "method" in variant and TUNE not in defaults:
        own.pop(TUNE, None)  # it was the end of the name of another method
    filled = {**_defaults_for(own, variant), **variant}
    if variant.get(TUNE) is True and isinstance(defaults.get(TUNE), Mapping):
        filled[TUNE] = defaults[TUNE]
    return filled


def _defaults_for(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that apply to a variant: not the options of another method or the keys of another scheme."""
    known = _keys_taken(defaults, variant)
    return {key: value for key, value in defaults.items() if key in known}


def _check_default_keys(defaults: Mapping[Any, Any], variants: Sequence[Any]) -> None:
    """Refuse the defaults that no variant could take.

    Raises:
        RecipeError: with the nearest key that one could.
    """
    known = _scheme_free_keys()
    for variant in variants:
        if isinstance(variant, Mapping):
            known |= _keys_taken(defaults, variant)
    known -= {"name", "options", "library"}
    for key in defaults:
        if key in scheme_keys() and key not in known:
            kinds = ", ".join(kind for kind in SCHEMES.names() if key in keys_of(kind))
            raise RecipeError(f"defaults.{key}: no variant has a scheme that takes it", f"these do: {kinds}")
        if key not in known:
            raise RecipeError(f"unknown key 'defaults.{key}'", did_you_mean(str(key), known))


def _keys_taken(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> set[str]:
    """The keys that a variant as written takes; a library's method is its own affair, so no default gives it."""
    if RECOVER in variant:
        return set(RecoverSpec.model_fields) - {RECOVER, "title"}
    if "library" in variant:
        return taken_keys(variant["library"], variant.get("method")) - {"method", *_auto_bits(defaults)}
    names_one = any(variant.get(key) is not None for key in ("bits", "scheme"))
    mixed = is_mixed(variant) or (is_mixed(defaults) and not names_one)
    own = {key: variant[key] for key in scheme_keys() if key in variant and not (mixed and key == "bits")}
    named = {name: each[name] for each in (defaults, variant) for name in NAMES if name in each}
    choices = {"method": DEFAULT_METHOD, "scheme": DEFAULT_KIND, **implied({**named, **own})}
    taken = _scheme_free_keys() | _scheme_keys(choices["scheme"]) | option_names(choices["method"])
    taken = taken | {"bits", *_mixed_keys(variant)} if mixed else taken - _auto_bits(defaults)
    return taken - ({TUNE} if choices["method"] == "none" else set())


def _auto_bits(defaults: Mapping[str, Any]) -> set[str]:
    """``bits``, where the default is ``auto``, which says nothing to a variant of one scheme."""
    return {"bits"} if is_mixed(defaults) else set()


def _mixed_keys(variant: Mapping[str, Any]) -> set[str]:
    """The keys of a mixed variant alone; of one that an allocation is given back for, not those that it leaves out."""
    return {"allocation", "runtime"} if variant.get("allocation") is not None else {*OWN}


def _scheme_free_keys() -> set[str]:
    return set(VariantSpec.model_fields) - set(scheme_keys())


def _scheme_keys(kind: object) -> set[str]:
    """The keys of a kind of scheme; all of them for what is none, which the field's own validator reports."""
    return set(keys_of(kind) if isinstance(kind, str) and kind in SCHEMES else scheme_keys())
