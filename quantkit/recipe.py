"""The recipe: what the user asked for, validated and frozen.

A recipe is a YAML file with the sections of :class:`Recipe`. Unknown keys, wrong types and pairs that
cannot work are refused when it is read, before a model is touched, with the path of the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.errors import RecipeError, SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.methods.base import MethodOptions
from quantkit.report.gates import check_gate_syntax, parse_gate
from quantkit.schemes import IntScheme
from quantkit.strict_yaml import parse_mapping
from quantkit.validation import located, parse_section, unknown_key

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Metric = Literal["perplexity", "kl_divergence", "top1_agreement", "memory", "speed"]
COMPARING_METRICS: tuple[Metric, ...] = ("kl_divergence", "top1_agreement")
METRICS: tuple[Metric, ...] = ("perplexity", "kl_divergence", "top1_agreement", "memory", "speed")
BUNDLED_TEXTS = ("prose", "answers")
DEFAULT_METHOD = "gptq"
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
    trust_remote_code: Flag = False

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
    samples: Annotated[Whole, Field(ge=1)] = 128
    max_length: Annotated[Whole, Field(ge=8)] = 512
    seed: Whole = 0
    packing: Literal["none", "full"] = "none"
    chat_template: str = "auto"
    inputs: Literal["quantized", "float"] = "quantized"


class SchemePatch(Section):
    """What an override may change for the layers whose names match its pattern."""

    bits: Whole | None = None
    group_size: Whole | None = None
    symmetric: Flag | None = None


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
    method: str = DEFAULT_METHOD
    format: str = "compressed-tensors"
    bits: Whole = 4
    group_size: Whole = 64
    symmetric: Flag = True
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: dict[str, SchemePatch] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", DEFAULT_METHOD)
        if method in METHODS.names():
            _check_keys(given, method)
        known = _option_names(method)
        options = {key: given[key] for key in given if key in known}
        rest = {key: value for key, value in given.items() if key not in known}
        apart = rest.get("options", {})
        return {**rest, "options": {**apart, **options}} if options and isinstance(apart, Mapping) else rest

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: str) -> str:
        with located():
            METHODS.get(method)
        return method

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str) -> str:
        with located():
            FORMATS.get(name)
        return name

    @field_validator("ignore")
    @classmethod
    def _ignore_compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        with located():
            for pattern in patterns:
                compiled(pattern)
        return patterns

    @field_validator("overrides")
    @classmethod
    def _overrides_compile(cls, overrides: dict[str, SchemePatch]) -> dict[str, SchemePatch]:
        with located():
            for pattern in overrides:
                compiled(pattern)
        return overrides

    @model_validator(mode="after")
    def _check_pair(self) -> VariantSpec:
        self.method_options()
        with located():
            for scheme in self.schemes():
                METHODS.get(self.method).check(scheme)
                FORMATS.get(self.format).check(scheme)
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
    context_length: Annotated[Whole, Field(ge=16)] = 512
    max_tokens: Annotated[Whole, Field(ge=16)] = 8192
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = METRICS
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    reference_limit: Annotated[Whole, Field(ge=1 << 20)] = 8 << 30

    @property
    def compares(self) -> bool:
        """Whether a metric needs the float model's log-probabilities."""
        return any(metric in COMPARING_METRICS for metric in self.metrics)

    @field_validator("texts")
    @classmethod
    def _names_differ(cls, texts: tuple[TextSpec, ...]) -> tuple[TextSpec, ...]:
        require_distinct([text.name for text in texts], "texts")
        return texts

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"'{device}' is not a device: use auto, cpu, cuda or cuda:N")
        return device


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
        with located():
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
        metrics = self.evaluation.metrics
        with located():
            for gate in self.gates:
                check_gate_syntax(gate, [text.name for text in self.evaluation.texts])
                metric = parse_gate(gate).metric
                if metric in METRICS and metric not in metrics:
                    raise RecipeError(f"gate '{gate}' needs {metric}", f"add {metric} to evaluation.metrics")
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
            with path.open("rb") as file:
                content = file.read(MAX_RECIPE_BYTES + 1)
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}", "check the path") from error
        if len(content) > MAX_RECIPE_BYTES:
            raise RecipeError(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes", "is this a recipe?")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not UTF-8 text", "is this a recipe?") from error
        return cls.parse(text, origin=str(path))

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Validate the text of a recipe; ``origin`` names it in messages.

        Raises:
            RecipeError: the text is not YAML or not a valid recipe.
        """
        return parse_section(cls, parse_mapping(text, origin), origin)

    def to_yaml(self) -> str:
        """A recipe file that means the same: the defaults are merged into the variants, what is usual left out."""
        data = self.model_dump(mode="json", exclude={"defaults"}, exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as JSON data, with every default and method option filled in."""
        data = self.model_dump(mode="json")
        for variant, spec in zip(data["variants"], self.variants, strict=True):
            variant["options"] = spec.method_options().model_dump(mode="json")
        return data


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
    except (re.error, RecursionError, OverflowError) as error:
        raise SchemeError(f"'{pattern}' is not a regular expression: {error}") from error


def _option_names(method: object) -> set[str]:
    """The options of a method; none for what is not a method, which the field's own validator reports."""
    if not isinstance(method, str) or method not in METHODS.names():
        return set()
    return set(METHODS.get(method).Options.model_fields)


def _check_keys(given: Mapping[Any, Any], method: object) -> None:
    """Refuse the keys that neither a variant nor its method has."""
    known = set(VariantSpec.model_fields) | _option_names(method)
    for key in given:
        if isinstance(key, str) and key not in known:
            owners = [name for name in METHODS.names() if key in _option_names(name)]
            foreign = f"it is an option of {', '.join(owners)}, and the method is {method}" if owners else ""
            raise unknown_key(key, known, foreign)


def _defaults_for(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that apply to a variant: options of another method do not."""
    known = set(VariantSpec.model_fields) | _option_names(_method_of(variant, defaults))
    return {key: value for key, value in defaults.items() if key in known}


def _check_default_keys(defaults: Mapping[Any, Any], variants: Sequence[Any]) -> None:
    """Refuse the defaults that no variant could take."""
    methods = [_method_of(variant, defaults) for variant in variants if isinstance(variant, Mapping)]
    known = (set(VariantSpec.model_fields) - {"name", "options"}).union(*map(_option_names, methods))
    for key in defaults:
        if key not in known:
            raise RecipeError(f"unknown key 'defaults.{key}'", did_you_mean(str(key), known))


def _method_of(variant: Mapping[str, Any], defaults: Mapping[str, Any]) -> object:
    return variant.get("method", defaults.get("method", DEFAULT_METHOD))
