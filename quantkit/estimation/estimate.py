"""How much memory a model takes, before any of its weights are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import running, with_all_logits
from quantkit.estimation.lines import Part
from quantkit.estimation.models import anatomy_of
from quantkit.estimation.quantizing import quantizing
from quantkit.estimation.training import training
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored, taken_in
from quantkit.recipe import VariantSpec
from quantkit.schemes.rounding import CACHES
from quantkit.system.names import chosen
from quantkit.system.units import in_units
from quantkit.system.validation import parse_section

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, repr=False)
class Estimate:
    """What a variant of a model takes.

    Attributes:
        anatomy: the model.
        variant: what is done to it.
        use: how it is used.
        stored: the exported file, tensor by tensor.
        parts: ``file``, ``inference``, ``inference_all_logits``, ``quantizing``, and ``training`` if asked for; each
            stands by itself.
    """

    anatomy: Anatomy
    variant: VariantSpec
    use: Use
    stored: Stored
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.name} {in_units(part.nbytes)}" for part in self.parts)
        return f"Estimate({self.anatomy.name}, {self.scheme}: {parts})"

    @property
    def scheme(self) -> str:
        """The variant's scheme in short, and how many others its layers get."""
        first, *others = [each.describe() for each in self.variant.schemes()]
        return f"{first} and {len(others)} other{'s' * (len(others) > 1)}" if others else first

    def part(self, name: str) -> Part:
        """The part of a name."""
        return next(part for part in self.parts if part.name == name)

    def to_json(self) -> dict[str, Any]:
        """``model``, ``family``, its parameters, the variant in short, ``use``, ``bits_per_weight`` and ``parts``.

        ``parameters`` are all, ``active_parameters`` those that a token of text computes with, ``tower_parameters``
        those that text does not pass.
        """
        return {
            "model": self.anatomy.name,
            "family": self.anatomy.family,
            "parameters": self.anatomy.parameters,
            "active_parameters": self.anatomy.active,
            "tower_parameters": self.anatomy.towers,
            "method": self.variant.chain,
            "format": self.variant.format,
            "scheme": self.scheme,
            "use": self.use.model_dump(mode="json"),
            "bits_per_weight": self.stored.bits_per_weight,
            "parts": [part.to_json() for part in self.parts],
        }


def estimate(
    model: str,
    *,
    method: str | None = None,
    scheme: str | None = None,
    format: str | None = None,  # noqa: A002 - the recipe's word
    dtype: str | None = None,
    train: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Estimate:
    """What a quantized model takes on disk, while it runs, while it is quantized, and on request while it is trained.

    Nothing but the model's config is read.

    Args:
        model: a well-known name such as ``llama-2-70b``, a folder, or the name of a hub model.
        method: name of a method.
        scheme: kind of scheme.
        format: name of a format.
        dtype: of the float model; by default its config's own, and bfloat16 for a float32 one.
        train: estimate QLoRA training too.
        trust_remote_code: run Python code that comes with the model in a folder, to build it without weights.
        options: keys of :class:`quantkit.estimation.Use`, such as ``batch``, ``context`` and ``lora_rank``, and further
            keys of a variant, see :func:`quantkit.quantize`.

    Raises:
        QuantkitError: there is no such model, or the variant does not suit it.
    """
    use, keys = split(options)
    given = {"name": "variant", "method": method, "scheme": scheme, "format": format}
    variant = parse_section(VariantSpec, {**given, **keys}, "estimate")
    anatomy = anatomy_of(model, trust_remote_code=trust_remote_code)
    dtype = None if dtype is None else chosen(dtype, FLOATS) or dtype
    if dtype not in (None, *FLOATS):
        raise RecipeError(f"estimate: '{dtype}' is no dtype of a float model", did_you_mean(str(dtype), FLOATS))
    return of_variant(anatomy, variant, use, dtype=dtype or taken_in(anatomy.dtype), train=train)


def of_variant(
    anatomy: Anatomy,
    variant: VariantSpec,
    use: Use,
    *,
    dtype: str | None = None,
    decoded: str | None = None,
    train: bool = False,
) -> Estimate:
    """The same for a variant of a recipe.

    Args:
        anatomy: the model.
        variant: what is done to it.
        use: how it is used.
        dtype: of the float model; its config's own by default.
        decoded: it runs with packed weights decoded to this dtype, as the reference runtime does.
        train: estimate QLoRA training too.
    """
    file = stored(anatomy, variant, dtype)
    if variant.kv_cache is not None and use.kv_dtype is None:
        use = use.model_copy(update={"kv_dtype": CACHES[variant.kv_cache].numbers})
    parts = [
        Part("file", "tensors of the exported file", file.lines(), anatomy.notes),
        running(anatomy, file, use, decoded=decoded),
        with_all_logits(anatomy, file, use, decoded=decoded),
        quantizing(anatomy, variant, file, use),
        *([training(anatomy, file, use)] if train else []),
    ]
    return Estimate(anatomy, variant, use, file, tuple(parts))


def split(options: Mapping[str, Any]) -> tuple[Use, dict[str, Any]]:
    """The keys of a use, and those that are left for the variant.

    Raises:
        RecipeError: a value of the use is not allowed.
    """
    of_use = {key: value for key, value in options.items() if key in Use.model_fields}
    use = parse_section(Use, {key: value for key, value in of_use.items() if value is not None}, "estimate")
    return use, {key: value for key, value in options.items() if key not in of_use}
