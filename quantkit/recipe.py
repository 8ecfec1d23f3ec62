"""The recipe: what the user asked for, validated and frozen.

A recipe is a YAML file with the sections of :class:`Recipe`. Unknown keys, wrong types and pairs that
cannot work are refused when it is read, before a model is touched, with the path of the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit.errors import QuantkitError, RecipeError, SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.methods.base import MethodOptions
from quantkit.report.gates import check_gate_syntax
from quantkit.schemes import IntScheme

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Metric = Literal["perplexity", "kl_divergence", "top1_agreement", "memory", "speed"]
METRICS: tuple[Metric, ...] = ("perplexity", "kl_divergence", "top1_agreement", "memory", "speed")
BUNDLED_TEXTS = ("prose", "answers")
MAX_RECIPE_BYTES = 1 << 20


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class ModelSpec(Section):
    """The model to quantize.

    Attributes:
        source: hub id (``org/name``), folder, GGUF file, or ``package:NAME/path/inside.gguf``.
        adapter: a LoRA adapter to merge first; not built yet, so it is refused.
        revision: branch, tag or commit of a hub model.
        dtype: float dtype of the checkpoint that is quantized; ``auto`` keeps the model's own.
        trust_remote_code: run Python code that comes with the model.
    """

    source: str
    adapter: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: bool = False

    @field_validator("adapter")
    @classmethod
    def _no_adapter_yet(cls, adapter: str | None) -> str | None:
        if adapter is not None:
            raise ValueError("this version does not merge adapters: merge with PEFT and give the merged folder")
        return adapter


class CalibrationSpec(Section):
    """The calibration set that every method of the recipe shares.

    Attributes:
        dataset: a name of ``calib_data/``, a file (JSON, JSONL, Parquet, text) or ``hub:org/name``.
        samples: records to use.
        max_length: tokens per row; longer records are truncated, which the audit counts.
        seed: order in which records are drawn.
        packing: ``none`` is one record a row, ``full`` fills each row to ``max_length``.
        chat_template: ``auto`` uses the model's where it has one, ``none`` joins the plain texts,
            anything else is a file that holds a Jinja template.
        inputs: ``quantized`` calibrates each layer on what the quantized layers before it give,
            ``float`` on the float model's activations, shared by all variants.
    """

    dataset: str = "alpaca_gpt4"
    samples: Annotated[int, Field(ge=1)] = 128
    max_length: Annotated[int, Field(ge=8)] = 512
    seed: int = 0
    packing: Literal["none", "full"] = "none"
    chat_template: str = "auto"
    inputs: Literal["quantized", "float"] = "quantized"


class SchemePatch(Section):
    """What an override may change for the layers whose names match its pattern."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


class VariantSpec(Section):
    """One choice of scheme, method and format.

    Attributes:
        name: its name in the report and its folder.
        method: how codes are chosen, a name of ``quantkit methods``.
        format: how they are stored, a name of ``quantkit formats``.
        bits, group_size, symmetric: the scheme; ``group_size: -1`` is one scale per channel.
        ignore: regular expressions of linear layers that stay float.
        overrides: regular expression to a patch of the scheme, first match wins.
        options: the method's own options; in YAML they stand beside the other keys.
    """

    name: Name
    method: str = "gptq"
    format: str = "compressed-tensors"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: dict[str, SchemePatch] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", "gptq")
        known = set(METHODS.get(method).Options.model_fields) if isinstance(method, str) else set()
        options = {key: given[key] for key in given if key in known}
        rest = {key: value for key, value in given.items() if key not in known}
        return {**rest, "options": {**rest.get("options", {}), **options}} if options else rest

    @field_validator("ignore")
    @classmethod
    def _ignore_compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            compiled(pattern)
        return patterns

    @model_validator(mode="after")
    def _check_pair(self) -> VariantSpec:
        method = METHODS.get(self.method)
        self.method_options()
        store = FORMATS.get(self.format)
        for scheme in self.schemes():
            method.check(scheme)
            store.check(scheme)
        return self

    def method_options(self) -> MethodOptions:
        """The method's options, validated, with its defaults filled in."""
        options: MethodOptions = METHODS.get(self.method).Options.model_validate(self.options)
        return options

    def schemes(self) -> list[IntScheme]:
        """Every scheme that a layer of this variant can get: the variant's, then one per override."""
        base = IntScheme(self.bits, self.group_size, self.symmetric)
        return [base, *(self._patched(base, pattern) for pattern in self.overrides)]

    def scheme_of(self, layer: str) -> IntScheme | None:
        """The scheme of a linear layer by its full name, or None where it stays float."""
        if any(compiled(pattern).search(layer) for pattern in self.ignore):
            return None
        base = self.schemes()[0]
        for pattern in self.overrides:
            if compiled(pattern).search(layer):
                return self._patched(base, pattern)
        return base

    def _patched(self, base: IntScheme, pattern: str) -> IntScheme:
        compiled(pattern)
        patch = self.overrides[pattern].model_dump(exclude_none=True)
        return IntScheme(**{"bits": base.bits, "group_size": base.group_size, "symmetric": base.symmetric, **patch})


