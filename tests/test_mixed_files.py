"""Files that hold several schemes side by side: what a format offers, and that such files load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import quantkit
from quantkit.allocation.budget import allocated
from quantkit.allocation.units import CheckpointModel, units_of
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantkitError, SchemeError
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.formats.base import FLOAT, Format
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.gptq import GptqFormat
from quantkit.gguf.head import read_head
from quantkit.gguf.types import type_of
from quantkit.inspection.loading import loads
from quantkit.quantization import Job
from quantkit.quantization.stage import quantize
from quantkit.recipe import VariantSpec
from quantkit.recipe.mixing import AutoSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes import IntScheme, Scheme
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests.tiny import make_model

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


@pytest.mark.parametrize(("width", "tried"), [(512, {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}), (576, None)])
def test_types_that_k_quants_outdo_are_not_tried_where_those_suit(width: int, tried: set[str] | None) -> None:
    store = FORMATS.get("gguf")
    schemes = schemes_of("gguf", store.choices())
    found = {type_of(scheme) for scheme in schemes if store.tries(scheme, 64, width)}
    assert found == (tried or {type_of(scheme) for scheme in schemes})


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


WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
QKV, FIRST_DOWN = r"layers\.1\..*[qkv]_proj", r"layers\.0\..*down_proj"
PACKED: dict[str, tuple[int, dict[str, Any]]] = {
    "integers": (
        5,
        {
            "bits": 4,
            "group_size": 32,
            "ignore": ["lm_head", FIRST_DOWN],
            "overrides": {
                QKV: "int2",
                r"layers\.0\..*[qkv]_proj": "int3",
                "gate|up": "int5",
                "down": "int6",
                "o_": "int8",
            },
        },
    ),
    "8-bit floats beside integers": (2, {"bits": 3, "group_size": 32, "overrides": {QKV: "fp8", "down_proj": "fp8"}}),
    "4-bit floats beside 8-bit floats": (
        4,
        {
            "scheme": "nvfp4",
            "ignore": ["lm_head", FIRST_DOWN],
            "overrides": {QKV: "fp8", "gate|up": "mxfp4", "o_proj": {"scheme": "int", "bits": 4, "group_size": 32}},
        },
    ),
}
"""How many schemes there are, and the keys of the variant."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole blocks of every type of GGML."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", dtype=torch.bfloat16, **WIDE)


