"""What a variant leaves unsaid: every method, format and scheme alone, and every pair, gets what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

import quantkit
from quantkit.errors import RecipeError
from quantkit.exports import find_gguf
from quantkit.formats import FORMATS
from quantkit.gguf.head import read_head
from quantkit.methods import METHODS
from quantkit.recipe import Recipe, VariantSpec
from quantkit.schemes import SCHEMES
from quantkit.system.validation import parse_section
from quantkit.verification.matrix import read_matrix
from tests.tiny import make_model

WRITTEN = [store.name for store in FORMATS if not store.read_only]


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "a", **keys}, "recipe")


def chosen(**keys: Any) -> tuple[str, str, str]:
    found = variant(**keys)
    return found.method, found.format, found.base_scheme().describe()


@pytest.mark.parametrize("kind", SCHEMES.names())
def test_every_scheme_alone_is_a_variant(kind: str) -> None:
    found = variant(scheme=kind)
    assert found.scheme == {"q2_k": "q2_k_mix", "q6_k": "q6_k_mix"}.get(kind, kind), "presets have these names too"
    assert SCHEMES.get(kind).quantizer in (None, found.method)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_alone_is_a_variant(name: str) -> None:
    assert variant(method=name).method == name


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_alone_is_a_variant(name: str) -> None:
    assert variant(format=name).format == name


@pytest.mark.parametrize("store", WRITTEN)
@pytest.mark.parametrize("method", METHODS.names())
def test_every_pair_is_a_variant_or_is_refused_with_the_pairs_that_work(method: str, store: str) -> None:
    if method in pairs_of(store) or (method, store) == ("none", "gguf"):
        assert variant(method=method, format=store).method == method
        return
    with pytest.raises(RecipeError, match=f"method {method} and format {store} do not go together") as refused:
        variant(method=method, format=store)
    pairs = {each: pairs_of(each) for each in WRITTEN}
    pairs["gguf"].append("none")  # a float file, of which the matrix has no row
    stores, methods = (half.partition(" goes with ")[2].split(", ") for half in refused.value.remedy.split("; "))
    assert methods == sorted(pairs[store])
    assert stores == [each for each in WRITTEN if method in pairs[each]]


def pairs_of(store: str) -> list[str]:
    """The methods that tests have seen to work with a format, as ``quantkit matrix`` has them."""
    rows = [row for row in read_matrix()["rows"] if row["format"] == store]
    return sorted({method for row in rows for method in row["methods"]} & set(METHODS.names()))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, ("gptq", "compressed-tensors", "int4 g64 sym")),
        ({"format": "gguf"}, ("gptq", "gguf", "int4 g32 sym")),
        ({"format": "gguf", "group_size": 64}, ("gptq", "gguf", "int4 g64 sym")),
        ({"format": "gguf", "symmetric": False}, ("gptq", "gguf", "int4 g32 asym float zeros")),
        ({"format": "gguf", "bits": 6}, ("gptq", "gguf", "q6_k_mix")),
        ({"format": "gguf", "method": "none"}, ("none", "gguf", "float")),
        ({"format": "bitsandbytes"}, ("gptq", "bitsandbytes", "nf4 g64 dq")),
        ({"format": "bitsandbytes", "bits": 4, "method": "rtn"}, ("rtn", "bitsandbytes", "nf4 g64 dq")),
        ({"format": "bitsandbytes", "bits": 8}, ("gptq", "bitsandbytes", "int8 channel sym a8")),
        ({"format": "float"}, ("none", "float", "float")),
        ({"method": "none"}, ("none", "float", "float")),
        ({"method": "llama.cpp"}, ("llama.cpp", "gguf", "q4_k_m")),
        ({"method": "llama.cpp", "bits": 5, "scheme": "int"}, ("llama.cpp", "gguf", "int5 g32 sym")),
        ({"scheme": "nf4"}, ("gptq", "bitsandbytes", "nf4 g64 dq")),
        ({"scheme": "q5_k"}, ("gptq", "gguf", "q5_k")),
        ({"scheme": "q4_k_m"}, ("gptq", "gguf", "q4_k_m")),
        ({"scheme": "q4_k_m", "damping": 0.1}, ("gptq", "gguf", "q4_k_m")),
        ({"scheme": "q4_k_m", "imatrix": True}, ("llama.cpp", "gguf", "q4_k_m")),
        ({"scheme": "iq4_nl", "imatrix": False}, ("llama.cpp", "gguf", "iq4_nl")),
        ({"scheme": "q4_k_m", "method": "gptq"}, ("gptq", "gguf", "q4_k_m")),
        ({"scheme": "q3_k_m", "method": "awq+gptq"}, ("awq+gptq", "gguf", "q3_k_m")),
        ({"scheme": "bfloat16"}, ("none", "float", "bfloat16")),
    ],
)
def test_what_is_said_implies_the_rest(said: dict[str, Any], wanted: tuple[str, str, str]) -> None:
    assert chosen(**said) == wanted


def test_what_is_said_is_never_changed() -> None:
    with pytest.raises(RecipeError, match="compressed-tensors cannot store q4_k"):
        variant(scheme="q4_k", format="compressed-tensors")
    assert chosen(scheme="q4_k", method="gptq") == ("gptq", "gguf", "q4_k")
    with pytest.raises(RecipeError, match="format float stores no codes"):
        variant(format="float", bits=8)
    assert variant(scheme="q4_k_m", embeddings=None, ignore=["lm_head"]).embeddings is None


def test_a_patch_of_a_format_has_its_groups() -> None:
    found = variant(scheme="q4_k_m", embeddings={"scheme": "int", "bits": 8})
    scheme = found.embedding_scheme()
    assert scheme is not None
    assert scheme.describe() == "int8 g32 sym"


def test_defaults_of_a_recipe_do_not_fight_what_a_variant_implies() -> None:
    text = """
name: many
model: {source: ./model}
defaults: {group_size: 128, bits: 4}
variants:
  - {name: a, format: gptq}
  - {name: b, format: bitsandbytes}
  - {name: c, method: llama.cpp}
  - {name: d, method: none}
"""
    found = [each.base_scheme().describe() for each in Recipe.parse(text).own_variants]
    assert found == ["int4 g128 sym", "nf4 g128 dq", "q4_k_m", "float"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    """A model in llama.cpp's mixture, and nothing said but that."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("mixed")
    make_model(folder / "model", hidden_size=256, intermediate_size=256, tie_word_embeddings=request.param)
    quantkit.quantize(folder / "model", out=folder / "out", scheme="q4_k_m", imatrix=False)
    return request.param, folder / "out"


def test_a_preset_is_the_file_that_llama_cpp_would_write(mixed: tuple[bool, Path]) -> None:
    tied, folder = mixed
    file = find_gguf(folder)
    assert file is not None
    assert file.name == "model-Q4_K_M.gguf"
    head = read_head(file)
    assert head.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    kinds = {name: tensor.kind.name for name, tensor in head.tensors.items()}
    assert kinds["token_embd.weight"] == ("Q6_K" if tied else "Q4_K")
    assert kinds.get("output.weight") == (None if tied else "Q6_K")


def test_the_estimate_of_a_preset_is_its_file(mixed: tuple[bool, Path]) -> None:
    _, folder = mixed
    file = find_gguf(folder)
    assert file is not None
    held = sum(tensor.nbytes for tensor in read_head(file).tensors.values())
    told = quantkit.estimate(folder.parent / "model", scheme="q4_k_m", imatrix=False)
    assert told.part("file").nbytes == held