class TextSpec(Section):
    """A text to score on: exactly one of ``bundled``, ``file`` and ``dataset``.

    Attributes:
        name: its name in the report, and in gates.
        bundled: ``prose`` or ``answers``, which ship with quantkit.
        file: a text file, or records as JSON, JSONL or Parquet.
        dataset: a hub data set, with ``config``, ``split``, ``column`` and ``revision``.
    """

    name: Name
    bundled: Literal["prose", "answers"] | None = None
    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given in BUNDLED_TEXTS:
                return {"name": given, "bundled": given}
            if "/" in given or "." in given:
                return {"name": re.sub(r"[^A-Za-z0-9._-]", "-", Path(given).stem), "file": given}
            raise ValueError(f"unknown text '{given}': {did_you_mean(given, BUNDLED_TEXTS)}, or a file's path")
        return given

    @model_validator(mode="after")
    def _one_origin(self) -> TextSpec:
        if sum(origin is not None for origin in (self.bundled, self.file, self.dataset)) != 1:
            raise ValueError("give exactly one of 'bundled', 'file' and 'dataset'")
        return self


class EvaluationSpec(Section):
    """How exported files are scored.

    Attributes:
        texts: what to score on.
        context_length: tokens per window; windows do not overlap.
        max_tokens: tokens scored per text at most.
        metrics: which figures to take.
        device: ``auto`` is CUDA where there is one.
        dtype: compute dtype; ``auto`` is float32 on CPU and the checkpoint's dtype on CUDA.
        reference_limit: bytes that the float model's stored log-probabilities may take, all texts together.
    """

    texts: Annotated[tuple[TextSpec, ...], Field(min_length=1)] = (
        TextSpec(name="prose", bundled="prose"),
        TextSpec(name="answers", bundled="answers"),
    )
    context_length: Annotated[int, Field(ge=16)] = 512
    max_tokens: Annotated[int, Field(ge=16)] = 8192
    metrics: tuple[Metric, ...] = METRICS
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    reference_limit: Annotated[int, Field(ge=1 << 20)] = 8 << 30

    @field_validator("texts")
    @classmethod
    def _names_differ(cls, texts: tuple[TextSpec, ...]) -> tuple[TextSpec, ...]:
        require_distinct([text.name for text in texts], "texts")
        return texts


class ReportSpec(Section):
    """Where results go and as what.

    Attributes:
        folder: everything of the run lies here; ``reports/NAME`` if not given. Relative to where quantkit is run.
        formats: which files are written; the JSON always is.
    """

    folder: str | None = None
    formats: tuple[Literal["html", "md", "json"], ...] = ("html", "md", "json")