def logits_in(runtime: str, path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return RUNTIMES.get(runtime).load(path, LoadOptions(dtype="bfloat16")).logits(torch.arange(5, 45)).float()


@pytest.mark.parametrize("name", PACKED)
def test_transformers_loads_mixed_compressed_tensors(name: str, model: Path, tmp_path: Path) -> None:
    count, keys = PACKED[name]
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", **keys)
    schemes = open_export(out).schemes
    assert len(set(schemes.values())) == count
    config = read_json(out / "config.json")["quantization_config"]
    assert CompressedTensors.schemes_in(config, CheckpointReader(out)) == schemes
    torch.testing.assert_close(logits_in("transformers", out), logits_in("reference", out), rtol=0, atol=0)


MIXED: list[tuple[str, dict[str, Any]]] = [
    ("transformers", {"group_size": 32}),
    ("transformers", {"choices": ["nvfp4", "mxfp4", "fp8", "float"]}),
    ("llama.cpp", {"format": "gguf"}),
    ("llama.cpp", {"format": "gguf", "choices": ["q3_k", "iq4_nl", "q5_1", "mxfp4", "float"]}),
    ("reference", {"format": "gptq", "group_size": 32}),
    ("reference", {"format": "bitsandbytes"}),
    ("reference", {"format": "hqq", "group_size": 64, "symmetric": False, "zeros": "float"}),
]
"""Who loads a file, and the keys of its variant."""


@pytest.mark.parametrize(("runtime", "keys"), MIXED)
def test_the_file_of_a_mix_holds_what_was_chosen_for_each_layer(
    runtime: str, keys: dict[str, Any], wide: Path, tmp_path: Path
) -> None:
    spec = parse_section(AutoSpec, {"name": "mix", "method": "rtn", "bits": "auto", "budget": 5, **keys}, "test")
    model = CheckpointModel(Job(wide, {}, "bfloat16", device="cpu"), Skeleton(wide))
    units = units_of(model, spec)
    chosen = [sorted(unit.sizes)[place % len(unit.sizes)] for place, unit in enumerate(units)]
    assert set(chosen) == {name for unit in units for name in unit.sizes}
    variant = spec.with_choice(allocated(model, spec, units, chosen))
    out = quantize(model.job, variant, tmp_path / "out").folder
    by_name = spec.choice_schemes()
    wanted = {layer: by_name[name] for unit, name in zip(units, chosen, strict=True) for layer in unit.layers}
    assert open_export(out).schemes == {layer: scheme for layer, scheme in wanted.items() if scheme is not None}
    if runtime != "reference" and RUNTIMES.get(runtime).missing() is None:
        expected, given = (logits_in(name, out).log_softmax(-1) for name in ("reference", runtime))
        assert float((expected.exp() * (expected - given)).sum(-1).mean()) < 0.005  # llama.cpp rounds inputs to 8 bits


def test_llama_cpp_loads_every_choice_of_gguf_beside_the_others(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    types = iter(FORMATS.get("gguf").choices("llama.cpp")[:-1])
    leaves = [f"{block}..*{leaf}_proj" for block in (0, 1) for leaf in ("q", "k", "v", "o", "gate", "up")]
    overrides = {f"layers.{leaf}": kind for leaf, kind in zip(leaves, types, strict=False)}
    assert next(types, None) is None
    options: dict[str, Any] = {"scheme": "q4_k", "embeddings": "q3_k", "overrides": {**overrides, "lm_head": "q6_k"}}
    ignore: dict[str, Any] = {"ignore": [FIRST_DOWN]}
    out = quantkit.quantize(wide, out=tmp_path / "out", method="rtn", format="gguf", **options, **ignore)
    head = read_head(out / "model-Q4_K.gguf")
    found = {name: tensor.kind.name for name, tensor in head.tensors.items()}
    assert found["token_embd.weight"] == "Q3_K"
    assert found["output.weight"] == "Q6_K"
    assert found["blk.0.ffn_down.weight"] in ("F16", "BF16")
    assert found["blk.1.ffn_down.weight"] == "Q4_K"
    assert {type_of(scheme) for scheme in open_export(out).schemes.values()} <= set(found.values())
    assert head.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_S
    wanted, given = (logits_in(name, out).log_softmax(-1) for name in ("reference", "llama.cpp"))
    assert float((wanted.exp() * (wanted - given)).sum(-1).mean()) < 0.005  # it rounds inputs to 8 bits


def test_a_gguf_file_is_called_after_the_type_of_most_weights(wide: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "q2_k", "overrides": {"down_proj|up_proj": "q8_0"}}
    out = quantkit.quantize(wide, out=tmp_path / "out", method="rtn", format="gguf", **options)
    head = read_head(out / "model-Q2_K.gguf")
    assert head.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q2_K


@pytest.mark.parametrize("store", ["awq", "bitsandbytes", "gptq"])
def test_what_cannot_lie_side_by_side_is_refused_with_the_way_out(store: str) -> None:
    kinds: dict[str, tuple[dict[str, Any], Any]] = {
        "awq": ({"bits": 4, "group_size": 64}, {"group_size": 32}),
        "bitsandbytes": ({"scheme": "nf4"}, "fp4"),
        "gptq": ({"bits": 4}, {"symmetric": False}),
    }
    base, other = kinds[store]
    keys = {"name": "v", "format": store, **base, "overrides": {"down_proj": other}}
    with pytest.raises(QuantkitError) as refused:
        parse_section(VariantSpec, keys, "test")
    assert "\n" not in str(refused.value)
    assert "'ignore'" in str(refused.value) or "use the same 'symmetric'" in str(refused.value)


def test_rules_of_gptq_also_name_layers_as_vllm_does_in_a_model_of_several_parts() -> None:
    layers = {
        f"model.language_model.layers.{n}.self_attn.{leaf}_proj": IntScheme(4) for n in (1, 2, 11) for leaf in "qkv"
    }
    layers |= {name: IntScheme(8) for name in layers if ".1." in name}
    (pattern,) = GptqFormat().quantization_config(layers)["dynamic"]
    for name in ("model.language_model.layers.1.self_attn.k_proj", "language_model.model.layers.1.self_attn.qkv_proj"):
        assert re.match(pattern.removeprefix("+:"), name)
    for name in ("model.language_model.layers.11.self_attn.k_proj", "model.layers.1.self_attn.qkv_proj"):
        assert not re.match(pattern.removeprefix("+:"), name)


def test_transformers_is_not_named_for_files_that_it_does_not_load() -> None:
    """Of gptq and awq it loads one scheme throughout."""
    config, one, two = {"dtype": "bfloat16"}, IntScheme(4, 32), IntScheme(8, 32)
    assert any(line.startswith("transformers") for line in loads(GptqFormat, [one], config))
    assert not any(line.startswith("transformers") for line in loads(GptqFormat, [one, two], config))
