"""K-quants, IQ4_NL and llama.cpp's mixtures: blocks taken apart, codes of llama.cpp, types by layer and depth."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quantkit.engine.solve import solve_groups
from quantkit.engine.stacks import InputGroup
from quantkit.engine.tasks import VariantTask
from quantkit.errors import QuantizationError, RecipeError, SchemeError
from quantkit.formats import FORMATS
from quantkit.gguf.kquants import decoded
from quantkit.llama_cpp.quantizer import quantize_rows
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Solution
from quantkit.methods.ggml import INTEGERS
from quantkit.recipe import VariantSpec
from quantkit.recipe.steps import steps_of
from quantkit.schemes import SCHEMES, GgmlMixture, GgmlScheme, IntScheme, Scheme, make_scheme
from quantkit.system.validation import parse_section
from tests.layers import random_weight
from tests.tiny import Collected, tiny_method

KINDS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl"]
MIXTURES = ["q2_k_mix", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k_mix"]
BITS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_nl": 4.5}
COLUMNS = 512
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ggml(kind: str) -> GgmlScheme:
    scheme = make_scheme(kind, {})
    assert isinstance(scheme, GgmlScheme)
    return scheme


def reference(blocks: torch.Tensor, ggml_type: str) -> torch.Tensor:
    """What the package gguf decodes blocks to."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[ggml_type]))


def strengths(columns: int = COLUMNS, seed: int = 3) -> torch.Tensor:
    """Mean squares of inputs of very unlike strength."""
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def solved(weight: torch.Tensor, scheme: Scheme, *, imatrix: bool = True, seen: torch.Tensor | None = None) -> Solution:
    statistics = InputStatistics(tokens=9, square_mean=strengths() if seen is None else seen)
    return tiny_method("llama.cpp", imatrix=imatrix).quantize(weight, statistics, scheme, torch.float16)


