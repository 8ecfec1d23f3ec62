from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.recipe import MAX_RECIPE_BYTES, EvaluationSpec, Recipe, SchemeKeys, VariantSpec
from quantkit.recipe.scheme_names import preset_named
from quantkit.schemes import SCHEMES, Fp8Scheme, IntScheme, Mxfp4Scheme, Scheme, scheme_keys
from quantkit.system.validation import parse_section
from quantkit.transforms import TRANSFORMS


def recipe(**changes: Any) -> dict[str, Any]:
    """A small valid recipe with some keys changed."""
    data = {"name": "demo", "model": {"source": "folder"}, "variants": [{"name": "a", "method": "rtn"}]}
    return data | changes


def variant(**changes: Any) -> dict[str, Any]:
    return recipe(variants=[{"name": "a", **changes}])


def parsed(data: dict[str, Any]) -> Recipe:
    return Recipe.parse(yaml.safe_dump(data), "demo.yaml")


def refusal(data: dict[Any, Any] | str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data if isinstance(data, str) else yaml.safe_dump(data), "demo.yaml")
    message = str(caught.value)
    assert message.startswith("demo.yaml")
    assert "\n" not in message
    return message


UNKNOWN_KEYS = {
    "top": (recipe(varaints=[]), "'varaints'", "variants"),
    "model": (recipe(model={"source": "x", "sorce": "y"}), "'model.sorce'", "source"),
    "calibration": (recipe(calibration={"sampels": 3}), "'calibration.sampels'", "samples"),
    "variant": (variant(bitz=4), "'variants[0].bitz'", "bits"),
    "method option": (variant(method="gptq", dampling=0.1), "'variants[0].dampling'", "damping"),
    "override": (variant(overrides={"q_proj": {"bit": 8}}), "'variants[0].overrides.q_proj.bit'", "bits"),
    "defaults": (recipe(defaults={"grup_size": 64}), "'defaults.grup_size'", "group_size"),
    "evaluation": (recipe(evaluation={"contextlength": 64}), "'evaluation.contextlength'", "context_length"),
    "text": (
        recipe(evaluation={"texts": [{"name": "t", "bundled": "prose", "colum": "x"}]}),
        "'evaluation.texts[0].colum'",
        "column",
    ),
    "report": (recipe(report={"format": ["md"]}), "'report.format'", "formats"),
}


