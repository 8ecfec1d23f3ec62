"""Names as people type them: any case, the words of the field, and what cannot be done said by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from quantkit.errors import QuantkitError, RecipeError, SchemeError
from quantkit.formats import FORMATS
from quantkit.gates import check_gate_syntax, parse_gate
from quantkit.recipe import EvaluationSpec, ModelSpec, Recipe, VariantSpec
from quantkit.recipe.scheme_names import scheme_named
from quantkit.runtimes import RUNTIMES
from quantkit.schemes import Fp8Scheme, IntScheme, Nf4Scheme, make_scheme
from quantkit.system.validation import parse_section

INT4, INT8 = IntScheme(4), IntScheme(8)
ROUNDED = IntScheme(8, -1, activations="dynamic")
SCHEME_NAMES = {
    "W4A16": INT4, "w4a16_asym": IntScheme(4, symmetric=False), "W4A16-G128": IntScheme(4, 128), "a16w8": INT8,
    "W8A8": ROUNDED, "w8a8_int8": ROUNDED, "INT8_DYNAMIC": ROUNDED, "int8": INT8, "INT4": INT4, "4bit": INT4,
    "8-bit": INT8, "int4wo": INT4, "uint4": IntScheme(4, symmetric=False), "int8-channel": IntScheme(8, -1),
    "FP8": Fp8Scheme(), "FP8_DYNAMIC": Fp8Scheme(activations="dynamic"), "float8": Fp8Scheme(),
    "fp8-block": Fp8Scheme("block"), "blockwise_fp8": Fp8Scheme("block"), "fp8_e4m3fn": Fp8Scheme(), "i8": INT8,
    "int4-128g": IntScheme(4, 128), "W4A16-128g": IntScheme(4, 128), "int8_g64_wo": INT8,
    "u4": IntScheme(4, symmetric=False), "Int4WeightOnlyConfig": INT4, "nf4_double_quant": Nf4Scheme(),
    "Q3_K_L": make_scheme("q3_k_l", {}), "8": INT8, "mostly_q4_k_m": make_scheme("q4_k_m", {}),
    "Q5_K_S.gguf": make_scheme("q5_k_s", {}), "NVFP4": make_scheme("nvfp4", {}), "MXFP4A16": make_scheme("mxfp4", {}),
    "Q4_K_M": make_scheme("q4_k_m", {}), "q4-k-m": make_scheme("q4_k_m", {}), "IQ4_NL": make_scheme("iq4_nl", {}),
    "W4A8": IntScheme(4, activations="dynamic"), "W8A8-128g": IntScheme(8, 128, activations="dynamic"),
    "W4AFP8": IntScheme(4, 128, activations="fp8"), "FP8_STATIC": Fp8Scheme("tensor", "static"),
    "int8-static": IntScheme(8, -1, activations="static"), "int4 g32 sym a8": IntScheme(4, 32, activations="dynamic"),
    "NVFP4-W4A4": make_scheme("nvfp4", {"activations": "static"}),
    "mxfp4_a4": make_scheme("mxfp4", {"activations": "dynamic"}),
    "MXFP4xFP8": make_scheme("mxfp4", {"activations": "fp8"}),
    "BF16": make_scheme("bfloat16", {}), "fp16": make_scheme("float16", {}), "NF4": Nf4Scheme(),
}  # fmt: skip


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", **keys}, "demo")


def refusal(**keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        variant(**keys)
    return str(caught.value)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_a_name_of_the_field_is_the_scheme_that_it_means(name: str) -> None:
    keys = scheme_named(name)
    kind = keys.pop("scheme")
    assert (
        make_scheme(kind, {key: value for key, value in keys.items() if key not in ("format", "method")})
        == (SCHEME_NAMES[name])
    )


@pytest.mark.parametrize(
    ("name", "method", "scheme"),
    [
        ("INT4_AWQ", "awq", INT4),
        ("awq-4bit-128g", "awq", IntScheme(4, 128)),
        ("gptq-4bit-128g", "gptq", IntScheme(4, 128)),
        ("w8a16-hqq", "hqq", INT8),
        ("Q6_K", "gptq", make_scheme("q6_k_mix", {})),
        ("q2-k", "gptq", make_scheme("q2_k_mix", {})),
        ("gguf:Q6_K", "gptq", make_scheme("q6_k_mix", {})),
    ],
)
def test_a_name_before_or_behind_is_the_method_and_a_preset_of_llama_cpp_is_that(
    name: str, method: str, scheme: Any
) -> None:
    found = variant(scheme=name)
    assert (found.method, found.base_scheme()) == (method, scheme)


def test_a_preset_quantizes_head_and_embedding_and_a_patch_of_its_name_is_the_type() -> None:
    found = variant(scheme="Q6_K", overrides={"down_proj$": "Q2_K"})
    assert (found.ignore, found.embeddings is not None) == ((), True)
    assert found.scheme_of("x.down_proj") == make_scheme("q2_k", {})


def test_what_reports_call_a_scheme_is_a_name_of_it() -> None:
    for store in FORMATS:
        for example in store.examples:
            keys = {key: value for key, value in example.items() if key != "overrides"}
            scheme = make_scheme(keys.pop("scheme", "int"), {k: None if v == "none" else v for k, v in keys.items()})
            if scheme.kind in ("nf4", "fp4"):
                continue  # whose names leave out a key that they have
            found = scheme_named(scheme.describe())
            assert make_scheme(found.pop("scheme"), found) == scheme, scheme.describe()


@pytest.mark.parametrize(
    ("name", "format_", "method"),
    [("Q8_0", "gguf", "gptq"), ("bnb-4bit", "bitsandbytes", "rtn"), ("BNB_8bit", "bitsandbytes", "rtn")],
)
def test_a_name_of_one_format_brings_it(name: str, format_: str, method: str) -> None:
    found = variant(scheme=name)
    assert (found.format, found.method) == (format_, method)
    assert variant(scheme=name, method="hqq" if name == "Q8_0" else "gptq", format=format_).method != method


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("W4A4", "no 4-bit activations beside such 4-bit weights"),
        ("W8A8_ASYM", "no 8-bit activations beside such 8-bit weights"),
        ("IQ3_XXS", "llama.cpp has such a type"),
        ("Q3_K_XL", "did you mean 'q3_k_l'?"),
        ("int4:128", "unknown scheme 'int4:128'"),
        ("AWQ_MARLIN", "it is a kernel of vLLM"),
        ("marlin", "it is a kernel of vLLM"),
        ("gptq-5.5bpw", "unknown scheme 'gptq-5.5bpw'"),
        ("mxfp8", "quantkit has no such numbers"),
        ("fp8_e5m2", "E4M3"),
        ("int9", "quantkit has no integers of 9 bits"),
        ("16bit", "write float16 or bfloat16"),
        ("GPTQ", "it is a method and a format: write method: GPTQ"),
        ("nf5", "did you mean 'nf4'?"),
    ],
)
def test_a_scheme_that_cannot_be_is_refused_by_its_name(name: str, said: str) -> None:
    message = refusal(scheme=name)
    assert "demo: scheme: " in message
    assert f"'{name}'" in message
    assert said in message


def test_a_name_and_a_key_that_deny_each_other_are_refused() -> None:
    message = refusal(scheme="W4A16", bits=8)
    assert "scheme 'W4A16' means bits: 4, and bits: 8 stands beside it" in message
    assert variant(scheme="W4A16", bits=4, group_size=128).base_scheme() == IntScheme(4, 128)


def test_methods_formats_runtimes_and_other_choices_are_read_in_any_case() -> None:
    found = variant(method="AWQ+GPTQ", format="Compressed_Tensors", transforms=[])
    assert (found.method, found.format) == ("awq+gptq", "compressed-tensors")
    assert variant(method="Llama_CPP", scheme="Q4_K", format="GGUF").method == "llama.cpp"
    assert variant(method="RTN", scheme="nf4", format="BnB").format == "bitsandbytes"
    assert parse_section(ModelSpec, {"source": "x", "dtype": "BF16"}, "model").dtype == "bfloat16"
    scoring = parse_section(
        EvaluationSpec,
        {"metrics": ["PPL", "kl", "Top-1", "Speed"], "loader": "HF", "device": "GPU:0", "texts": ["Prose"]},
        "evaluation",
    )
    assert scoring.metrics == ("perplexity", "kl_divergence", "top1_agreement", "speed")
    assert (scoring.loader, scoring.device, scoring.texts[0].bundled) == ("transformers", "cuda:0", "prose")
    assert RUNTIMES.get("vLLM").name == "vllm"


def test_gates_are_read_as_people_write_them() -> None:
    for written, plain in {
        "ppl ≤ 10": "perplexity <= 10",
        "top1 ≥ 95 %": "top1_agreement >= 95%",
        "ppl =< 10": "perplexity <= 10",
        "PPL <= float + 5%": "perplexity <= baseline +5%",
        "ppl<=reference+5%": "perplexity <= baseline +5%",
        "top1 − 1%": "top1_agreement - 1%",  # noqa: RUF001 - a minus sign is meant
    }.items():
        found, wanted = parse_gate(written), parse_gate(plain)
        told = [(each.path, each.comparison, each.bound, each.kind) for each in (found, wanted)]
        assert told[0] == told[1], written


def test_patches_and_defaults_take_the_same_names() -> None:
    given = {
        "name": "demo",
        "model": {"source": "x"},
        "defaults": {"scheme": "W4A16", "group_size": 32, "format": "CT"},
        "variants": [
            {"name": "a", "overrides": {"down_proj$": "int8", "up": {"scheme": "FP8_DYNAMIC"}}},
            {"name": "b", "scheme": "W8A16"},
            {"name": "c", "bits": 4, "method": "RTN"},
        ],
    }
    a, b, c = Recipe.parse(yaml.safe_dump(given)).own_variants
    assert a.base_scheme() == c.base_scheme() == IntScheme(4, 32)
    assert b.base_scheme() == IntScheme(8, 32)
    assert a.scheme_of("x.down_proj") == IntScheme(8, 32)
    assert a.scheme_of("x.up") == Fp8Scheme(activations="dynamic")
    assert yaml.safe_load(Recipe.parse(yaml.safe_dump(given)).to_yaml())["variants"][1]["bits"] == 8


def test_a_name_of_another_part_is_told_where_it_belongs() -> None:
    assert "it is a library: write library: gptqmodel" in refusal(method="GPTQModel")
    assert "it is a scheme: write scheme: nf4" in refusal(method="nf4")
    assert "it is a format: write format: gguf" in refusal(method="GGUF")
    assert "it is a method: write method: rtn" in refusal(format="RTN")
    assert "did you mean 'gptq'?" in refusal(method="GPQT")


def test_libraries_and_their_methods_are_read_in_any_case() -> None:
    given = {
        "name": "demo", "model": {"source": "x"},
        "variants": [{"name": "l", "library": "GPTQModel", "method": "GPTQ", "bits": 4}],
    }  # fmt: skip
    found = Recipe.parse(yaml.safe_dump(given)).library_variants[0]
    assert (found.library, found.offer.method) == ("gptqmodel", "gptq")


@pytest.mark.parametrize(
    ("gate", "path", "on"),
    [
        ("ppl <= 9", "perplexity", None),
        ("PPL.prose <= 9", "perplexity", "prose"),
        ("kl <= 0.1", "kl_divergence.mean", None),
        ("KLD.held-out <= 0.1", "kl_divergence.mean", "held-out"),
        ("KL.prose.P99 <= 1", "kl_divergence.p99", "prose"),
        ("top1 >= 98%", "top1_agreement", None),
        ("size <= 4gb", "size_bytes", None),
        ("bpw <= 4.5", "bits_per_weight", None),
        ("ppl.评测 <= 9", "perplexity", "评测"),
    ],
)
def test_gates_take_the_words_of_the_field(gate: str, path: str, on: str | None) -> None:
    found = parse_gate(gate)
    assert (found.path, found.on) == (path, on)


def test_a_mistaken_gate_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'prose'"):
        check_gate_syntax("kl.prosa <= 1", ["prose", "answers"])
    with pytest.raises(RecipeError, match="did you mean 'mean'"):
        parse_gate("kl.prose.maen <= 1")


def test_a_device_of_another_kind_is_refused_by_its_name() -> None:
    with pytest.raises(QuantkitError, match="'mps' is not a device"):
        parse_section(EvaluationSpec, {"device": "mps"}, "evaluation")


def test_an_unknown_scheme_raises_the_error_of_schemes() -> None:
    with pytest.raises(SchemeError):
        scheme_named("nothing")