def random_blocks(scheme: GgmlScheme, rows: int = 40) -> torch.Tensor:
    """Blocks of random bits, but for exponents of float16 that stand for infinities and NaN."""
    draw = np.random.default_rng(5)
    blocks = draw.integers(0, 256, (rows, COLUMNS // scheme.block, scheme.block_bytes), dtype=np.uint8)
    halves = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,)}
    for start in halves[scheme.kind]:
        values = draw.normal(scale=0.01, size=blocks.shape[:2]).astype(np.float16)
        values[0, 0] = 0
        blocks[..., start : start + 2] = values[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def assert_decodes(found: torch.Tensor, wanted: torch.Tensor, scheme: GgmlScheme) -> None:
    """To the same numbers where there are no minima; else to a few units in the last place of the group's largest."""
    assert torch.isfinite(found).all()
    if not scheme.minima:
        assert torch.equal(found, wanted)
        return
    assert_near(found, wanted, scheme.group_size)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, size: int) -> None:
    """To a few units in the last place of the largest of each ``size`` weights."""
    largest = wanted.abs().view(wanted.shape[0], -1, size).amax(-1).repeat_interleave(size, dim=1)
    assert ((found - wanted).abs() <= 4e-7 * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_chose_decodes_as_the_package_gguf_decodes_it(kind: str) -> None:
    scheme = ggml(kind)
    found = solved(random_weight(24, COLUMNS), scheme).weight
    assert found.parts["blocks"].shape == (24, scheme.row_bytes(COLUMNS))
    assert found.codes.shape == (24, COLUMNS)
    assert found.scales.shape == found.zeros.shape == (24, COLUMNS // scheme.group_size)
    assert int(found.codes.max()) < 1 << scheme.bits
    assert_decodes(found.dequantize(), reference(found.parts["blocks"], scheme.ggml_type), scheme)


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_decodes_as_the_package_gguf_decodes_it(kind: str) -> None:
    scheme = ggml(kind)
    blocks = random_blocks(scheme)
    found = decoded(blocks, scheme)
    assert found.scales.dtype == torch.float32
    assert_decodes(found.dequantize(), reference(blocks, scheme.ggml_type), scheme)


@pytest.mark.parametrize("kind", ["q2_k", "q4_k", "q5_k"])
def test_a_group_without_a_scale_is_its_minimum(kind: str) -> None:
    scheme = ggml(kind)
    blocks = random_blocks(scheme, rows=1)
    # The scale of the second block; its minima stay.
    start = scheme.block_bytes + (80 if kind == "q2_k" else 0)
    blocks[0, start : start + 2] = 0
    found = decoded(blocks, scheme)
    groups = scheme.block // scheme.group_size
    assert (found.scales[0, groups:] == 1).all()
    assert (found.codes[0, scheme.block :] == 0).all()
    assert found.zeros[0, groups:].abs().max() > 0
    torch.testing.assert_close(found.dequantize(), reference(blocks, scheme.ggml_type), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_weight_are_the_bytes_of_the_blocks(kind: str) -> None:
    scheme = ggml(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[scheme.ggml_type]]
    assert (scheme.block, scheme.block_bytes) == (block, block_bytes)
    assert scheme.bits_per_weight(4096) == BITS[kind] == 8 * block_bytes / block


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_stack_are_those_of_the_layers(kind: str) -> None:
    scheme, sink = ggml(kind), Collected()
    weights = {"k": random_weight(8, COLUMNS, 1), "v": random_weight(16, COLUMNS, 2)}
    method = tiny_method("llama.cpp")
    task = VariantTask("variant", method, dict.fromkeys(weights, scheme), torch.float16, sink)
    statistics = InputStatistics(tokens=9, square_mean=strengths())
    for name, found in ((each.name, each.weight) for each in solve_groups(task, [InputGroup(weights, statistics)])):
        alone = method.quantize(weights[name], statistics, scheme, torch.float16).weight
        assert set(found.parts) == {"blocks", "importance"}
        for part in found.parts:
            assert torch.equal(found.parts[part], alone.parts[part])
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.dequantize(), alone.dequantize())


@pytest.mark.parametrize("scheme", [*map(ggml, KINDS), *INTEGERS], ids=lambda scheme: scheme.describe())
def test_an_importance_matrix_lowers_the_weighted_error(scheme: Scheme) -> None:
    weight = random_weight(48, COLUMNS)

    def error(*, imatrix: bool) -> float:
        found = solved(weight, scheme, imatrix=imatrix)
        difference = weight - found.weight.dequantize(torch.float32)
        weighted = (difference.square() * strengths()).sum(1)
        torch.testing.assert_close(found.error, weighted, rtol=1e-4, atol=0)
        return float(weighted.sum() / (weight.square() * strengths()).sum())

    if scheme == IntScheme(8, 32):  # llama.cpp's Q8_0 takes the range of each block, whatever the importance
        assert error(imatrix=True) == error(imatrix=False)
    else:
        assert error(imatrix=True) < 0.97 * error(imatrix=False)


@pytest.mark.parametrize("scheme", [*map(ggml, KINDS), *INTEGERS], ids=lambda scheme: scheme.describe())
def test_more_bits_leave_less_error(scheme: Scheme) -> None:
    weight = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(0))
    found = solved(weight, scheme, seen=torch.ones(COLUMNS))
    # A normal distribution loses about 6 dB a bit; the worst of these types is half as good as 2**-bits.
    assert float(found.error.sum() / found.energy.sum()) < 2.0 * 4.0**-scheme.bits


def test_importance_is_handed_over_only_where_it_was_used() -> None:
    weight = random_weight(4, COLUMNS)
    used = solved(weight, ggml("q4_k")).weight.parts["importance"]
    torch.testing.assert_close(used, strengths(), rtol=0, atol=0)
    assert "importance" not in solved(weight, ggml("q4_k"), imatrix=False).weight.parts
    nothing_known = tiny_method("llama.cpp").quantize(weight, InputStatistics(), ggml("q4_k"), torch.float16)
    assert "importance" not in nothing_known.weight.parts
    assert not tiny_method("llama.cpp", imatrix=False).needs
    assert tiny_method("llama.cpp").needs


def test_a_block_whose_inputs_were_all_zero_is_not_thrown_away() -> None:
    weight, seen = torch.randn(8, COLUMNS), strengths()
    seen[:256] = 0
    for scheme in (ggml("q4_k"), IntScheme(4, 32)):
        difference = weight - solved(weight, scheme, seen=seen).weight.dequantize(torch.float32)
        assert difference[:, :256].square().mean() < 0.02 * weight.square().mean()


def test_the_result_does_not_depend_on_threads() -> None:
    weight = random_weight(37, COLUMNS)
    one = quantize_rows(weight, strengths(), "Q4_K", threads=1)
    assert torch.equal(one, quantize_rows(weight, strengths(), "Q4_K", threads=5))
    assert torch.equal(one[:2], quantize_rows(weight[:2], strengths(), "Q4_K", threads=4))


@pytest.mark.parametrize(("scheme", "ggml_type"), INTEGERS.items(), ids=str)
def test_integer_types_decode_as_the_package_gguf_decodes_them(scheme: IntScheme, ggml_type: str) -> None:
    weight = random_weight(24, COLUMNS)
    weight[3, 32:64] = 0.25
    blocks = quantize_rows(weight, strengths(), ggml_type)
    found = solved(weight, scheme).weight
    assert found.scales.dtype == torch.float16
    exact = found.dequantize(torch.float32)
    wanted = reference(blocks, ggml_type)
    assert_near(exact, wanted, 32)
    if scheme.symmetric:
        assert torch.equal(exact, wanted)
    store = FORMATS.get("gguf")()
    assert torch.equal(reference(store.pack(store.fitted(found))["weight"], ggml_type), wanted)


@pytest.mark.parametrize(
    ("weight", "seen", "words"),
    [
        (torch.full((2, COLUMNS), torch.nan), strengths(), "a weight is not finite"),
        (torch.full((2, COLUMNS), 1e9), strengths(), "beyond the range of float16"),
        (torch.ones(2, COLUMNS), torch.full((COLUMNS,), torch.inf), "an input of the layer is not finite"),
    ],
)
@pytest.mark.parametrize(
    "scheme", [ggml("q4_k"), ggml("q6_k"), IntScheme(4, 32, symmetric=False, zeros="float")], ids=str
)
def test_numbers_that_do_not_fit_are_refused(
    weight: torch.Tensor, seen: torch.Tensor, words: str, scheme: Scheme
) -> None:
    with pytest.raises(QuantizationError, match=words):
        solved(weight, scheme, seen=seen)


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "awq+llama.cpp", "llama.cpp"])
def test_methods_that_take_any_grid_choose_their_codes(method: str, kind: str) -> None:
    steps_of(method).check(make_scheme(kind, {}))
    found = parse_section(VariantSpec, {"name": "a", "method": method, "scheme": kind}, "demo.yaml")
    assert (found.method, found.format) == (method, "gguf")


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES])
def test_what_is_for_integers_alone_refuses_them(kind: str) -> None:
    with pytest.raises(SchemeError, match=f"hqq fits integer grids, and {kind} is not one"):
        steps_of("hqq").check(make_scheme(kind, {}))
    with pytest.raises(RecipeError, match="hqq fits integer grids"):
        parse_section(VariantSpec, {"name": "a", "method": "hqq", "scheme": kind}, "demo.yaml")


