"""What a variant does to the layers of a model, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.methods import METHODS
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.recipe import VariantSpec
from quantkit.schemes import Fp8Scheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme
from quantkit.system.validation import parse_section
from tests.runs import make_recipe, write_records
from tests.tiny import make_model

BLOCKS = 5
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def skeleton(model: Path) -> Skeleton:
    return Skeleton(model)


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", **keys}, "test")


def refusal(skeleton: Skeleton, **keys: Any) -> str:
    with pytest.raises(SchemeError) as caught:
        plan_layers(skeleton, variant(**keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_first_and_last_blocks_get_their_schemes_and_the_head_none_of_them(skeleton: Skeleton) -> None:
    blocks = {"first_blocks": {"count": 1, "bits": 8}, "last_blocks": {"count": 2, "scheme": "fp8"}}
    layers = plan_layers(skeleton, variant(ignore=[], **blocks))
    of_block = {
        index: {scheme for name, scheme in layers.schemes.items() if f"layers.{index}." in name}
        for index in range(BLOCKS)
    }
    middle: set[Scheme | None] = {IntScheme()}
    assert of_block == {0: {IntScheme(8)}, 1: middle, 2: middle, 3: {Fp8Scheme()}, 4: {Fp8Scheme()}}
    assert layers.schemes["lm_head"] == IntScheme()


@pytest.mark.parametrize("counts", [(BLOCKS + 1, 0), (0, BLOCKS + 1), (3, 3)])
def test_more_blocks_than_the_model_has_are_refused(skeleton: Skeleton, counts: tuple[int, int]) -> None:
    keys = ("first_blocks", "last_blocks")
    given = {key: {"count": count, "bits": 8} for key, count in zip(keys, counts, strict=True) if count}
    message = refusal(skeleton, **given)
    assert f"the model has {BLOCKS} decoder blocks" in message
    assert all(f"{key}.count {patch['count']}" in message for key, patch in given.items())


FUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"overrides": {"q_proj": {"bits": 8}}}, "q_proj is int8 g64 sym, k_proj is int4 g64 sym, v_proj is int4"),
    "a float layer": ({"ignore": ["lm_head", "v_proj"]}, "k_proj is int4 g64 sym, v_proj is float"),
    "group sizes": ({"overrides": {"up_proj": {"group_size": 32}}}, "gate_proj is int4 g64 sym, up_proj is int4 g32"),
    "signs": ({"overrides": {"gate_proj": {"symmetric": False}}}, "gate_proj is int4 g64 asym, up_proj is int4 g64 sy"),
    "a scheme": ({"overrides": {"k_proj": {"scheme": "fp8"}}}, "k_proj is fp8 channel"),
}


@pytest.mark.parametrize("kind", FUSED)
def test_layers_that_servers_fuse_must_agree(skeleton: Skeleton, kind: str) -> None:
    keys, words = FUSED[kind]
    message = refusal(skeleton, **keys)
    assert message.startswith("v: in model.layers.0.")
    assert words in message
    assert "vLLM load these layers of a compressed-tensors checkpoint as one matrix" in message
    assert "_proj)'" in message


@pytest.mark.parametrize(
    "keys",
    [
        {"overrides": {"(q|k|v)_proj": {"bits": 8}}},
        {"overrides": {"o_proj": {"bits": 8}, "down_proj": {"bits": 3}}},
        {"ignore": ["lm_head", r"layers\.0\."]},
        {"ignore": ["lm_head", "(gate|up)_proj"], "first_blocks": {"count": 1, "bits": 8}},
    ],
)
def test_layers_that_agree_are_planned(skeleton: Skeleton, keys: dict[str, Any]) -> None:
    assert plan_layers(skeleton, variant(**keys)).quantized


def test_a_format_whose_runtimes_fuse_nothing_takes_any_mixture(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FORMATS.get("compressed-tensors"), "fused", ())
    layers = plan_layers(skeleton, variant(overrides={"q_proj": {"bits": 8}}))
    assert layers.schemes[f"{ATTENTION}.q_proj"] == IntScheme(8)
    assert layers.schemes[f"{ATTENTION}.k_proj"] == IntScheme(4)


@dataclass(frozen=True, slots=True)
class EvenRows(Mxfp4Scheme):
    """A scheme that looks at the rows of a layer too."""

    kind: ClassVar[str] = "even"

    def check_layer(self, out_features: int, in_features: int) -> None:
        if out_features == 32:
            raise SchemeError(f"{out_features} rows and {in_features} columns do not suit", "take another")


def test_a_scheme_sees_rows_and_columns_of_each_layer(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VariantSpec, "scheme_of", lambda *_: EvenRows())
    message = refusal(skeleton, strict=True)
    place = f"v: {ATTENTION}.k_proj: 32 rows and 64 columns do not suit"
    assert message.startswith(f"{place} (take another; or leave out strict: true, and weights like 11.1% of the")


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (IntScheme(4, 32, False), 96 * 128 / 2 + 96 * 4 * (2 + 0.5) + 16),
        (Fp8Scheme("tensor"), 96 * 128 + 2),
        (Fp8Scheme("channel"), 96 * 128 + 96 * 2),
        (Fp8Scheme("block"), 96 * 128 + 2),
        (Mxfp4Scheme(), 96 * 128 / 2 + 96 * 4),
        (Nvfp4Scheme(), 96 * 128 / 2 + 96 * 8 + 4),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else "",
)
def test_the_bytes_of_a_layer_are_codes_and_scales(scheme: Scheme, expected: float) -> None:
    layers = Layers({"a": scheme, "b": None}, {"a": (96, 128), "b": (4, 4)})
    assert CompressedTensors("float16").layer_bytes(scheme, 96, 128) == expected
    assert layers.weights() == 96 * 128


def bytes_of(folder: Path, layers: Mapping[str, Scheme]) -> int:
    reader = CheckpointReader(folder)
    prefixes = tuple(f"{name}." for name in layers)
    return sum(reader.nbytes(name) for name in reader.names() if name.startswith(prefixes))


@pytest.mark.parametrize("keys", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 32, "symmetric": False}])
def test_the_plan_foretells_what_is_written(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    layers = plan_layers(Skeleton(model), variant(**keys))
    written = quantkit.quantize(model, out=tmp_path / "out", method="rtn", **keys)
    store = CompressedTensors("bfloat16")
    told = sum(store.layer_bytes(scheme, *layers.shapes[name]) for name, scheme in layers.quantized.items())
    assert told == bytes_of(written, layers.quantized)


def test_a_plan_names_every_scheme_with_its_layers_and_the_warnings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warnings(scheme: Scheme) -> tuple[str, ...]:
        return ("so few bits",) if scheme.bits == 3 else ()

    monkeypatch.setattr(METHODS.get("rtn"), "warnings", staticmethod(warnings), raising=False)
    records = write_records(tmp_path / "records.jsonl")
    keys: dict[str, Any] = {"bits": 3, "overrides": {"down_proj": {"bits": 8}}}
    found = quantkit.plan(make_recipe(model, records, tmp_path / "run", [{"name": "a", "method": "rtn", **keys}]))
    (row,) = found["variants"]
    assert row["scheme"] == "int3 g32 sym"
    assert row["schemes"] == {"int3 g32 sym": 6 * BLOCKS, "int8 g32 sym": BLOCKS}
    assert "variant a: so few bits" in found["warnings"]
