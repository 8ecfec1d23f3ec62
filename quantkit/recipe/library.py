"""A variant that one of the field's libraries quantizes, and what its worker may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.errors import RecipeError, SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.libraries import LIBRARIES, Library
from quantkit.libraries.base import CODES, Offer
from quantkit.recipe.fields import Flag, Name, Patterns, Section, Title, Whole, compiled, options_apart
from quantkit.recipe.spelling import entry_called
from quantkit.schemes import PER_CHANNEL, SCHEMES, Scheme, make_scheme
from quantkit.schemes.kinds import keys_of
from quantkit.system.names import chosen
from quantkit.system.units import parse_bytes, parse_seconds
from quantkit.system.validation import located, unknown_key

DEFAULT_GROUP = 64
DEFAULT_TIME = "12h"


class LimitsSpec(Section):
    """The time and memory that a worker may take before it is ended.

    Attributes:
        time: such as ``90s``, ``30min``, ``2h``.
        memory: of the worker and the processes that it starts, resident, such as ``12GiB``; None is nine tenths of
            what is free when it starts.
    """

    time: str = DEFAULT_TIME
    memory: str | None = None

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_one(cls, given: Any) -> Any:
        with located():
            parse_seconds(given)
        return given

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_is_some(cls, given: Any) -> Any:
        with located():
            if given is not None and (not isinstance(given, str) or parse_bytes(given) <= 0):
                raise RecipeError(f"'{given}' is no amount of memory", "write 12GiB, for one")
        return given

    @property
    def seconds(self) -> float:
        """The time in seconds."""
        return parse_seconds(self.time)

    @property
    def memory_bytes(self) -> int | None:
        """The memory in bytes; None where none is given."""
        return None if self.memory is None else parse_bytes(self.memory)


class LibrarySpec(Section):
    """One method of one library.

    Attributes:
        name: its name in the report and its folder.
        title: what people read in its place; any text.
        library: a name of ``quantkit methods``.
        method: one of the library's; None is its first.
        bits: width of a code; None is the method's first.
        group_size: weights that share a scale, where the method takes it; ``-1`` is one scale a channel.
        symmetric: no zero points; None is the method's first choice.
        ignore: regular expressions of linear layers that stay float.
        format: of a library that gives its codes alone, the format in which they are stored; None is
            ``compressed-tensors`` where that stores the grid, else the first that does. Others write their own.
        env: ``own`` is an environment made for the library, ``current`` the one in which quantkit runs.
        limits: what the worker may take.
        options: of the method; in YAML they stand beside the other keys.
    """

    name: Name
    title: Title | None = None
    library: str
    method: str | None = None
    bits: Whole | None = None
    group_size: Whole | None = None
    symmetric: Flag | None = None
    ignore: Patterns = ("lm_head",)
    format: str | None = None
    env: Literal["own", "current"] = "own"
    limits: LimitsSpec = LimitsSpec()
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        return _gathered(given) if isinstance(given, Mapping) else given

    @field_validator("library")
    @classmethod
    def _library_exists(cls, name: str) -> str:
        with located():
            return entry_called(name, LIBRARIES)

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str | None) -> str | None:
        with located():
            return None if name is None else entry_called(name, FORMATS)

    @model_validator(mode="after")
    def _check_offer(self) -> LibrarySpec:
        with located():
            offer = self.offer
            if offer.scores_only:
                problem = f"{self.label} cannot quantize here: {offer.scores_only}"
                raise RecipeError(problem, "leave the variant out, or choose another library")
            for text in _refusals(self, offer):
                raise RecipeError(*text)
            _check_options(self.label, offer, self.options)
        return self

    @property
    def plugin(self) -> type[Library]:
        """The library."""
        return LIBRARIES.get(self.library)

    @property
    def offer(self) -> Offer:
        """The method with what it takes.

        Raises:
            RecipeError: the library has no such method.
        """
        return offer_of(self.plugin, self.method)

    @property
    def label(self) -> str:
        """Library and method, as the report shows them: ``gptqmodel gptq``; once where both have one name."""
        method = self.offer.method
        return self.library if method == self.library else f"{self.library} {method}"

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration tokens."""
        return self.offer.calibrated

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.offer.bits[0] if self.bits is None else self.bits

    @property
    def group(self) -> int:
        """Weights that share a scale; ``-1`` where the method does not group."""
        if not self.offer.grouped:
            return PER_CHANNEL
        return DEFAULT_GROUP if self.group_size is None else self.group_size

    @property
    def is_symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.offer.symmetric[0] if self.symmetric is None else self.symmetric

    def recommended_options(self) -> dict[str, Any]:
        """What the library recommends for the method and the width: the defaults of all its options."""
        return {**self.offer.options, **self.offer.by_bits.get(self.width, {})}

    def all_options(self) -> dict[str, Any]:
        """The method's options with its defaults filled in."""
        return {**self.recommended_options(), **self.options}

    def asked_scheme(self) -> Scheme | None:
        """The grid as a scheme of quantkit, as far as it follows from what is asked; the library may choose another.

        A method called as a kind of scheme means that kind, any other means integers.
        """
        kind = self.offer.method if self.offer.method in SCHEMES else "int"
        keys = {"bits": self.width, "group_size": self.group, "symmetric": self.is_symmetric}
        try:
            return make_scheme(kind, {key: value for key, value in keys.items() if key in keys_of(kind)})
        except SchemeError:
            return None

    def stores(self) -> str | None:
        """The format of the result, where it is known before it is there."""
        return self.format if self.offer.writes == CODES else self.offer.writes

    def stays_float(self, layer: str) -> bool:
        """Whether a pattern of ``ignore`` keeps a layer float."""
        return any(compiled(pattern).search(layer) for pattern in self.ignore)

    def warnings(self) -> tuple[str, ...]:
        """No warnings: nothing is known to go badly before it is tried."""
        return ()

    def resolved(self) -> dict[str, Any]:
        """The variant as JSON data, with every default filled in."""
        chosen = {
            "method": self.offer.method,
            "bits": self.width,
            "group_size": self.group,
            "symmetric": self.is_symmetric,
            "options": self.all_options(),
        }
        return {**self.model_dump(mode="json"), **chosen}


