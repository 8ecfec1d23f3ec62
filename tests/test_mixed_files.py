"""Files that hold several schemes side by side: what a format offers, and that such files load."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import FLOAT, Format
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.schemes import IntScheme, Scheme

MIXES = [
    (store.name, runtime)
    for store in FORMATS
    for runtime in (None, "reference", *store.runtimes)
    if store.choices(runtime)
]


def schemes_of(store: str, names: tuple[str, ...]) -> list[Scheme]:
    """The schemes that choices stand for beside an override of each in a recipe."""
    packed = [name for name in names if name != FLOAT]
    overrides: dict[str, Any] = {f"layer{number}": name for number, name in enumerate(packed)}
    keys = {"format": store} if store in ("bitsandbytes", "gguf") else {"format": store, "group_size": 64}
    variant = VariantSpec.model_validate({"name": "mixed", **keys, "overrides": overrides})
    found = [variant.scheme_of(pattern) for pattern in overrides]
    return [scheme for scheme in found if scheme is not None]


@pytest.mark.parametrize(("store", "runtime"), MIXES)
def test_choices_go_together(store: str, runtime: str | None) -> None:
    found = FORMATS.get(store)
    names = found.choices(runtime)
    schemes = schemes_of(store, names)
    assert names[-1] == FLOAT
    assert len(set(schemes)) == len(names) - 1
    found.check_together(schemes)
    for scheme in schemes:
        found.check(scheme)
    if runtime in RUNTIMES:
        assert found.refusal(str(runtime), schemes) is None


def test_choices_are_those_that_the_runtime_serves() -> None:
    packed = FORMATS.get("compressed-tensors")
    assert packed.choices("vllm") == ("int4", "int8", FLOAT)
    assert set(packed.choices("vllm")) < set(packed.choices("transformers")) == set(packed.choices())
    assert packed.choices("llama.cpp") == ()
    assert FORMATS.get("gptq").choices("vllm") == ("int4", "int8", FLOAT)
    assert FORMATS.get("gptq").choices("transformers") == ("int4", FLOAT)
    assert FORMATS.get("bitsandbytes").choices() == ("nf4", FLOAT)
    assert FORMATS.get("float").choices() == FORMATS.get("aqlm").choices() == ()
    assert {"q2_k", "q4_k", "q8_0", "q5_1"} < set(FORMATS.get("gguf").choices("llama.cpp"))


def test_a_plugged_format_offers_the_kinds_of_its_examples() -> None:
    class Plugged(FORMATS.get("awq")):  # type: ignore[misc]
        name = "plugged"
        runtimes = ("server",)
        examples = ({"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 32}, {"bits": 2}, {"scheme": "nf4"})

        @classmethod
        def check_together(cls, schemes: Any) -> None:
            if any(isinstance(scheme, IntScheme) and scheme.bits == 2 for scheme in schemes):
                raise SchemeError("no 2 bits beside others", "leave them out")

        @classmethod
        def refusal(cls, runtime: str, schemes: Any) -> str | None:
            return "no nf4." if any(scheme.kind == "nf4" for scheme in schemes) else None

    store: type[Format] = Plugged
    assert store.choices() == ("int8", "int4", "nf4", FLOAT)
    assert store.choices("server") == ("int8", "int4", FLOAT)
    assert store.choices("another") == ()
