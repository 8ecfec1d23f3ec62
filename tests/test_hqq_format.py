"""hqq: the tensors of the package, and every scheme that it can hold read back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.hqq import HqqFormat
from quantkit.methods.base import InputStatistics
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.runtimes._choice import choose_runtime
from quantkit.schemes import PER_CHANNEL, IntScheme, Mxfp4Scheme, Nf4Scheme, QuantizedWeight
from quantkit.system.validation import parse_section
from tests.runs import load_model
from tests.tiny import make_model, tiny_method

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TENSORS = {
    "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype",
    "view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
}  # fmt: skip
"""What ``HQQLinear.state_dict_keys`` of hqq 0.2.8 lists, but for the bias."""
AXES: tuple[Literal[0, 1], ...] = (0, 1)
names = IntScheme.describe


def all_schemes() -> list[IntScheme]:
    """Every width, axis and kind of zero, and one scale per channel."""
    return [
        scheme
        for bits in range(1, 9)
        for axis in AXES
        for scheme in (
            IntScheme(bits, 16, False, "float", axis),
            IntScheme(bits, 16, False, "int", axis),
            *([IntScheme(bits, 16, True, "int", axis)] if bits > 1 else []),
            *([IntScheme(bits, PER_CHANNEL, False)] if axis == 1 else []),
        )
    ]


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    """Any codes, zeros, and scales of both signs."""
    shape = (rows * columns // scheme.group_size, 1) if scheme.axis == 0 else (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    stored = (torch.randn(shape) * scheme.levels).to(dtype) if scheme.zeros == "float" else zeros.to(torch.uint8)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    return QuantizedWeight(scheme, codes, torch.randn(shape).mul_(0.02).to(dtype), stored)


def text(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def assert_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert found.scheme == wanted.scheme
    for ours, other in (
        (found.codes, wanted.codes), (found.scales, wanted.scales), (found.zeros, wanted.zeros)
    ):  # fmt: skip
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", all_schemes(), ids=names)
def test_every_scheme_survives_the_disk(scheme: IntScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    HqqFormat.check(scheme)
    weight, store = random_weight(scheme, 16, 48, dtype), HqqFormat()
    tensors = store.pack(weight)
    assert set(tensors) == set(store.layer_suffixes(scheme)) == TENSORS
    save_file(tensors, tmp_path / "layer.safetensors")
    assert_same(store.unpack(load_file(tmp_path / "layer.safetensors"), scheme), weight)


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(all_schemes()),
    rows=st.sampled_from([8, 16, 24, 40]),
    columns=st.sampled_from([16, 32, 80]),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_what_was_packed(scheme: IntScheme, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = random_weight(scheme, rows, columns, torch.float16)
    assert_same(HqqFormat().unpack(HqqFormat().pack(weight), scheme), weight)


def counting(bits: int, groups: int, size: int) -> QuantizedWeight:
    """Groups whose codes are all the group's number."""
    codes = (torch.arange(groups) % (1 << bits)).repeat_interleave(size).to(torch.uint8).view(groups, size)
    return QuantizedWeight(IntScheme(bits, size, False), codes, torch.ones(groups, 1), torch.zeros(groups, 1).byte())


@pytest.mark.parametrize(
    ("bits", "groups", "words"),
    [
        (1, 8, [0b01010101]),
        (2, 8, [0b00100010, 0b01110111]),
        (3, 12, [0o0246020000, 0o1357130000]),
        (4, 6, [0x03, 0x14, 0x25]),
        (5, 3, [0, 1, 2]),
        (8, 3, [0, 1, 2]),
    ],
)
def test_the_words_are_those_of_the_package(bits: int, groups: int, words: list[int]) -> None:
    """Groups ``k``, ``k + n``, ``k + 2n`` ... share word ``k`` of ``n``, the first in the highest bits."""
    packed = HqqFormat().pack(counting(bits, groups, 4))["W_q"]
    assert packed.dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert packed.shape == (len(words), 4)
    assert packed[:, 0].tolist() == words
    assert bool((packed == packed[:, :1]).all())