class Recipe(Section):
    """One run: a model, a calibration set, variants, and how they are scored.

    Attributes:
        gates: conditions such as ``kl_divergence.prose.mean <= 0.05`` that every variant must meet.
    """

    name: Name
    model: ModelSpec
    calibration: CalibrationSpec = CalibrationSpec()
    defaults: dict[str, Any] = Field(default_factory=dict)
    variants: Annotated[tuple[VariantSpec, ...], Field(min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    report: ReportSpec = ReportSpec()
    gates: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        defaults, variants = given.get("defaults") or {}, given.get("variants")
        if not isinstance(defaults, Mapping) or not isinstance(variants, list | tuple):
            return given
        _check_default_keys(defaults, variants)
        filled = [
            {**_defaults_for(defaults, variant), **variant} if isinstance(variant, Mapping) else variant
            for variant in variants
        ]
        return {**given, "variants": filled}

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, variants: tuple[VariantSpec, ...]) -> tuple[VariantSpec, ...]:
        require_distinct([variant.name for variant in variants], "variants")
        return variants

    @model_validator(mode="after")
    def _gates_parse(self) -> Recipe:
        for gate in self.gates:
            check_gate_syntax(gate, [text.name for text in self.evaluation.texts])
        return self

    @property
    def folder(self) -> Path:
        """Where everything of the run lies."""
        return Path(self.report.folder) if self.report.folder else Path("reports") / self.name

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and validate a recipe file.

        Raises:
            RecipeError: the file is missing, not YAML, or not a valid recipe.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_RECIPE_BYTES:
                raise RecipeError(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes", "is this a recipe?")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}", "check the path") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not UTF-8 text", "is this a recipe?") from error
        return cls.parse(text, origin=str(path))

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Validate the text of a recipe; ``origin`` names it in messages.

        Raises:
            RecipeError: the text is not YAML or not a valid recipe.
        """
        try:
            given = yaml.load(text, Loader=_StrictLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"{origin} is not valid YAML: {error}") from error
        if not isinstance(given, dict):
            raise RecipeError(f"{origin} is not a mapping of keys to values", "start with 'name:' and 'model:'")
        return parse_section(cls, given, origin)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as JSON data, with every default and method option filled in."""
        data = self.model_dump(mode="json")
        for variant, spec in zip(data["variants"], self.variants, strict=True):
            variant["options"] = spec.method_options().model_dump(mode="json")
        return data


S = TypeVar("S", bound=BaseModel)


def parse_section(section: type[S], given: Mapping[str, Any], origin: str) -> S:
    """Validate ``given`` as a section; the first mistake becomes one line.

    Raises:
        RecipeError: with the path of the key, what is allowed, and the nearest match.
    """
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        raise _as_recipe_error(error, section, origin) from error
    except QuantkitError as error:
        raise RecipeError(f"{origin}: {error.problem}", error.remedy) from error


def require_distinct(names: list[str], what: str) -> None:
    """Raise ValueError if a name occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two {what} are called '{twice[0]}': names must differ")


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression from a recipe.

    Raises:
        SchemeError: it does not compile.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SchemeError(f"'{pattern}' is not a regular expression: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines could unfold to gigabytes) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, list | dict | set):
                raise yaml.YAMLError("a key must be a plain name")
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key '{key}' is given twice")
        return super().construct_mapping(node, deep)


def _defaults_for(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that apply to a variant: options of another method do not."""
    method = variant.get("method", defaults.get("method", "gptq"))
    if not isinstance(method, str):
        return dict(defaults)
    known = set(VariantSpec.model_fields) | set(METHODS.get(method).Options.model_fields)
    return {key: value for key, value in defaults.items() if key in known}


def _check_default_keys(defaults: Mapping[str, Any], variants: list[Any] | tuple[Any, ...]) -> None:
    known = set(VariantSpec.model_fields) - {"name"}
    for variant in variants:
        method = variant.get("method", defaults.get("method", "gptq")) if isinstance(variant, Mapping) else None
        if isinstance(method, str):
            known |= set(METHODS.get(method).Options.model_fields)
    for key in defaults:
        if key not in known:
            raise RecipeError(f"unknown key 'defaults.{key}'", did_you_mean(str(key), known))


def _as_recipe_error(error: ValidationError, section: type[BaseModel], origin: str) -> RecipeError:
    first = error.errors()[0]
    path = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(section, first["loc"][:-1])
        return RecipeError(f"{origin}: unknown key '{path}'", did_you_mean(str(first["loc"][-1]), known))
    if first["type"] == "missing":
        return RecipeError(f"{origin}: key '{path}' is missing")
    message = first["msg"].removeprefix("Value error, ")
    where = f"{origin}: {path}: " if path else f"{origin}: "
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
        return RecipeError(f"{where}'{first['input']}' is not allowed", did_you_mean(first["input"], allowed))
    return RecipeError(f"{where}{message}")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _keys_at(section: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """The keys allowed at a location of a recipe, for the remedy."""
    current: type[BaseModel] = section
    known = set(current.model_fields)
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        models = [] if field is None else _models_in(field.annotation)
        if models:
            current = models[0]
            known = set(current.model_fields)
    if current is VariantSpec:
        known |= {key for method in METHODS for key in method.Options.model_fields}
    return known


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