@pytest.mark.parametrize("kind", ["nf4", "fp8", "mxfp4", "int"], ids=str)
def test_llama_cpp_refuses_what_is_no_type_of_its_own(kind: str) -> None:
    with pytest.raises(SchemeError, match=r"llama.cpp has no type .*q4_k_m.*group_size: 32"):
        METHODS.get("llama.cpp").check(make_scheme(kind, {}))


@pytest.mark.parametrize(
    "scheme", [*INTEGERS, *map(ggml, KINDS), *(make_scheme(kind, {}) for kind in MIXTURES)], ids=str
)
def test_llama_cpp_takes_its_own_types(scheme: Scheme) -> None:
    METHODS.get("llama.cpp").check(scheme)


def test_a_row_that_is_not_whole_blocks_is_refused_with_the_way_out() -> None:
    with pytest.raises(SchemeError, match=r"q4_k has blocks of 256 .*576 input columns.*q4_k_m.*'ignore'"):
        ggml("q4_k").check_layer(64, 576)
    ggml("q4_k").check_layer(64, 512)
    ggml("iq4_nl").check_layer(64, 576)


def types_of(kind: str, blocks: int, *, hidden: int, wide: int, values: int) -> dict[str, list[Scheme]]:
    """The schemes of the layers of a llama by their last name, block after block."""
    mixture = make_scheme(kind, {})
    shapes = dict.fromkeys(LLAMA, (hidden, hidden))
    shapes |= {"k_proj": (values, hidden), "v_proj": (values, hidden), "down_proj": (hidden, wide)}
    shapes |= {"gate_proj": (wide, hidden), "up_proj": (wide, hidden)}
    return {
        leaf: [
            mixture.for_layer(f"model.layers.{block}.x.{leaf}", block, blocks, shapes[leaf]) for block in range(blocks)
        ]
        for leaf in LLAMA
    }


def marked(schemes: list[Scheme], kind: str) -> list[int]:
    return [block for block, scheme in enumerate(schemes) if scheme.describe() == kind]


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m"])
@pytest.mark.parametrize(
    ("blocks", "more"),
    [
        (2, [1]),
        (12, [0, 3, 6, 9, 10, 11]),
        (24, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]),
        (30, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]),
    ],
)
def test_medium_mixtures_give_values_and_down_of_these_blocks_six_bits(kind: str, blocks: int, more: list[int]) -> None:
    found = types_of(kind, blocks, hidden=512, wide=768, values=256)
    base = kind.removesuffix("_m")
    for leaf, schemes in found.items():
        raised = more if leaf in ("v_proj", "down_proj") else []
        assert marked(schemes, "q6_k") == raised, leaf
        assert len(marked(schemes, base)) == blocks - len(raised)