@pytest.mark.parametrize("where", UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_key(where: str) -> None:
    data, path, nearest = UNKNOWN_KEYS[where]
    message = refusal(data)
    assert f"unknown key {path}" in message
    assert f"did you mean '{nearest}'?" in message


def test_the_keys_of_a_recipe_are_those_of_all_schemes() -> None:
    assert set(SchemeKeys.model_fields) == set(scheme_keys())
    assert set(SchemeKeys.model_fields) <= set(VariantSpec.model_fields)


def test_an_option_of_another_method_is_named_as_such() -> None:
    message = refusal(variant(method="rtn", damping=0.1))
    assert "unknown key 'variants[0].damping'" in message
    assert "it is an option of gptq, and the method is rtn" in message


MISTAKES: dict[str, tuple[dict[Any, Any], str]] = {
    "text for a number": (variant(bits="four"), "variants[0].bits: must be a valid integer, not 'four'"),
    "a number as text": (variant(bits="4"), "variants[0].bits: must be a valid integer, not '4'"),
    "a fraction": (variant(bits=4.5), "variants[0].bits: must be a valid integer, not 4.5"),
    "a truth value for a number": (recipe(calibration={"seed": True}), "calibration.seed: must be a valid integer"),
    "text for a truth value": (variant(symmetric="maybe"), "variants[0].symmetric: must be a valid boolean"),
    "a number for a list": (variant(ignore=3), "variants[0].ignore: must be a list, not 3"),
    "a list for a section": (recipe(model=["x"]), "model: must be a mapping of keys to values, not ['x']"),
    "nothing for a section": (recipe(evaluation=None), "evaluation: must be a mapping of keys to values, not None"),
    "a variant that is text": (recipe(variants=["gptq"]), "variants[0]: must be a mapping of keys to values"),
    "variants that are a mapping": (recipe(variants={"a": 1}), "variants: must be a list"),
    "defaults that are a list": (recipe(defaults=["bits"]), "defaults: must be a mapping of keys to values"),
    "options that are a list": (variant(method="gptq", options=[1], damping=0.1), "variants[0].options: must be a map"),
    "a key that is a number": (variant(overrides={1: {"bits": 8}}), "variants[0].overrides[1]: must be text"),
    "a top key that is a number": ({**recipe(), 1: 2}, "a key must be text"),
    "a missing key": (recipe(model={}), "key 'model.source' is missing"),
    "no variants": (recipe(variants=[]), "variants: must not be empty"),
    "no texts": (recipe(evaluation={"texts": []}), "evaluation.texts: must not be empty"),
    "no metrics": (recipe(evaluation={"metrics": []}), "evaluation.metrics: must not be empty"),
    "zero samples": (recipe(calibration={"samples": 0}), "calibration.samples: must be greater than or equal to 1"),
    "a name with a slash": (recipe(name="a/b"), "name: must be letters, digits"),
    "a name that leads upwards": (variant(name=".."), "variants[0].name: must be letters, digits"),
    "an option out of range": (variant(method="gptq", damping=-1), "variants[0].damping: must be greater than 0"),
    "an option of the wrong type": (variant(method="gptq", damping="much"), "variants[0].damping: must be a valid num"),
    "bits that do not exist": (variant(bits=9), "variants[0]: bits 9 is not a width that quantkit has (allowed: 1, 2"),
    "bits of an override": (
        variant(overrides={"q_proj$": {"bits": 9}}),
        "variants[0]: overrides.q_proj$: bits 9 is not a width",
    ),
    "a scheme": (variant(scheme="nf5"), "variants[0].scheme: unknown scheme 'nf5' (did you mean 'nf4'?"),
    "a scheme that is a number": (variant(scheme=4), "variants[0].scheme: must be text, not 4"),
    "a scheme of an override": (
        variant(overrides={"q": {"scheme": "fp9"}}),
        "variants[0].overrides.q.scheme: unknown scheme 'fp9' (did you mean 'fp8'?",
    ),
    "a key of another scheme": (
        variant(scheme="mxfp4", group_size=64),
        "variants[0]: scheme mxfp4 does not take 'group_size' (it takes activations)",
    ),
    "a key of another scheme in an override": (
        variant(method="rtn", format="compressed-tensors", scheme="fp8", overrides={"q": {"bits": 8}}),
        "variants[0]: overrides.q: scheme fp8 does not take 'bits' (it takes granularity, activations)",
    ),
    "keys that exclude each other": (
        variant(bits=4, activations="static"),
        "variants[0]: a static scale of inputs needs 8-bit weights per channel",
    ),
    "an axis": (variant(axis=2), "variants[0].axis: must be 0 or 1, not 2"),
    "zeros": (variant(zeros="flaot"), "variants[0].zeros: 'flaot' is not allowed (did you mean 'float'?"),
    "blocks without a count": (variant(first_blocks={"bits": 8}), "key 'variants[0].first_blocks.count' is missing"),
    "no blocks": (variant(last_blocks={"count": 0, "bits": 8}), "variants[0].last_blocks.count: must be greater than"),
    "blocks without a change": (variant(first_blocks={"count": 2}), "variants[0].first_blocks: gives no key beside c"),
    "a scheme of blocks": (
        variant(last_blocks={"count": 2, "bits": 9}),
        "variants[0]: last_blocks: bits 9 is not a width",
    ),
    "two methods": (variant(method="rtn+gptq"), "variants[0].method: method 'rtn+gptq': rtn chooses codes, and what"),
    "a transform": (
        variant(transforms=["aqw"]),
        "variants[0].transforms[0].name: unknown transform 'aqw' (did you mean 'awq'?",
    ),
    "an option of a transform": (
        variant(transforms=[{"name": "awq", "alpha": 3}]),
        "unknown key 'variants[0].transforms[0].alpha' (did you mean 'alphas'?",
    ),
    "options of a transform that are none": (
        variant(transforms=[{"name": "awq", "alphas": 5, "options": 3}]),
        "variants[0].transforms[0].options: must be a mapping of keys to values, not 3",
    ),
    "a value of a transform": (
        variant(transforms=[{"name": "awq", "alphas": 0}]),
        "variants[0].transforms[0].alphas: must be greater than or equal to 1",
    ),
    "a transform twice": (
        variant(method="awq", transforms=["awq"]),
        "variants[0]: transforms: method awq brings awq itself (leave it out; its options stand beside the method)",
    ),
    "a transform of nothing": (
        variant(method="none", format="float", scheme="float16", transforms=["awq"]),
        "variants[0]: transforms: method none solves no layer",
    ),
    "a part of a method": (
        variant(method="awq+gtpq"),
        "variants[0].method: unknown method 'gtpq' (did you mean 'gptq'",
    ),
    "a loader": (recipe(evaluation={"loader": "referense"}), "evaluation.loader: 'referense' is not allowed (did you"),
    "a group size of zero": (variant(group_size=0), "variants[0]: group_size 0 is not positive (use -1"),
    "a method": (variant(method="gtpq"), "variants[0].method: unknown method 'gtpq' (did you mean 'gptq'?"),
    "a method that is a number": (variant(method=3), "variants[0].method: must be text, not 3"),
    "a format": (variant(format="gguff"), "variants[0].format: unknown format 'gguff' (did you mean 'gguf'?"),
    "a metric": (recipe(evaluation={"metrics": ["perplexty"]}), "metrics[0]: 'perplexty' is not allowed (did you mean"),
    "a text": (recipe(evaluation={"texts": ["proze"]}), "texts[0]: unknown text 'proze': did you mean 'prose'?"),
    "a text of two origins": (
        recipe(evaluation={"texts": [{"name": "t", "bundled": "prose", "file": "x.txt"}]}),
        "texts[0]: give exactly one of 'bundled', 'file' and 'dataset'",
    ),
    "two texts of a name": (recipe(evaluation={"texts": ["prose", "prose"]}), "two texts are called 'prose'"),
    "two variants of a name": (
        recipe(variants=[{"name": "a"}, {"name": "b"}, {"name": "a"}]),
        "variants: two variants are called 'a': names must differ",
    ),
    "a device": (recipe(evaluation={"device": "tpu"}), "evaluation.device: 'tpu' is not a device: use auto, cpu"),
    "a device to quantize on": (
        recipe(quantization={"device": "cuda:x"}),
        "quantization.device: 'cuda:x' is not a device: use auto, cpu",
    ),
    "a report format": (recipe(report={"formats": ["pdf"]}), "report.formats[0]: 'pdf' is not allowed"),
    "an adapter's weight": (
        recipe(model={"source": "x", "adapter": {"source": "y", "weight": 0}}),
        "model.adapter[0].weight: an adapter of weight 0 changes nothing",
    ),
    "a merge of nothing": (recipe(merge={"base": "nf4"}), "section 'merge' has no meaning without model.adapter"),
    "a merge compared with itself": (
        recipe(model={"source": "x", "adapter": "y"}, merge={"compare": "original"}),
        "merge: compare is the base that is merged into anyway (original)",
    ),
    "an ignore pattern": (variant(ignore=["("]), "variants[0].ignore: '(' is not a regular expression: missing )"),
    "an override pattern": (variant(overrides={"*": {"bits": 8}}), "variants[0].overrides: '*' is not a regular expr"),
    "a gate": (recipe(gates=["kl is small"]), "gate 'kl is small' is not a condition (write PATH <= NUMBER"),
    "a gate's metric": (recipe(gates=["perplexty <= 9"]), "unknown metric 'perplexty' (did you mean 'perplexity'?"),
    "a gate's text": (
        recipe(gates=["kl_divergence.prosa.mean <= 1"]),
        "no text is called 'prosa' (did you mean 'prose'? known: answers, prose)",
    ),
    "a gate on a metric that is not taken": (
        recipe(gates=["kl_divergence.mean <= 1"], evaluation={"metrics": ["perplexity"]}),
        "needs kl_divergence (add kl_divergence to evaluation.metrics)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_path_of_its_key(mistake: str) -> None:
    data, expected = MISTAKES[mistake]
    assert expected in refusal(data)


BROKEN_TEXTS = {
    "an alias": ("a: &x [1]\nb: [*x, *x]\n", "aliases (*name) are not allowed"),
    "a bomb of aliases": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "aliases (*name) are not allowed",
    ),
    "a repeated key": ("name: a\nname: b\n", "key 'name' is given twice"),
    "a repeated key inside": ("name: a\nmodel: {source: x, source: y}\n", "key 'source' is given twice"),
    "a key that is a list": ("? [a]\n: b\n", "a key must be a plain name"),
    "a tag that builds an object": ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    "a date that cannot be": ("name: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
    "a number that cannot be": (f"name: {'9' * 5000}\n", "not valid YAML"),
    "endless nesting": ("[" * 20000, "not valid YAML"),
    "not YAML": ("name: [", "not valid YAML"),
    "a list": ("- name\n", "is not a mapping of keys to values (start with 'name:' and 'model:')"),
    "nothing": ("", "is not a mapping of keys to values"),
}


@pytest.mark.parametrize("kind", BROKEN_TEXTS)
def test_a_text_that_is_no_recipe_is_refused_on_one_line(kind: str) -> None:
    text, expected = BROKEN_TEXTS[kind]
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a" * (MAX_RECIPE_BYTES + 1), f"is larger than {MAX_RECIPE_BYTES} bytes"),
        ("name: käse".encode("latin-1"), "is not UTF-8 text"),
        (bytes(range(256)) * 16, "is not UTF-8 text"),
        (b"\x00\x01\x02" * 100, "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_its_name(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "demo.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    assert str(file) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_a_missing_file_and_an_endless_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: Is a directory"):
        Recipe.load(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: No such file or directory \(check the path\)"):
        Recipe.load(tmp_path / "none.yaml")
    if os.path.exists("/dev/zero"):  # noqa: PTH110 - a device, not a path of the test
        with pytest.raises(RecipeError, match="is larger than"):
            Recipe.load("/dev/zero")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(recipe()).encode())
    assert Recipe.load(file).name == "demo"


def test_an_error_inside_a_validator_comes_out_as_a_recipe_error_for_every_section() -> None:
    with pytest.raises(RecipeError, match=r"^here: method: unknown method 'x'"):
        parse_section(VariantSpec, {"name": "a", "method": "x"}, "here")
    with pytest.raises(RecipeError, match=r"^here: bits 9 is not a width"):
        parse_section(VariantSpec, {"name": "a", "bits": 9}, "here")
    with pytest.raises(RecipeError, match=r"^here: device: 'x' is not a device"):
        parse_section(EvaluationSpec, {"device": "x"}, "here")


def test_defaults_fill_what_a_variant_leaves_open_and_no_more() -> None:
    found = parsed(
        recipe(
            defaults={"bits": 8, "group_size": 32, "symmetric": False},
            variants=[{"name": "a"}, {"name": "b", "bits": 4, "group_size": 64}],
        )
    )
    assert found.own_variants[0].schemes() == [IntScheme(8, 32, False)]
    assert found.own_variants[1].schemes() == [IntScheme(4, 64, False)]


def test_an_option_among_the_defaults_goes_to_the_variants_whose_method_has_it() -> None:
    found = parsed(
        recipe(
            defaults={"damping": 0.25},
            variants=[{"name": "a", "method": "gptq"}, {"name": "b", "method": "rtn"}],
        )
    )
    assert found.own_variants[0].method_options().model_dump()["damping"] == 0.25
    assert "damping" not in found.own_variants[1].options


def test_an_option_among_the_defaults_that_no_variant_has_is_refused() -> None:
    message = refusal(recipe(defaults={"damping": 0.25}, variants=[{"name": "b", "method": "rtn"}]))
    assert "unknown key 'defaults.damping'" in message


def test_a_method_among_the_defaults_brings_its_options() -> None:
    found = parsed(recipe(defaults={"method": "gptq", "damping": 0.25}, variants=[{"name": "a"}]))
    assert found.own_variants[0].options == {"damping": 0.25}


def test_the_first_override_that_matches_wins_and_ignore_beats_them_all() -> None:
    found = parsed(
        variant(
            ignore=["lm_head", r"layers\.1\.mlp"],
            overrides={r"down_proj$": {"bits": 8}, "mlp": {"bits": 3, "symmetric": False}, "proj": {"group_size": 32}},
        )
    ).own_variants[0]
    assert found.scheme_of("model.layers.0.mlp.down_proj") == IntScheme(8, 64, True)
    assert found.scheme_of("model.layers.0.mlp.up_proj") == IntScheme(3, 64, False)
    assert found.scheme_of("model.layers.0.self_attn.q_proj") == IntScheme(4, 32, True)
    assert found.scheme_of("model.layers.0.other") == IntScheme(4, 64, True)
    assert found.scheme_of("model.layers.1.mlp.down_proj") is None
    assert found.scheme_of("lm_head") is None


def test_a_key_that_is_not_given_is_the_schemes_own() -> None:
    assert parsed(variant()).own_variants[0].base_scheme() == IntScheme()
    assert parsed(variant(scheme="fp8")).own_variants[0].base_scheme() == Fp8Scheme()
    assert parsed(variant(scheme="fp8", granularity="block")).own_variants[0].base_scheme() == Fp8Scheme("block")
    w8a8 = parsed(variant(bits=8, group_size=-1, activations="dynamic")).own_variants[0]
    assert w8a8.base_scheme() == IntScheme(8, -1, True, activations="dynamic")


def test_defaults_that_the_scheme_of_a_variant_does_not_take_are_left_out() -> None:
    found = parsed(
        recipe(
            defaults={"bits": 8, "group_size": -1, "symmetric": True, "granularity": "tensor", "method": "rtn"},
            variants=[{"name": "a"}, {"name": "b", "scheme": "fp8"}, {"name": "c", "scheme": "mxfp4"}],
        )
    )
    assert [each.base_scheme() for each in found.own_variants] == [IntScheme(8, -1), Fp8Scheme("tensor"), Mxfp4Scheme()]


def test_a_scheme_among_the_defaults_is_that_of_all_variants() -> None:
    found = parsed(recipe(defaults={"scheme": "fp8", "granularity": "block"}, variants=[{"name": "a"}]))
    assert found.own_variants[0].base_scheme() == Fp8Scheme("block")


def test_a_key_of_a_scheme_among_the_defaults_that_no_variant_has_is_refused() -> None:
    message = refusal(recipe(defaults={"double_quant": False}))
    assert "defaults.double_quant: no variant has a scheme that takes it (these do: fp4, nf4)" in message


def test_a_patch_of_another_scheme_begins_from_its_defaults() -> None:
    patches = {"down": {"scheme": "int", "bits": 8}, "up": {"scheme": "fp8", "activations": "dynamic"}}
    found = parsed(variant(scheme="fp8", granularity="tensor", overrides=patches)).own_variants[0]
    assert found.scheme_of("down") == IntScheme(8)
    assert found.scheme_of("up") == Fp8Scheme("tensor", "dynamic")


def test_a_patch_can_take_back_what_the_variant_gives() -> None:
    patch = {"activations": "none", "bits": 4, "group_size": 32}
    found = parsed(variant(bits=8, group_size=-1, activations="dynamic", overrides={"down": patch})).own_variants[0]
    assert found.scheme_of("down") == IntScheme(4, 32)


def test_overrides_come_before_first_and_last_blocks_and_what_is_ignored_before_all() -> None:
    found = parsed(
        variant(
            ignore=["lm_head", "gate"],
            overrides={"down": {"bits": 3}},
            first_blocks={"count": 2, "bits": 8},
            last_blocks={"count": 1, "scheme": "fp8"},
        )
    ).own_variants[0]
    of = {block: found.scheme_of("up", block, 5) for block in range(5)}
    assert of == {0: IntScheme(8), 1: IntScheme(8), 2: IntScheme(4), 3: IntScheme(4), 4: Fp8Scheme()}
    assert found.scheme_of("up") == IntScheme(4)
    assert found.scheme_of("down", 0, 5) == found.scheme_of("down", 4, 5) == IntScheme(3)
    assert found.scheme_of("gate", 0, 5) is None
    assert found.schemes() == [IntScheme(4), IntScheme(3), IntScheme(8), Fp8Scheme()]


def test_a_scheme_that_occurs_twice_is_named_once() -> None:
    found = parsed(variant(overrides={"q": {"bits": 8}, "k": {"bits": 8}, "v": {"bits": 4}})).own_variants[0]
    assert found.schemes() == [IntScheme(4), IntScheme(8)]


def test_a_composed_method_has_the_options_of_both() -> None:
    found = parsed(variant(method="awq+gptq", damping=0.2, alphas=7)).own_variants[0]
    assert (found.options["damping"], found.options["alphas"]) == (0.2, 7)
    assert found.needs() == TRANSFORMS.get("awq").needs | METHODS.get("gptq").needs


def test_warnings_name_their_variant_and_come_once_for_each_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    def warnings(scheme: Scheme) -> tuple[str, ...]:
        return (f"{scheme.bits} bits are few",) if scheme.bits < 4 else ()

    monkeypatch.setattr(METHODS.get("rtn"), "warnings", staticmethod(warnings), raising=False)
    variants = [
        {"name": "a", "method": "rtn", "bits": 3, "overrides": {"q": {"symmetric": False}, "v": {"bits": 2}}},
        {"name": "b", "method": "rtn", "bits": 8},
    ]
    assert parsed(recipe(variants=variants)).warnings() == (
        "variant a: 3 bits are few",
        "variant a: 2 bits are few",
    )


def test_the_head_stays_float_unless_asked_for() -> None:
    assert parsed(variant()).own_variants[0].scheme_of("lm_head") is None
    assert parsed(variant(ignore=[])).own_variants[0].scheme_of("lm_head") == IntScheme()


def test_resolved_fills_in_every_default_and_option() -> None:
    data = parsed(recipe(variants=[{"name": "a", "method": "gptq", "damping": 0.5}])).resolved()
    assert data["calibration"]["samples"] == 128
    assert data["evaluation"]["texts"][0]["name"] == "prose"
    options = data["variants"][0]["options"]
    assert options["damping"] == 0.5
    assert set(options) == set(METHODS.get("gptq").Options.model_fields)


def test_a_resolved_recipe_and_a_written_one_mean_the_same_as_the_first() -> None:
    first = parsed(
        recipe(
            defaults={"bits": 8, "damping": 0.25},
            variants=[{"name": "a", "bits": 4}, {"name": "b", "method": "rtn", "overrides": {"q": {"bits": 2}}}],
            gates=["kl_divergence.mean <= 1"],
        )
    )
    assert first.own_variants[0].bits == 4
    written = Recipe.parse(first.to_yaml())
    assert written.variants == first.variants
    assert written.gates == first.gates
    assert parsed(first.resolved()).resolved() == first.resolved()


def test_a_resolved_variant_has_every_key_of_its_scheme_and_no_other() -> None:
    data = parsed(variant(scheme="fp8", first_blocks={"count": 1, "scheme": "int"})).resolved()["variants"][0]
    assert (data["scheme"], data["granularity"], data["activations"]) == ("fp8", "channel", "none")
    assert not {"bits", "group_size", "double_quant"} & set(data)
    assert data["first_blocks"] == {"scheme": "int", "count": 1}
    assert data["last_blocks"] is None


def test_variants_that_say_the_same_resolve_to_the_same() -> None:
    short = parsed(variant()).resolved()["variants"]
    assert (
        parsed(variant(scheme="int", bits=4, group_size=64, symmetric=True, range_weights="solver")).resolved()[
            "variants"
        ]
        == short
    )


def test_a_recipe_with_every_key_of_a_scheme_survives_being_written() -> None:
    first = parsed(
        recipe(
            defaults={"bits": 8, "first_blocks": {"count": 1, "bits": 6}, "granularity": "block"},
            variants=[
                {"name": "a", "group_size": -1, "activations": "dynamic", "first_blocks": None},
                {"name": "b", "symmetric": False, "last_blocks": {"count": 3, "scheme": "fp8"}},
                {"name": "c", "scheme": "fp8", "method": "rtn", "first_blocks": {"count": 1, "granularity": "tensor"}},
            ],
        )
    )
    assert parsed(yaml.safe_load(first.to_yaml())).resolved()["variants"] == first.resolved()["variants"]
    assert parsed(first.resolved()).resolved() == first.resolved()
    assert yaml.safe_load(first.to_yaml())["variants"][0]["name"] == "a"
    assert first.to_yaml().index("name: a") < first.to_yaml().index("bits: 8")


def test_a_recipe_is_frozen() -> None:
    found = parsed(recipe())
    with pytest.raises(ValidationError, match="frozen"):
        found.name = "other"  # type: ignore[misc]  # what is tested
    with pytest.raises(ValidationError, match="frozen"):
        found.own_variants[0].bits = 8  # type: ignore[attr-defined]  # what is tested


def test_short_texts_are_bundled_ones_or_files() -> None:
    found = parsed(recipe(evaluation={"texts": ["answers", "data/my notes.txt"]})).evaluation.texts
    assert (found[0].name, found[0].bundled) == ("answers", "answers")
    assert (found[1].name, found[1].file) == ("my-notes", "data/my notes.txt")


def test_results_lie_under_the_recipes_name_unless_a_folder_is_given() -> None:
    assert parsed(recipe()).folder == Path("reports/demo")
    assert parsed(recipe(report={"folder": "out/here"})).folder == Path("out/here")


def schemes_of_pair(method: str, store: str) -> list[str]:
    """The kinds of scheme that a method and a format both take."""
    taken = []
    for kind in SCHEMES.names():
        with contextlib.suppress(RecipeError):
            found = parsed(variant(method=method, format=store, scheme=kind)).own_variants[0]
            assert (found.method, found.format, found.scheme) == (method, store, preset_named(kind))
            taken.append(kind)
    return taken


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_goes_with_a_format(method: str) -> None:
    assert any(schemes_of_pair(method, store) for store in FORMATS.names())


@pytest.mark.parametrize("store", FORMATS.names())
def test_every_format_that_is_written_goes_with_a_method(store: str) -> None:
    taken = any(schemes_of_pair(method, store) for method in METHODS.names())
    assert taken is not bool(FORMATS.get(store).read_only)


def test_every_mistake_is_a_quantkit_error() -> None:
    assert issubclass(RecipeError, QuantkitError)