def test_what_describes_a_layer_is_encoded_as_the_package_does() -> None:
    """As read from a file that transformers 4.57.6 saved with hqq 0.2.8."""
    tensors = HqqFormat().pack(random_weight(IntScheme(4, 16, False, "float"), 8, 32, torch.float16))
    assert text(tensors["packing"]) == "4bit_u8"
    assert text(tensors["compute_dtype"]) == "torch.float16"
    assert text(tensors["unpack_view_dtype"]) == "torch.uint8"
    assert tensors["shape"].tolist() == [8, 32]
    assert tensors["shape"].dtype == torch.int64
    for name, value in (("nbits", 4), ("group_size", 16), ("axis", 1)):
        assert (tensors[name].item(), tensors[name].dtype, tensors[name].ndim) == (value, torch.int32, 0)
    for name, flag in (("channel_wise", 1), ("encoded_state_dict", 1), ("quant_scale", 0), ("view_as_float", 0)):
        assert (tensors[name].item(), tensors[name].dtype, tensors[name].ndim) == (flag, torch.uint8, 0)


@pytest.mark.parametrize("scheme", [IntScheme(4, 16, False, "float", axis) for axis in AXES], ids=names)
def test_scales_lie_as_the_package_broadcasts_them(scheme: IntScheme) -> None:
    weight = random_weight(scheme, 16, 32, torch.float32)
    tensors = HqqFormat().pack(weight)
    assert tensors["scale"].shape == ((1, 32) if scheme.axis == 0 else (32, 1))
    matrix = weight.codes.reshape((16, -1) if scheme.axis == 0 else (-1, 16))
    assert torch.equal(((matrix - tensors["zero"]) * tensors["scale"]).reshape(16, 32), weight.dequantize())


def test_a_channel_tells_its_width_as_its_group() -> None:
    tensors = HqqFormat().pack(random_weight(IntScheme(4, PER_CHANNEL, False), 8, 48, torch.float32))
    assert tensors["group_size"].item() == 48


@pytest.mark.parametrize("scheme", [Nf4Scheme(), Mxfp4Scheme(), IntScheme(8, PER_CHANNEL, activations="dynamic")])
def test_other_schemes_are_refused_with_what_works(scheme: Nf4Scheme | Mxfp4Scheme | IntScheme) -> None:
    with pytest.raises(SchemeError, match=r"does not store .*int schemes of 1 to 8 bits"):
        HqqFormat.check(scheme)


def test_groups_that_fill_no_whole_bytes_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"packs 8 1-bit codes .*group_size that 8 divides"):
        HqqFormat.check(IntScheme(1, 12, False, axis=0))
    HqqFormat.check(IntScheme(3, 12, axis=0))
    with pytest.raises(SchemeError, match=r"multiple of 4 groups, and a layer of shape \[3, 16\] has 3 .*ignore"):
        HqqFormat().pack(random_weight(IntScheme(2, 16), 3, 16, torch.float32))


def test_the_config_names_what_stays_float() -> None:
    scheme = IntScheme(4, PER_CHANNEL, False, "float")
    config = HqqFormat().quantization_config({"a": scheme, "b": IntScheme(2, 16, axis=0), "lm_head": None})
    assert config["quant_method"] == "hqq"
    assert config["skip_modules"] == ["lm_head"]
    assert config["quant_config"]["weight_quant_params"] == {
        "nbits": 4, "channel_wise": True, "group_size": None, "optimize": True, "round_zero": False, "axis": 1,
        "view_as_float": False,
    }  # fmt: skip


def test_the_remarks_say_who_loads_it() -> None:
    (plain,) = HqqFormat().remarks([IntScheme(4)])
    assert "transformers 4 (4.57 is tested)" in plain
    assert "transformers 5, up to 5.23 at least, does not read the layers" in plain
    assert "5, 7 bits are stored in 8" in HqqFormat().remarks([IntScheme(7), IntScheme(5), IntScheme(4)])[1]
    assert not FORMATS.get("hqq").loads_in("transformers")


@pytest.mark.parametrize("keys", [{"bits": 4, "axis": 0}, {"bits": 3, "axis": 1}], ids=str)
def test_an_exported_model_decodes_to_what_the_method_chose(tmp_path: Path, keys: dict[str, int]) -> None:
    source = make_model(tmp_path / "source")
    scheme = {"group_size": 32, "symmetric": False, "zeros": "float", **keys}
    spec = parse_section(VariantSpec, {"name": "v", "method": "hqq", "format": "hqq", **scheme}, "test")
    facts = {"reference": "tiny", "relative_to": "the float model", "dtype": "float32"}
    folder = quantize(Job(source, facts, "float32", rows=[], device="cpu"), spec, tmp_path / "out").folder
    assert choose_runtime(folder).name == "reference"
    model = load_model(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(source / "model.safetensors")[name]
    chosen = tiny_method("hqq").quantize(weight, InputStatistics(), spec.base_scheme(), torch.float32).weight
    assert torch.equal(model.state_dict()[name], chosen.dequantize())
