"""The keys of a scheme as a recipe gives them: some are given, the rest is the scheme's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.errors import SchemeError, did_you_mean
from quantkit.recipe.fields import Flag, Section, Whole
from quantkit.schemes import SCHEME_KEYS, SCHEMES, Scheme
from quantkit.system.validation import located


class SchemeKeys(Section):
    """The keys of all schemes; one that is None was not given and takes the default of the scheme.

    Attributes:
        bits: width of a code.
        group_size: input columns that share a scale; ``-1`` is one scale per output row.
        symmetric: zero is a level and no zero point is stored.
        zeros: zero points are whole codes (``int``) or any number (``float``).
        axis: 1 groups weights of a row, 0 of a column.
        activations: ``dynamic`` has the runtime round a layer's inputs as well, ``none`` leaves them as they are.
        double_quant: store the scales of blocks in 8 bits.
        granularity: what shares a scale of 8-bit floats.
        desc_act: groups gather columns of like activation, for which the file needs a ``g_idx``.
    """

    bits: Whole | None = None
    group_size: Whole | None = None
    symmetric: Flag | None = None
    zeros: Literal["int", "float"] | None = None
    axis: Literal[0, 1] | None = None
    activations: Literal["none", "dynamic"] | None = None
    double_quant: Flag | None = None
    granularity: Literal["tensor", "channel", "block"] | None = None
    desc_act: Flag | None = None

    def given(self) -> dict[str, Any]:
        """The keys that were given, as :func:`quantkit.schemes.make_scheme` takes them."""
        found = {key: getattr(self, key) for key in SCHEME_KEYS if getattr(self, key) is not None}
        return {key: None if (key, value) == ("activations", "none") else value for key, value in found.items()}


class SchemePatch(SchemeKeys):
    """What some layers have otherwise.

    Attributes:
        scheme: another kind of scheme, which begins from its own defaults; None keeps the variant's.
    """

    scheme: str | None = None

    @field_validator("scheme")
    @classmethod
    def _scheme_exists(cls, kind: str | None) -> str | None:
        return kind if kind is None else known_kind(kind)


class BlocksPatch(SchemePatch):
    """What the first or the last decoder blocks have otherwise.

    Attributes:
        count: how many blocks.
    """

    count: Annotated[Whole, Field(ge=1)]

    @model_validator(mode="after")
    def _changes_something(self) -> BlocksPatch:
        if self.scheme is None and not self.given():
            raise ValueError("gives no key beside count: add one of the scheme, such as bits: 8")
        return self


def known_kind(kind: str) -> str:
    """``kind``, where there is such a scheme; for use inside a validator."""
    with located():
        if kind not in SCHEMES:
            raise SchemeError(f"unknown scheme '{kind}'", did_you_mean(kind, SCHEMES))
    return kind


def written_keys(scheme: Scheme) -> dict[str, Any]:
    """A scheme as a recipe writes it: ``scheme`` and every key that it takes."""
    keys = scheme.to_json()
    kind = keys.pop("kind")
    return {"scheme": kind} | {key: "none" if value is None else value for key, value in keys.items()}