def offer_of(library: type[Library], method: object) -> Offer:
    """A method of a library; None is its first.

    Raises:
        RecipeError: it has no such method.
    """
    offers = {offer.method: offer for offer in library.offers}
    if method is None:
        return library.offers[0]
    meant = chosen(str(method), offers)
    if meant is None:
        raise RecipeError(f"library {library.name} has no method '{method}'", did_you_mean(str(method), offers))
    return offers[meant]


def taken_keys(library: object, method: object) -> set[str]:
    """The keys that a variant of a library takes; those that leave no choice are not among them.

    What is no library or no method of it is reported by the field's own validator.
    """
    known = set(LibrarySpec.model_fields)
    if not isinstance(library, str) or library not in LIBRARIES:
        return known
    found = LIBRARIES.get(library)
    if method is not None and chosen(str(method), [offer.method for offer in found.offers]) is None:
        return known
    offer = offer_of(found, method)
    fixed = {
        "bits": len(offer.bits) == 1,
        "group_size": not offer.grouped,
        "symmetric": len(offer.symmetric) == 1,
        "format": offer.writes != CODES,
    }
    return (known - {key for key, is_fixed in fixed.items() if is_fixed}) | set(offer.options)


def _gathered(given: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A variant with the options of its method under ``options``."""
    own = set(LibrarySpec.model_fields)
    known = taken_keys(given.get("library"), given.get("method")) - own
    for key in given:
        if isinstance(key, str) and key not in own | known and given.get("library") in LIBRARIES:
            raise unknown_key(key, own | known)
    return options_apart(given, known)


def _refusals(spec: LibrarySpec, offer: Offer) -> Iterator[tuple[str, str]]:
    """Problems of a variant that its method does not take, each with the remedy."""
    bits = ", ".join(map(str, offer.bits))
    if spec.width not in offer.bits:
        yield f"{spec.label} has no codes of {spec.width} bits", f"it has {bits}"
    if not offer.grouped and spec.group_size not in (None, PER_CHANNEL):
        yield f"{spec.label} takes no group_size", "leave it out"
    if offer.grouped and spec.group != PER_CHANNEL and spec.group < 1:
        yield f"group_size {spec.group} is not positive", "use -1 for one scale per channel"
    if spec.is_symmetric not in offer.symmetric:
        yield f"{spec.label} is {'symmetric' if offer.symmetric[0] else 'asymmetric'} only", "leave out 'symmetric'"
    if spec.format is None:
        return
    if offer.writes == CODES:
        reason = FORMATS.get(spec.format).read_only
        if reason:
            yield f"quantkit reads the {spec.format} format and does not write it: {reason}", "choose another format"
    elif spec.format != offer.writes:
        yield (
            f"{spec.label} writes {offer.writes} files",
            "leave out 'format'; 'quantkit convert' writes others of them",
        )


def _check_options(label: str, offer: Offer, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in offer.options:
            raise RecipeError(f"{label} has no option '{key}'", did_you_mean(key, offer.options))
        default = offer.options[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        is_one = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
        if default is not None and not is_one:
            raise RecipeError(
                f"option {key} of {label} is no {type(default).__name__}: {value!r}", f"such as {default}"
            )
