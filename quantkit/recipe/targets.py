"""Who will load a checkpoint, said instead of a format: `quantkit quantize --for ollama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import QuantkitError, RecipeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.recipe.implied import FIRST_FORMATS
from quantkit.recipe.mixing import is_mixed, spec_class
from quantkit.recipe.steps import DEFAULT_METHOD
from quantkit.recipe.variant import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.system.names import chosen
from quantkit.system.validation import parse_section

LIKE = {
    **dict.fromkeys(("sglang", "tgi", "text-generation-inference", "aphrodite"), "vllm"),
    **dict.fromkeys(
        ("lm-studio", "koboldcpp", "jan", "llama-cpp-python", "llama-server", "llamafile", "gpt4all"), "llama.cpp"
    ),
}
"""Programs that load what a runtime that quantkit knows loads, as their authors say; no test has tried them."""


def variant_for(target: str, given: Mapping[str, Any]) -> tuple[VariantSpec, str]:
    """A variant in a format that a program loads, and what is to be said of that; empty where tests have loaded such.

    Args:
        target: a runtime or a program such as ``ollama``, in any case.
        given: the keys of a variant; None is not given.

    Raises:
        RecipeError: no such program is known, or none of the formats that it loads suits the keys.
    """
    runtime = runtime_of(target)
    keys = {key: value for key, value in given.items() if value is not None}
    able = [
        store
        for store in _formats(keys.get("method"))
        if runtime in FORMATS.get(store).runtimes and not FORMATS.get(store).read_only
    ]
    if keys.get("format") is not None and FORMATS.name_of(keys["format"]) not in able:
        raise RecipeError(f"{target} does not load format {keys['format']}", f"it loads {', '.join(able)}")
    wanted = [FORMATS.name_of(keys["format"])] if "format" in keys else able
    refusals: dict[str, list[str]] = {}
    for store in wanted:
        try:
            variant = parse_section(spec_class(keys), {**_for_runtime(keys, runtime), "format": store}, "quantize")
        except QuantkitError as error:
            refusals.setdefault(error.problem.removeprefix("quantize: "), []).append(store)
            continue
        reason = FORMATS.get(store).refusal(runtime, variant.schemes())
        if reason is None and variant.turns:
            reason = FORMATS.get(store).turn_refusal(runtime)
        if reason is None:
            return variant, _remark(target, runtime, store)
        refusals.setdefault(reason, []).append(store)
    why = "; ".join(f"{reason} ({', '.join(stores)})" for reason, stores in refusals.items())
    raise RecipeError(f"no format that {target} loads suits this: {why}", "choose another scheme, method or target")


def _for_runtime(keys: Mapping[str, Any], runtime: str) -> Mapping[str, Any]:
    """The keys of a variant; of one that is mixed with the runtime, which its choices have to suit."""
    return {"runtime": runtime, **keys} if is_mixed(keys) else keys


def runtime_of(target: str) -> str:
    """The runtime that loads what a program loads; for a program that formats name in words, that word.

    Raises:
        RecipeError: with the programs that are known.
    """
    words = sorted({word for store in FORMATS for word in store.runtimes if not store.read_only})
    found = chosen(target, [*words, *LIKE]) or (RUNTIMES.name_of(target) if target in RUNTIMES else None)
    if found is None or (found not in words and found not in LIKE):
        raise RecipeError(f"it is not known what '{target}' loads", did_you_mean(target, [*words, *LIKE]))
    return LIKE.get(found, found)


def _formats(method: str | None) -> list[str]:
    """All formats, the likeliest first: of those that few load, the one that is called as the method."""
    others = sorted(FORMATS.names(), key=lambda name: name != (method or DEFAULT_METHOD))
    return [*FIRST_FORMATS, *(name for name in others if name not in FIRST_FORMATS)]


def _remark(target: str, runtime: str, store: str) -> str:
    known = chosen(target, LIKE)
    if known is not None:
        return f"{known} loads {store} files as its authors say; quantkit has tried them in {runtime}"
    untested: str = FORMATS.get(store).untested.get(runtime, "")
    return untested
