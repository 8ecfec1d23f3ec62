"""A variant: one choice of scheme, method and format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.methods.base import Method, MethodOptions, Statistic, input_needs
from quantkit.methods.tuning import TUNE, TuneOptions
from quantkit.recipe.fields import Flag, Name, Patterns, Section, Title, compiled
from quantkit.recipe.implied import DEFAULT_FORMAT, check_pair, implied, keys_beside
from quantkit.recipe.scheme import BlocksPatch, SchemeKeys, SchemePatch, known_kind, written_keys
from quantkit.recipe.spelling import entry_called, spelled
from quantkit.recipe.steps import DEFAULT_METHOD, Steps, TransformSpec, gathered, steps_of
from quantkit.schemes import DEFAULT_KIND, Scheme, make_scheme
from quantkit.system.validation import located
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Transform

HEAD = "lm_head"
"""The output head, whatever a model calls it."""


class Choice(Section):
    """The names that a variant chooses: method, format, and kind of scheme."""

    name: Name
    title: Title | None = None
    method: str = DEFAULT_METHOD
    format: str = DEFAULT_FORMAT
    scheme: str = DEFAULT_KIND

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: str) -> str:
        with located():
            if "+" not in method:
                entry_called(method, METHODS)
            steps_of(method)
        return method

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str) -> str:
        with located():
            return entry_called(name, FORMATS)

    @field_validator("scheme")
    @classmethod
    def _scheme_exists(cls, kind: str) -> str:
        return known_kind(kind)


class VariantSpec(SchemeKeys, Choice):
    """One choice of scheme, method and format.

    Attributes:
        name: its name in the report and its folder.
        title: what people read in its place; any text.
        transforms: what changes the weights first, names of ``quantkit methods`` or mappings with options.
        method: how codes are chosen, a name of ``quantkit methods``; ``awq+gptq`` puts a transform before it, and
            ``gptq+tune`` is short for ``tune: true``.
        tune: polish each block when its layers are solved; ``true``, or a mapping of options.
        format: how they are stored, a name of ``quantkit formats``.
        scheme: which numbers a weight can become, a kind of ``quantkit methods``; its keys stand beside it, see
            :class:`quantkit.recipe.scheme.SchemeKeys`.
        ignore: regular expressions of linear layers that stay float.
        overrides: regular expression to a patch of the scheme, first match wins.
        first_blocks, last_blocks: a patch of the scheme for so many decoder blocks, where no override matches.
        embeddings: a patch of the scheme for the input embedding; None keeps it float.
        strict: whether a layer whose shape suits neither scheme nor format stops the variant, and does not stay float.
        allow_float: whether more than half of the weights of the blocks may be in no layer that can be quantized.
        kv_cache: in what servers store keys and values, by scales that are calibrated; None leaves that to them.
        options: the method's own options; in YAML they stand beside the other keys.
    """

    transforms: tuple[TransformSpec, ...] = ()
    tune: TuneOptions | None = None
    ignore: Patterns = (HEAD,)
    overrides: dict[str, SchemePatch] = Field(default_factory=dict)
    first_blocks: BlocksPatch | None = None
    last_blocks: BlocksPatch | None = None
    embeddings: SchemePatch | None = None
    strict: Flag = False
    allow_float: Flag = False
    kv_cache: Literal["fp8", "fp8_head", "int8", "int8_head"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        with located():
            return gathered(implied(spelled(given)), cls.model_fields)

    @field_validator("tune", mode="before")
    @classmethod
    def _tune_may_be_a_flag(cls, given: Any) -> Any:
        return ({} if given else None) if isinstance(given, bool) else given

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
            self._check()
        return self

    def _check(self) -> None:
        """Refuse what does not go together.

        Raises:
            SchemeError: with the key and the way out.
        """
        store = FORMATS.get(self.format)
        if {"method", "format"} <= self.model_fields_set:
            check_pair(self.method, self.format)
        self._check_transforms()
        self._check_tuning()
        if self.kv_cache is not None and self.kv_cache not in store.caches:
            able = ", ".join(each.name for each in FORMATS if self.kv_cache in each.caches)
            raise SchemeError(
                f"kv_cache: the {store.name} format does not say how servers store keys and values",
                f"use format {able}, or leave it out and tell the server",
            )
        for place, patch in {"": None, **self._patches()}.items():
            with _placed(place):
                scheme = self._patched(patch)
                for spec in self.transforms:
                    TRANSFORMS.get(spec.name).check(scheme)
                self._steps.check(scheme)
                store.check(scheme)
                self._check_order(scheme)
        with _placed("embeddings"):
            embedding = self.embedding_scheme()
            if embedding is not None:
                self._steps.check(embedding)
                store.check_embedding(embedding)
                if embedding.orders_columns:
                    raise SchemeError("an embedding has no inputs to order columns by", "add desc_act: false")
        store.check_together(self.schemes())

    def _check_order(self, scheme: Scheme) -> None:
        if scheme.orders_columns and not self.build_method().needs:
            raise SchemeError(
                f"desc_act orders columns by their inputs, and method {self.method} asks for no calibration",
                "leave out desc_act, or use a method that is calibrated, such as gptq",
            )

    def __repr__(self) -> str:
        return f"VariantSpec({self.name!r}: {self.chain}, {self.base_scheme().describe()}, {self.format})"

    def method_options(self) -> MethodOptions:
        """The options of the method and of the transforms that it brings, validated, with defaults filled in."""
        options: MethodOptions = self._steps.Options.model_validate(self.options)
        return options

    def build_method(self) -> Method:
        """The method with this variant's options."""
        return self._steps.build_method(self.method_options())

    def build_transforms(self) -> tuple[Transform, ...]:
        """The transforms that change the weights before the method, in order."""
        own = tuple(spec.build() for spec in self.transforms)
        return own + self._steps.build_transforms(self.method_options())

    @property
    def parts_tied(self) -> bool:
        """Whether transforms may make two weights of one that the head and the embedding share."""
        return any(transform.parts_tied for transform in self.build_transforms())

    @property
    def turns(self) -> bool:
        """Whether runtimes must turn the inputs of layers."""
        return any(transform.online for transform in self.build_transforms())

    @property
    def mixing(self) -> str:
        """The transforms of a calibrated variant that mixes channels or learns, with their options; empty for none."""
        transforms = self.build_transforms()
        if not self.calibrated or not any(transform.mixes or transform.learns for transform in transforms):
            return ""
        return str([(transform.name, transform.options) for transform in transforms])

    def needs(self) -> frozenset[Statistic]:
        """The statistics of inputs that the method, the transforms and static scales of inputs ask for."""
        own = self.build_method().needs.union(*(transform.needs for transform in self.build_transforms()))
        return own | input_needs(self.schemes())

    @property
    def chain(self) -> str:
        """The transforms, the method and whether it tunes in one word, such as ``awq+gptq+tune``."""
        tuned = [] if self.tune is None else [TUNE]
        return "+".join([*(spec.name for spec in self.transforms), self.method, *tuned])

    @property
    def _steps(self) -> Steps:
        return steps_of(self.method)

    def _check_transforms(self) -> None:
        """Refuse a transform that the method brings itself, or one before a method that solves nothing."""
        brought = {transform.name for transform in self._steps.transforms}
        store, online = FORMATS.get(self.format), [each.name for each in self.build_transforms() if each.online]
        if online and not store.turning:
            able = ", ".join(each.name for each in FORMATS if each.turning)
            raise SchemeError(
                f"transforms: {online[0]} needs a runtime that turns inputs, which a {store.name} file cannot ask for",
                f"use format {able}, or leave out {online[0]}",
            )
        for spec in self.transforms:
            if spec.name in brought:
                raise SchemeError(
                    f"transforms: method {self.method} brings {spec.name} itself",
                    "leave it out; its options stand beside the method",
                )
        if self.build_transforms() and self._steps.method.name == "none":
            raise SchemeError(
                "transforms: method none solves no layer for which weights could be changed", "leave it out"
            )

    def _check_tuning(self) -> None:
        """Refuse to tune where no scheme has anything that can be trained."""
        tuned = self.tune
        if tuned is None or any(tuned.trains(scheme) for scheme in self.schemes()):
            return
        trained = " or ".join([*tuned.train, *(["roundings"] if tuned.rounding else [])])
        raise SchemeError(
            f"{TUNE}: {self.base_scheme().describe()} has no {trained} that can be trained",
            f"leave out {TUNE}, or use a scheme such as int, whose scales are free",
        )

    def base_scheme(self) -> Scheme:
        """The scheme of a layer that no pattern and no choice of blocks concerns."""
        return make_scheme(self.scheme, self.given())

    def embedding_scheme(self) -> Scheme | None:
        """The scheme of the input embedding, or None where it stays float."""
        return None if self.embeddings is None else self._patched(self.embeddings)

    def schemes(self) -> list[Scheme]:
        """Every scheme that a linear layer of this variant can get, the base first, each once."""
        patched = [self._patched(patch) for patch in self._patches().values()]
        return list(dict.fromkeys([self.base_scheme(), *patched]))

    def scheme_of(
        self, layer: str, block: int | None = None, blocks: int = 0, path: str | None = None
    ) -> Scheme | None:
        """The scheme of a linear layer, or None where it stays float.

        What is ignored comes first, then the overrides, then the first and the last blocks.

        Args:
            layer: its name in the checkpoint.
            block: index of the decoder block that holds it; None outside the blocks.
            blocks: number of decoder blocks.
            path: its name in the model, where that is another; a pattern may mean either.
        """
        if self.ignores(layer) or (path and self.ignores(path)):
            return None
        pattern = self.override_of(layer, path)
        if pattern is not None:
            return self._patched(self.overrides[pattern])
        if block is not None and self.first_blocks is not None and block < self.first_blocks.count:
            return self._patched(self.first_blocks)
        if block is not None and self.last_blocks is not None and block >= blocks - self.last_blocks.count:
            return self._patched(self.last_blocks)
        return self.base_scheme()

    def ignores(self, name: str) -> bool:
        """Whether a pattern of ``ignore`` names a layer; the output head is also called :data:`HEAD`."""
        return any(compiled(pattern).search(name) for pattern in self.ignore)

    def override_of(self, layer: str, path: str | None = None) -> str | None:
        """The first pattern of the overrides that names a layer, by either of its names; None where there is none."""
        names = {layer, path or layer}
        return next((each for each in self.overrides if any(compiled(each).search(name) for name in names)), None)

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens are asked for: by the method, a transform, tuning, or static scales."""
        return bool(self.needs()) or self.tune is not None or self.kv_cache is not None

    def implied_by(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """What follows from the names that were given, as a line; nothing where the rest is as usual.

        Args:
            given: method, format and scheme as they were written; None or nothing for what was not.
        """
        usual = {"method": DEFAULT_METHOD, "format": DEFAULT_FORMAT, "scheme": DEFAULT_KIND}
        found = [f"{name} {getattr(self, name)}" for name in usual if given.get(name) is None]
        told = [f"{name} {value}" for name, value in usual.items()]
        return (f"implied: {', '.join(found)}",) if set(found) - set(told) else ()

    def warnings(self) -> tuple[str, ...]:
        """The method's warnings of this variant's schemes."""
        method = self._steps.method
        return tuple(dict.fromkeys(text for scheme in self.schemes() for text in method.warnings(scheme)))

    def resolved(self) -> dict[str, Any]:
        """The variant as JSON data, with every key of its scheme and every option of its method filled in.

        It has ``tune`` where it tunes, and ``kv_cache`` where it says that.
        """
        unsaid = [key for key in (TUNE, "kv_cache") if getattr(self, key) is None]
        left = {*SchemeKeys.model_fields, "scheme", *unsaid}
        data = self.model_dump(mode="json", exclude=left)
        scheme = written_keys(self.base_scheme())
        overrides = {pattern: patch.model_dump(exclude_none=True) for pattern, patch in self.overrides.items()}
        patches = {
            key: patch and patch.model_dump(exclude_none=True)
            for key, patch in (
                ("first_blocks", self.first_blocks),
                ("last_blocks", self.last_blocks),
                ("embeddings", self.embeddings),
            )
        }
        options = {"options": self.method_options().model_dump(mode="json")}
        transforms = {"transforms": [spec.resolved() for spec in self.transforms]}
        return {**data, **scheme, **transforms, "overrides": overrides, **patches, **options}

    def _patches(self) -> dict[str, SchemePatch]:
        """All patches, by the keys that give them."""
        blocks = {"first_blocks": self.first_blocks, "last_blocks": self.last_blocks}
        given: dict[str, SchemePatch] = {key: patch for key, patch in blocks.items() if patch is not None}
        return {f"overrides.{pattern}": patch for pattern, patch in self.overrides.items()} | given

    def _patched(self, patch: SchemePatch | None) -> Scheme:
        if patch is None:
            return self.base_scheme()
        if patch.scheme in (None, self.scheme):
            return make_scheme(self.scheme, self.given() | patch.given())
        return make_scheme(patch.scheme, keys_beside(self.format, patch.scheme, patch.given()))


@contextmanager
def _placed(key: str) -> Iterator[None]:
    """Inside the block, what is wrong with a scheme is said with the key of its patch."""
    try:
        yield
    except SchemeError as error:
        raise SchemeError(f"{key}: {error.problem}" if key else error.problem, error.remedy) from error