def test_small_and_other_mixtures_as_llama_cpp_makes_them() -> None:
    found = types_of("q4_k_s", 32, hidden=512, wide=768, values=256)
    assert marked(found["v_proj"], "q5_k") == [0, 1, 2, 3] == marked(found["down_proj"], "q5_k")
    found = types_of("q3_k_m", 32, hidden=512, wide=768, values=256)
    assert marked(found["v_proj"], "q5_k") == [0, 1] == marked(found["down_proj"], "q5_k")
    assert len(marked(found["v_proj"], "q4_k")) == 30 == len(marked(found["down_proj"], "q4_k"))
    assert len(marked(found["o_proj"], "q4_k")) == 32 == len(marked(found["q_proj"], "q3_k"))
    for values, kind in ((256, "q3_k"), (128, "q4_k")):
        found = types_of("q2_k_mix", 16, hidden=512, wide=768, values=values)
        assert len(marked(found["v_proj"], kind)) == 16
        assert len(marked(found["o_proj"], "q3_k")) == 16 == len(marked(found["down_proj"], "q3_k"))
        assert len(marked(found["gate_proj"], "q2_k")) == 16
    found = types_of("q3_k_l", 16, hidden=512, wide=768, values=256)
    raised = {leaf for leaf, schemes in found.items() if len(marked(schemes, "q5_k")) == 16}
    assert raised == {"v_proj", "o_proj", "down_proj"}
    assert len(marked(found["q_proj"], "q3_k")) == 16
    for kind in ("q3_k_s", "q5_k_s", "q6_k_mix"):
        for schemes in types_of(kind, 16, hidden=512, wide=768, values=256).values():
            assert len(marked(schemes, kind[:4])) == 16


def test_a_model_of_eighty_blocks_with_shared_values_gets_five_bits_for_them() -> None:
    found = types_of("q4_k_m", 80, hidden=512, wide=768, values=64)
    assert set(marked(found["v_proj"], "q5_k")) | set(marked(found["v_proj"], "q6_k")) == set(range(80))
    assert not marked(types_of("q4_k_m", 80, hidden=512, wide=768, values=512)["v_proj"], "q5_k")


def test_layers_of_smollm2_fall_back_as_llama_quantize_says() -> None:
    # llama-quantize on SmolLM2-135M, Q4_K_M: attn_v to q8_0 or q5_0, 180 of 272 tensors fall back.
    found = types_of("q4_k_m", 30, hidden=576, wide=1536, values=192)
    fallen = [scheme for schemes in found.values() for scheme in schemes if isinstance(scheme, IntScheme)]
    assert len(fallen) == 180
    assert set(found["q_proj"]) == {IntScheme(5, 32)}
    assert found["v_proj"][29] == IntScheme(8, 32)
    assert found["v_proj"][3] == IntScheme(5, 32)
    assert found["down_proj"][29] == ggml("q6_k")


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("q2_k_mix", IntScheme(4, 32)),
        ("q3_k_m", IntScheme(4, 32)),
        ("q4_k_m", IntScheme(5, 32)),
        ("q5_k_m", IntScheme(5, 32, symmetric=False, zeros="float")),
        ("q6_k_mix", IntScheme(8, 32)),
    ],
)
def test_what_takes_the_place_of_a_type(kind: str, scheme: IntScheme) -> None:
    mixture = make_scheme(kind, {})
    assert mixture.for_layer("model.layers.1.mlp.up_proj", 1, 32, (64, 96)) == scheme
    with pytest.raises(SchemeError, match=r"blocks of 256 and 32 .*100 input columns.*'ignore'"):
        mixture.for_layer("model.layers.1.mlp.up_proj", 1, 32, (64, 100))


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_head_gets_six_bits_and_an_embedding_of_its_own_the_mixtures_base(kind: str) -> None:
    mixture = make_scheme(kind, {})
    assert isinstance(mixture, GgmlMixture)
    assert mixture.for_layer("lm_head", None, 12, (1000, 512)) == ggml("q6_k")
    assert mixture.for_layer("lm_head", None, 12, (1000, 576)) == IntScheme(8, 32)
    assert mixture.for_layer("model.embed_tokens", None, 12, (1000, 512)) == mixture.base


def test_layers_of_other_families_play_the_same_parts() -> None:
    mixture = make_scheme("q4_k_m", {})
    for name in (
        "gpt_neox.layers.0.attention.query_key_value",
        "model.layers.0.self_attn.qkv_proj",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
        "model.layers.0.mlp.fc2",
        "transformer.h.0.mlp.c_proj",
    ):
        assert mixture.for_layer(name, 0, 12, (512, 512)) == ggml("q6_k"), name
    assert mixture.for_layer("transformer.h.0.attn.c_proj", 0, 12, (512, 512)) == ggml("q4_k")


@pytest.mark.parametrize("kind", [kind for kind in SCHEMES.names() if kind not in MIXTURES])
def test_other_schemes_are_the_same_for_every_layer(kind: str) -> None:
    scheme = make_scheme(kind, {})
    assert scheme.for_layer("model.layers.0.mlp.down_proj", 0, 30, (64, 64)) is scheme
