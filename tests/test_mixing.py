"""Mixed schemes: what a recipe says of them, and what becomes of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from quantkit.allocation.table import Allocation, Unit
from quantkit.errors import RecipeError, SchemeError
from quantkit.recipe import AutoSpec, Recipe
from quantkit.recipe.layer_patterns import patterns_of

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{leaf}" for block in range(12) for leaf in LEAVES]
EXPERTS = [f"model.layers.{block}.mlp.experts.{n}.up_proj" for block in range(3) for n in range(11)]


def recipe_of(*variants: dict[str, Any], **further: Any) -> Recipe:
    """A recipe of these variants, as if read from a file."""
    return Recipe.of({"name": "r", "model": {"source": "x/y"}, "variants": list(variants), **further})


def mixed(**keys: Any) -> AutoSpec:
    """The first mixed variant of a recipe with these keys."""
    found = recipe_of({"name": "mix", "bits": "auto", **keys}).variants[0]
    assert isinstance(found, AutoSpec)
    return found


def allocated(chosen: dict[str, str], choices: dict[str, dict[str, Any]], **facts: Any) -> Allocation:
    """An allocation of layers, each a unit."""
    costs, sizes = dict.fromkeys(choices, 0.0), dict.fromkeys(choices, 1)
    units = [Unit((layer,), 64, costs, sizes) for layer in chosen]
    return Allocation(choices, units, tuple(chosen.values()), facts)


def _patches(spec: AutoSpec) -> dict[str, dict[str, Any]]:
    return {name: patch.model_dump(exclude_none=True) for name, patch in spec.choice_patches().items()}


def matched(patterns: list[str], names: list[str]) -> list[str]:
    """The names that any of the patterns finds."""
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_patterns_match_their_layers_and_no_others(step: int) -> None:
    every = [*LAYERS, *EXPERTS, "lm_head", "model.layers_11.mlp", "modelxlayers.1.mlp.down_proj"]
    wanted = every[::step]
    assert matched(patterns_of(wanted, every), every) == wanted


def test_patterns_put_blocks_leaves_and_experts_together() -> None:
    blocks = [f"model.layers.{block}.{leaf}" for block in (0, 3, 11) for leaf in LEAVES[:2]]
    assert patterns_of(blocks, LAYERS) == [r"^model\.layers\.(?:0|3|11)\.self_attn\.(?:q_proj|k_proj)$"]
    whole = [name for name in EXPERTS if ".1.mlp" in name or ".2.mlp" in name]
    assert patterns_of(whole, EXPERTS) == [r"^model\.layers\.(?:1|2)\.mlp\.experts\.\d+\.up_proj$"]
    assert not any(r"\d+" in pattern for pattern in patterns_of(whole[1:3], EXPERTS))


def test_a_choice_becomes_overrides_that_give_each_layer_what_was_chosen() -> None:
    spec = mixed(budget=4, choices=["int3", "int4", "fp8", "float"], group_size=32, overrides={"k_proj": {"bits": 8}})
    names = ("int3", "int4", "fp8", "float", "int4")
    chosen = {layer: names[place % 5] for place, layer in enumerate(LAYERS) if "k_proj" not in layer}
    plain = spec.with_choice(allocated(chosen, _patches(spec)))
    assert not isinstance(plain, AutoSpec)
    for layer, name in chosen.items():
        assert plain.scheme_of(layer) == spec.choice_schemes()[name], layer
    kept = plain.scheme_of("model.layers.4.self_attn.k_proj")
    assert kept is not None
    assert (kept.bits, kept.group_size) == (8, 32)
    assert plain.base_scheme() == spec.choice_schemes()["int4"]
    recipe = recipe_of({"name": "other"}).model_copy(update={"variants": (plain,)})
    assert Recipe.parse(recipe.to_yaml()).variants == (plain,)


@pytest.mark.parametrize("most", ["q2_k", "q6_k", "q4_k"])
def test_a_type_of_block_is_not_the_preset_of_its_name(most: str) -> None:
    spec = mixed(budget=4, format="gguf", choices=["q2_k", "q4_k", "q6_k"], last_blocks={"count": 2, "scheme": "q5_k"})
    names = ["q2_k", "q4_k", "q6_k", *[most] * 27]
    plain = spec.with_choice(allocated(dict(zip(LAYERS, names, strict=False)), _patches(spec)))
    schemes = spec.choice_schemes()
    for place, (layer, name) in enumerate(zip(LAYERS, names, strict=False)):
        assert plain.scheme_of(layer, place // 3, 12) == schemes[name]
        assert spec.uniform(most).scheme_of(layer, place // 3, 12) == schemes[most]
    last = plain.scheme_of(LAYERS[-1], 11, 12)
    assert last is not None
    assert last.kind == "q5_k"


def test_embedding_and_head_take_part_where_the_format_stores_them() -> None:
    spec = mixed(budget=4, choices=["q4_k", "q6_k"])
    assert (spec.format, spec.embeddings_take_part, spec.ignores("lm_head")) == ("gguf", True, False)
    embedding, head = "model.embed_tokens", "lm_head"
    choices = {"q4_k": {"scheme": "q4_k"}, "q6_k": {"scheme": "q6_k"}}
    facts = {"embedding": embedding, "head": head}
    plain = spec.with_choice(
        allocated({**dict.fromkeys(LAYERS, "q4_k"), embedding: "q6_k", head: "q6_k"}, choices, **facts)
    )
    assert plain.embedding_scheme() == spec.choice_schemes()["q6_k"] == plain.scheme_of(head)
    tied = spec.with_choice(
        allocated({**dict.fromkeys(LAYERS, "q4_k"), embedding: "q6_k"}, choices, embedding=embedding)
    )
    assert tied.embedding_scheme() is not None
    assert tied.scheme_of(head) is None
    assert spec.uniform("q6_k", tied=True).scheme_of(head) is None
    assert not mixed(budget=4).embeddings_take_part


def test_a_list_of_budgets_is_a_variant_each() -> None:
    recipe = recipe_of(
        {"name": "mix", "budget": [3.5, 4.0, "450MB", {"memory": "8GiB", "context": 8192}], "title": "Mixed"},
        {"name": "mix-4.5", "bits": 4},
    )
    names = ["mix-3.5", "mix-4", "mix-450MB", "mix-8GiB-at-8192", "mix-4.5"]
    assert [variant.name for variant in recipe.variants] == names
    assert recipe.variants[0].title == "Mixed, 3.5 bits per weight"
    budget = recipe.own_variants[3]
    assert isinstance(budget, AutoSpec)
    assert budget.budget is not None
    assert (budget.budget.memory, budget.budget.context) == (8 * 2**30, 8192)
    assert Recipe.parse(recipe.to_yaml()).variants == recipe.variants
    with pytest.raises(RecipeError, match="two variants are called 'mix-4'"):
        recipe_of({"name": "mix", "budget": [4, 4.5]}, {"name": "mix-4", "bits": 4})


def test_keys_beside_bits_belong_to_every_choice_of_the_kind() -> None:
    schemes = mixed(budget=4, choices=["int3", {"bits": 8, "group_size": 128}, "fp8"], group_size=64).choice_schemes()
    groups = {name: scheme and scheme.group_size for name, scheme in schemes.items()}
    assert list(groups) == ["int3", "int8 g128 sym", "fp8"]
    assert groups["int3"] == 64


def test_defaults_of_mixed_variants_leave_the_others_as_they_are() -> None:
    defaults = {"bits": "auto", "budget": 4.5, "group_size": 64}
    recipe = recipe_of({"name": "a"}, {"name": "b", "bits": 4}, {"name": "c", "scheme": "nf4"}, defaults=defaults)
    assert [isinstance(each, AutoSpec) for each in recipe.variants] == [True, False, False]
    assert recipe.own_variants[1].base_scheme().describe() == "int4 g64 sym"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "bits: auto needs a budget .*budget: 4.0"),
        ({"budget": 40}, "40 is more bits than a weight has .*5GiB"),
        ({"budget": [4, "5xx"]}, r"budget\[1\].*'5xx' is not a size"),
        ({"budget": {"size": 1, "memory": 3}}, "gives size and memory"),
        ({"budget": {"siz": 1}}, "unknown key 'variants.0..budget.siz' .*'size'"),
        ({"budget": 4, "bits": 4}, "bits: 4 stands beside it .write bits: auto"),
        ({"budget": 4, "choices": ["int4"]}, "nothing to choose but int4"),
        ({"budget": 4, "format": "aqlm"}, "format aqlm have no two to choose from .*compressed-tensors"),
        ({"budget": 4, "choices": []}, "there are none"),
        ({"budget": 4, "choices": ["int4", "imt3"]}, "unknown scheme 'imt3' .did you mean 'int3'"),
        ({"budget": 4, "choices": ["int4", "w4a16"]}, "w4a16 is given twice"),
        ({"budget": 4, "choices": ["q4_k", "q6_k"], "format": "gptq"}, "gptq does not store q4_k .these do: gguf"),
        ({"budget": 4, "choices": ["q4_k", "q4_k_m"]}, "q4_k_m is a mixture"),
        ({"budget": 4, "runtime": "ollama"}, "ollama does not load format compressed-tensors .these do"),
        ({"budget": 4, "allocation": "a.json"}, "budget has no meaning beside allocation"),
        ({"budget": 4, "front": 3}, "unknown key 'variants.0..front'"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        mixed(**keys)


def test_a_choice_of_an_allocation_that_is_none_is_told_with_its_place() -> None:
    edited = Allocation({"int4": {"bits": 99}}, [Unit(("a.q",), 4, {"int4": 0.1}, {"int4": 2})], ("int4",))
    with pytest.raises(SchemeError, match=r"allocation: choices\.int4: bits 99 is not a width"):
        mixed(budget=4).with_choice(edited)
