"""The reverse question: what fits into so much memory, or on the cards that people have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantkit.errors import RecipeError, SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.estimate import split
from quantkit.estimation.inference import running
from quantkit.estimation.models import anatomy_of
from quantkit.estimation.training import training
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored, taken_in
from quantkit.recipe import VariantSpec
from quantkit.system.units import parse_bytes
from quantkit.system.validation import parse_section

STEP = 256
"""Contexts are tried in steps of so many tokens."""
LONGEST = 131072
"""The longest context that is tried for a model that does not say for how many tokens it was made."""


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card.

    Attributes:
        name: of the card.
        mebibytes: of memory, about what its driver reports.
    """

    name: str
    mebibytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.mebibytes * 2**20


CARDS = (
    Card("RTX 4060 8 GB", 8188),
    Card("RTX 3060 12 GB", 12288),
    Card("RTX 4070 12 GB", 12282),
    Card("RTX 4060 Ti 16 GB", 16380),
    Card("RTX 3090 24 GB", 24576),
    Card("RTX 4090 24 GB", 24564),
    Card("A100 40 GB", 40960),
    Card("L40S 48 GB", 46068),
    Card("A100 80 GB", 81920),
    Card("H100 80 GB", 81559),
)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of quantizing.

    Attributes:
        method: name of the method.
        format: name of the format.
        keys: of the scheme.
    """

    method: str
    format: str
    keys: Mapping[str, Any]


def _int(bits: int, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


WAYS = (
    Way("none", "float", {"scheme": "bfloat16"}),
    Way("gptq", "compressed-tensors", _int(8, -1)),
    Way("llama.cpp", "gguf", {"scheme": "q6_k_mix"}),
    Way("llama.cpp", "gguf", {"scheme": "q5_k_m"}),
    Way("llama.cpp", "gguf", {"scheme": "q4_k_m"}),
    Way("gptq", "compressed-tensors", _int(4, 32)),
    Way("gptq", "compressed-tensors", _int(4, 128)),
    Way("awq", "awq", _int(4, 128, symmetric=False)),
    Way("rtn", "bitsandbytes", {"scheme": "nf4"}),
    Way("llama.cpp", "gguf", {"scheme": "q3_k_m"}),
    Way("gptq", "gptq", _int(3, 128)),
    Way("llama.cpp", "gguf", {"scheme": "q2_k_mix"}),
    Way("gptq", "gptq", _int(2, 32)),
)
"""By expected quality, the best first: more bits lose less, and of equal bits smaller groups and methods that look at
calibration texts do. What a model really loses is in its report, not here."""


@dataclass(frozen=True)
class Fit:
    """A way of quantizing a model for a card.

    Attributes:
        anatomy: the model.
        way: method, format and scheme.
        variant: the same, as a variant.
        stored: its file.
        use: how the model is used.
        memory: bytes that there are.
    """

    anatomy: Anatomy
    way: Way
    variant: VariantSpec
    stored: Stored
    use: Use
    memory: int

    @cached_property
    def nbytes(self) -> int:
        """What it takes at the context that was asked for."""
        return self._at(self.use.context)

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.nbytes <= self.memory

    @cached_property
    def longest_context(self) -> int:
        """The longest context that fits, in steps of 256 tokens, up to what the model was made for; 0 for none."""
        low, high = 0, (self.anatomy.context or LONGEST) // STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._at(middle * STEP) <= self.memory else (low, middle - 1)
        return low * STEP

    @cached_property
    def training_bytes(self) -> int:
        """What QLoRA training on it takes."""
        return training(self.anatomy, self.stored, self.use).nbytes

    def to_json(self) -> dict[str, Any]:
        """Method, format, scheme, bits per weight, bytes, whether it fits, and the longest context that does."""
        return {
            "method": self.way.method,
            "format": self.way.format,
            "scheme": self.variant.base_scheme().describe(),
            "bits_per_weight": self.stored.bits_per_weight or 16.0,
            "file_bytes": self.stored.nbytes,
            "bytes": self.nbytes,
            "fits": self.fits,
            "longest_context": self.longest_context,
        }

    def _at(self, context: int) -> int:
        return running(self.anatomy, self.stored, self.use.model_copy(update={"context": context})).nbytes


@dataclass(frozen=True, slots=True)
class CardFit:
    """What fits on a card.

    Attributes:
        card: the card.
        best: the way of the best expected quality that fits; None where none does.
        trains: whether QLoRA training on NF4 fits with the same batch and context.
    """

    card: Card
    best: Fit | None
    trains: bool

    def to_json(self) -> dict[str, Any]:
        """Card, bytes, the best fit, and whether training fits."""
        best = self.best and self.best.to_json()
        return {"card": self.card.name, "bytes": self.card.nbytes, "best": best, "trains": self.trains}


def fits(model: str, memory: str | int, *, trust_remote_code: bool = False, **options: Any) -> list[Fit]:
    """Ways of quantizing a model for so much memory, by expected quality, the best first; also those that do not fit.

    Args:
        model: see :func:`quantkit.estimation.estimate`.
        memory: such as ``8GiB``, or a number of bytes.
        trust_remote_code: see there.
        options: keys of :class:`quantkit.estimation.Use`.

    Raises:
        QuantkitError: there is no such model, or the memory is no size.
    """
    anatomy, use = anatomy_of(model, trust_remote_code=trust_remote_code), _use(options)
    return list(_ways(anatomy, use, parse_bytes(memory)))


def cards(model: str, *, trust_remote_code: bool = False, **options: Any) -> list[CardFit]:
    """What fits on the usual cards, see :func:`fits`."""
    anatomy, use = anatomy_of(model, trust_remote_code=trust_remote_code), _use(options)
    found = list(_ways(anatomy, use, 0))
    base = next((each for each in found if each.way.keys.get("scheme") == "nf4"), None)
    rows = []
    for card in CARDS:
        there = (Fit(e.anatomy, e.way, e.variant, e.stored, e.use, card.nbytes) for e in found)
        best = next((each for each in there if each.fits), None)
        rows.append(CardFit(card, best, base is not None and base.training_bytes <= card.nbytes))
    return rows


def _use(options: dict[str, Any]) -> Use:
    use, rest = split(options)
    if rest:
        raise RecipeError(
            f"'{next(iter(rest))}' has no meaning here: what fits is what is asked",
            f"keys: {', '.join(Use.model_fields)}",
        )
    return use


def _ways(anatomy: Anatomy, use: Use, memory: int) -> Iterator[Fit]:
    """Every way that the model's shapes allow."""
    from quantkit.gguf.architecture import model_types  # it brings transformers along, as the anatomy did

    for way in WAYS:
        if way.format == "gguf" and anatomy.family not in model_types():
            continue
        keys = {"name": "way", "method": way.method, "format": way.format, **way.keys}
        variant = parse_section(VariantSpec, keys, "fits")
        try:
            file = stored(anatomy, variant, taken_in(anatomy.dtype))
        except SchemeError:
            continue  # its groups do not divide this model's rows
        yield Fit(anatomy, way, variant, file, use, memory)
