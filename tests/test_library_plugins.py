"""What plugins make of requests and of what their libraries give back; those that are installed here quantize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import SchemeError
from quantkit.exports import open_export
from quantkit.libraries import LIBRARIES, autoround, bitsandbytes, hqq, llama_cpp, quanto, torchao
from quantkit.libraries._attention import own_arguments
from quantkit.libraries._blocks import blocks_of
from quantkit.libraries._models import copy_tokenizer, layers_of
from quantkit.libraries.base import CODES, Library, Offer, Request
from quantkit.quantization import Job, quantize
from quantkit.recipe import LibrarySpec, VariantSpec
from quantkit.schemes import QuantizedWeight, make_scheme
from quantkit.system.validation import parse_section
from tests.architectures import BASE
from tests.tiny import make_model

MINE = ("autoround", "bitsandbytes", "hqq", "llama.cpp", "quanto", "torchao")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def request_for(library: type[Library], method: str, **changes: Any) -> Request:
    offer = offer_of(library, method)
    found = Request(
        model=Path("model"),
        tokens=[],
        out=Path("out"),
        method=method,
        bits=offer.bits[0],
        group_size=64 if offer.grouped else -1,
        symmetric=offer.symmetric[0],
        ignore=("lm_head",),
        dtype="float32",
        device="cpu",
        options=dict(offer.options),
        progress=lambda *_: None,
    )
    return replace(found, **changes)


def offer_of(library: type[Library], method: str) -> Offer:
    (found,) = (offer for offer in library.offers if offer.method == method)
    return found


def decoded(parts: dict[str, torch.Tensor], scheme: dict[str, Any]) -> torch.Tensor:
    """What quantkit makes of codes that a plugin gives."""
    keys = {key: value for key, value in scheme.items() if key != "scheme"}
    made = make_scheme(scheme["scheme"], keys)
    zeros = parts.get("zeros", torch.full_like(parts["scales"], getattr(made, "zero", 0)))
    return QuantizedWeight(made, parts["codes"], parts["scales"], zeros).dequantize(torch.float32)


@pytest.mark.parametrize("name", MINE)
def test_a_plugin_pins_what_it_needs(name: str) -> None:
    library = LIBRARIES.get(name)
    assert all(line.count("==") == 1 for line in library.requirements)
    assert library.distribution in {line.partition("==")[0] for line in library.requirements}
    assert len({offer.method for offer in library.offers}) == len(library.offers)


@pytest.mark.parametrize("name", MINE)
def test_codes_are_of_schemes_that_quantkit_has(name: str) -> None:
    for offer in LIBRARIES.get(name).offers:
        if offer.writes != CODES:
            continue
        for bits in offer.bits:
            for symmetric in offer.symmetric:
                request = request_for(LIBRARIES.get(name), offer.method, bits=bits, symmetric=symmetric)
                if name == "hqq":
                    continue
                scheme = {"torchao": torchao, "quanto": quanto}[name].scheme_for(request)
                made = make_scheme(scheme["scheme"], {key: scheme[key] for key in scheme if key != "scheme"})
                assert made.bits == bits


class TestBitsAndBytes:
    def test_the_arguments_of_4_bits(self) -> None:
        request = request_for(bitsandbytes.BitsAndBytes, "nf4", dtype="bfloat16", options={"double_quant": True})
        assert bitsandbytes.config_for(request, ["lm_head"]) == {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head"],
        }

    def test_the_arguments_of_8_bits(self) -> None:
        request = request_for(bitsandbytes.BitsAndBytes, "int8")
        assert bitsandbytes.config_for(request, []) == {
            "load_in_8bit": True,
            "llm_int8_skip_modules": [],
            "llm_int8_threshold": 6.0,
        }

    @pytest.mark.filterwarnings("default")  # the library's own
    @pytest.mark.parametrize(("method", "scheme"), [("nf4", "nf4 g64 dq"), ("int8", "int8 channel sym a8")])
    def test_a_model_is_quantized_but_for_what_is_ignored(self, tmp_path: Path, method: str, scheme: str) -> None:
        pytest.importorskip("bitsandbytes")
        source, out, told = make_model(tmp_path / "model", **WIDE), tmp_path / "out", []
        options = {"double_quant": True} if method == "nf4" else {"llm_int8_threshold": 6.0}
        request = request_for(
            bitsandbytes.BitsAndBytes,
            method,
            model=source,
            out=out,
            options=options,
            ignore=("lm_head", r"1\.mlp"),
            progress=lambda *step: told.append(step),
        )
        used = bitsandbytes.BitsAndBytes().quantize(request)
        export = open_export(out)
        assert {each.describe() for each in export.schemes.values()} == {scheme}
        assert set(export.schemes) == {
            name for name in layers_of(source) if name != "lm_head" and "layers.1.mlp" not in name
        }
        assert used.tokens == 0
        assert told[-1] == ("step", 2, 2)
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


class TestHqq:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_codes_decode_to_what_the_library_computes(self, axis: int) -> None:
        draw = torch.Generator().manual_seed(0)
        rows, columns, size = 6, 64, 32
        cells = rows * columns // size
        shape, flat = ((size, cells), (1, cells)) if axis == 0 else ((cells, size), (cells, 1))
        codes = torch.randint(0, 8, shape, generator=draw, dtype=torch.uint8)
        scale, zero = torch.rand(flat, generator=draw), torch.rand(flat, generator=draw) * 7
        meta = {"nbits": 3, "group_size": size, "axis": axis, "shape": (rows, columns), "scale": scale, "zero": zero}
        padded = torch.cat([codes, codes[:4]])
        found = decoded(hqq.parts_of(padded, meta), hqq.scheme_of("layer", meta))
        assert torch.equal(found, ((codes - zero) * scale).reshape(rows, columns))

    def test_groups_over_the_ends_of_rows_are_refused(self) -> None:
        meta = {"nbits": 4, "group_size": 128, "axis": 1, "shape": (8, 576)}
        with pytest.raises(SchemeError, match="groups of 128 run over the ends of its rows of 576"):
            hqq.scheme_of("layer", meta)

    def test_whole_rows_are_one_scale_per_channel(self) -> None:
        meta = {"nbits": 4, "group_size": 64, "axis": 1, "shape": (8, 64)}
        assert hqq.scheme_of("layer", meta)["group_size"] == -1


class TestAutoRound:
    def rows(self, *lengths: int) -> list[list[int]]:
        return [list(range(length)) for length in lengths]

    def request(self, *lengths: int, bits: int = 4, **options: Any) -> Request:
        """As a recipe that gives these options asks for it."""
        given = {"name": "v", "library": "autoround", "bits": bits, **options}
        resolved = parse_section(LibrarySpec, given, "v").all_options()
        library = autoround.AutoRoundLibrary
        return request_for(library, "autoround", bits=bits, tokens=self.rows(*lengths), options=resolved)

    def test_rows_of_one_length_need_no_padding(self) -> None:
        request = self.request(16, 16, 16)
        assert autoround.padding_token(request, 99, 0) is None
        settings = autoround.settings_for(request, ["lm_head"], None)
        assert (settings["seqlen"], settings["nsamples"], settings["batch_size"]) == (16, 3, 8)
        assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 64, True)
        assert settings["ignore_layers"] == "lm_head"
        assert settings["amp"]
        assert autoround.LAST_TOKEN in autoround.notes(request, settings, None, 0)

    def test_rows_of_many_lengths_are_padded_with_a_token_that_none_has(self) -> None:
        request = self.request(3, 5)
        assert autoround.padding_token(request, 9, 7) == 7
        assert autoround.padding_token(request, 9, 2) == 8, "2 is a token of the rows"
        first, second = autoround.rows_of(request, 7)
        assert (first["input_ids"].tolist(), first["attention_mask"].tolist()) == ([[0, 1, 2, 7, 7]], [[1, 1, 1, 0, 0]])
        assert second["attention_mask"].tolist() == [[1] * 5]
        settings = autoround.settings_for(request, [], 7)
        assert (settings["seqlen"], settings["batch_size"], settings["gradient_accumulate_steps"]) == (5, 8, 1)
        assert autoround.PADDED.format(5) in autoround.notes(request, settings, 7, 0)

    def test_where_every_token_is_used_rows_go_one_by_one(self) -> None:
        request = self.request(9, 16, gradient_accumulate_steps=2)
        assert autoround.padding_token(request, 16, 0) is None
        settings = autoround.settings_for(request, [], None)
        assert (settings["seqlen"], settings["batch_size"], settings["gradient_accumulate_steps"]) == (9, 1, 16)
        assert "batches of 8 became" in autoround.notes(request, settings, None, 0)[2]

    @pytest.mark.parametrize(
        ("bits", "options", "rate", "name"),
        [
            (4, {}, None, "auto-round's recipe auto-round: 200 iterations, lr 0.005, batches of 8"),
            (4, {"iters": 50}, 0.005, "auto-round's recipe auto-round-light: 50 iterations, lr 0.005, batches of 8"),
            (4, {"iters": 50, "lr": 0.02}, 0.02, "auto-round's recipe auto-round-light, but with lr 0.02"),
            (4, {"iters": 1000}, None, "auto-round's recipe auto-round-best: 1000 iterations, lr 0.001, batches of 8"),
            (2, {}, None, "auto-round's recipe auto-round-best: 1000 iterations, lr 0.002, batches of 8"),
            (4, {"iters": 20}, None, "none of auto-round's recipes: 20 iterations"),
        ],
    )
    def test_iterations_are_those_of_a_recipe_with_its_rate(
        self, bits: int, options: dict[str, Any], rate: float | None, name: str
    ) -> None:
        request = self.request(16, bits=bits, **options)
        assert autoround.settings_for(request, [], None).get("lr") == rate
        assert autoround.recipe_note(request).endswith(name)
        assert autoround.settings_for(request, [], None)["enable_alg_ext"] is (bits == 2)

    def test_what_is_rounded_is_not_padded(self) -> None:
        request = request_for(autoround.AutoRoundLibrary, "rtn", tokens=self.rows(3, 5))
        assert autoround.padding_token(request, 9, 7) is None
        found = autoround.rows_of(request, None)
        assert [row["input_ids"].tolist() for row in found] == [[[0, 1, 2]], [[0, 1, 2, 3, 4]]]
        assert autoround.settings_for(request, [], None)["iters"] == 0

    def test_what_it_saved_is_lifted(self, tmp_path: Path) -> None:
        inner = tmp_path / "model-w4g64"
        inner.mkdir()
        (inner / "config.json").write_text("{}")
        autoround.lift(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


class TestOwnAttention:
    """Blocks that libraries call with what they caught at the first one."""

    ROWS: ClassVar[list[list[int]]] = [list(range(5, 45)), list(range(7, 20))]
    KINDS: ClassVar[dict[str, list[str]]] = {
        "gemma3_text": ["sliding_attention", "full_attention"] * 2,
        "lfm2": ["conv", "full_attention"] * 2,
        "llama": [],
    }

    def caught(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """The arguments of the first block, and what the last one gives."""
        blocks, found = blocks_of(model), {}
        hooks = [
            blocks[0].register_forward_pre_hook(lambda _, __, given: found.update(given), with_kwargs=True),
            blocks[-1].register_forward_hook(lambda _, __, out: found.update(last=out)),
            blocks[0].register_forward_pre_hook(lambda _, given: found.update(hidden_states=given[0])),
        ]
        model(ids, mask, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found, found.pop("last")

    @pytest.mark.filterwarnings("default")  # transformers on kernels that are not installed
    @pytest.mark.parametrize("family", KINDS)
    @torch.no_grad()
    def test_each_block_gets_its_own_mask_and_angles(self, family: str) -> None:
        torch.manual_seed(0)
        kinds = self.KINDS[family]
        config = AutoConfig.for_model(
            family, **{**BASE, "num_hidden_layers": 4}, **({"layer_types": kinds} if kinds else {})
        )
        config.sliding_window = 8
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # so that attention matters
        ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
        for place, row in enumerate(self.ROWS):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        given, last = self.caught(model, ids, mask)
        given_states = given.pop("hidden_states")
        with own_arguments(model, self.ROWS) as others:
            found = given_states
            for block in blocks_of(model):
                found = block(found, **given)
        assert others == len(kinds) // 2
        for place, row in enumerate(self.ROWS):
            torch.testing.assert_close(found[place, : len(row)], last[place, : len(row)], rtol=1e-5, atol=1e-5)
        assert not any(block._forward_pre_hooks for block in blocks_of(model))
        if family == "gemma3_text":  # without, blocks do something else
            plain = given_states
            for block in blocks_of(model):
                plain = block(plain, **given)
            assert (plain - last)[1, :13].norm() > 0.01 * last[1, :13].norm()


class TestTorchAo:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_codes_decode_to_what_the_library_computes(self, bits: int, symmetric: bool) -> None:
        draw, least = torch.Generator().manual_seed(0), -(1 << (bits - 1))
        codes = torch.randint(least, -least, (4, 64), generator=draw, dtype=torch.int8)
        zero = torch.zeros(4, 2, dtype=torch.int8)
        if not symmetric:
            zero = torch.randint(least, -least, (4, 2), generator=draw, dtype=torch.int8)
        scale = torch.rand(4, 2, generator=draw)
        weight = SimpleNamespace(qdata=codes, scale=scale, zero_point=zero)
        request = request_for(torchao.TorchAo, "intx", bits=bits, symmetric=symmetric, group_size=32)
        expected = (codes.view(4, 2, 32).float() - zero[..., None]) * scale[..., None]
        found = decoded(torchao.parts_of(weight, request), torchao.scheme_for(request))
        assert torch.equal(found, expected.view(4, 64))

    def test_floats_pass_by_their_bits(self) -> None:
        codes = torch.randn(4, 64).to(torch.float8_e4m3fn)
        scale = torch.rand(4, 1)
        request = request_for(torchao.TorchAo, "float8")
        parts = torchao.parts_of(SimpleNamespace(qdata=codes, scale=scale), request)
        assert torch.equal(decoded(parts, torchao.scheme_for(request)), codes.float() * scale)


class TestQuanto:
    @pytest.mark.parametrize("whole", [True, False])
    def test_shifts_become_zero_points(self, whole: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (8, 32), generator=draw, dtype=torch.uint8)
        scale = torch.rand(8, 1, generator=draw) + 0.1
        shift = torch.randint(0, 16, (8, 1), generator=draw, dtype=torch.uint8) if whole else torch.rand(8, 1)
        request = request_for(quanto.Quanto, "max", group_size=32, options={"zeropoint": whole})
        expected = (codes.float() - shift) * scale if whole else codes * scale - shift
        tensor = SimpleNamespace(_data=codes, _scale=scale, _shift=shift)
        found = decoded(quanto.parts_of(tensor, (4, 64)), quanto.scheme_for(request))
        torch.testing.assert_close(found, expected.view(4, 64), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("method", "dtype"), [("absmax", torch.int8), ("float8", torch.float8_e4m3fn)])
    def test_8_bits_have_no_shift(self, method: str, dtype: torch.dtype) -> None:
        codes, scale = (torch.randn(4, 64) * 40).to(dtype), torch.rand(4, 1)
        request = request_for(quanto.Quanto, method)
        parts = quanto.parts_of(SimpleNamespace(_data=codes, _scale=scale), (4, 64))
        assert torch.equal(decoded(parts, quanto.scheme_for(request)), codes.float() * scale)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_packed_codes_come_apart(self, bits: int) -> None:
        codes = torch.arange(8 * 3, dtype=torch.uint8).view(8, 3) % (1 << bits)
        rows = 8 * bits // 8
        packed = torch.zeros(rows, 3, dtype=torch.uint8)
        for place in range(8 // bits):
            packed |= codes[place * rows : (place + 1) * rows] << bits * place
        assert torch.equal(quanto.unpacked(packed, bits), codes)


class TestLlamaCpp:
    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "token_embd.weight": (261, 256),
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_down.weight": (256, 512),
        "blk.1.ffn_up.weight": (512, 288),
        "output.weight": (261, 256),
    }

    def types(self, method: str, **changes: Any) -> dict[str, str]:
        return llama_cpp.types_for(request_for(llama_cpp.LlamaCpp, method, **changes), self.SHAPES)

    def test_matrices_of_blocks_change_and_others_stay(self) -> None:
        assert self.types("q8_0") == dict.fromkeys(
            ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight"), "Q8_0"
        )

    def test_rows_that_256_does_not_divide_get_what_llama_cpp_gives_them(self) -> None:
        assert self.types("q4_k")["blk.1.ffn_up.weight"] == "Q5_0"
        assert self.types("q6_k")["blk.1.ffn_up.weight"] == "Q8_0"
        assert self.types("q4_k")["blk.0.attn_q.weight"] == "Q4_K"

    def test_presets_mix(self) -> None:
        found = self.types("q4_k_m")
        assert {found["blk.0.attn_q.weight"], found["blk.0.ffn_down.weight"]} <= {"Q4_K", "Q6_K"}

    def test_layers_are_ignored_by_their_names_in_transformers(self) -> None:
        assert "blk.0.ffn_down.weight" not in self.types("q8_0", ignore=(r"0\.mlp\.down_proj",))

    def test_embedding_and_head_change_on_request(self) -> None:
        found = self.types("q4_0", options={"token_embedding_type": "q8_0", "output_tensor_type": "q6_k"})
        assert (found["token_embd.weight"], found["output.weight"]) == ("Q8_0", "Q6_K")

    def test_rows_that_no_block_divides_are_refused(self) -> None:
        with pytest.raises(SchemeError, match=r"no type of llama\.cpp has blocks that divide its rows of 40"):
            llama_cpp.type_for("q8_0", "model.layers.0.mlp.up_proj", 1, (8, 40))

    @pytest.mark.parametrize(("method", "kinds"), [("q4_0", {"int4 g32 sym"}), ("q4_k_m", {"q4_k", "q6_k"})])
    def test_a_file_is_quantized(self, tmp_path: Path, method: str, kinds: set[str]) -> None:
        pytest.importorskip("xllamacpp")
        source = make_model(tmp_path / "model", dtype=torch.float16, **WIDE)
        keys = {"name": "float", "method": "none", "scheme": "float16", "format": "gguf"}
        job = Job(source, {"reference": "tiny"}, "float16", [], None)
        whole = quantize(job, parse_section(VariantSpec, keys, "v"), tmp_path / "float").folder
        (file,) = whole.glob("*.gguf")
        (tmp_path / "out").mkdir()
        llama_cpp.LlamaCpp().quantize(
            request_for(llama_cpp.LlamaCpp, method, model=file, out=tmp_path / "out", dtype="float16")
        )
        export, plain = open_export(tmp_path / "out"), CheckpointReader(source)
        assert {each.describe() for each in export.schemes.values()} == kinds
        assert export.made_by.startswith("xllamacpp ")
        (made,) = (tmp_path / "out").glob("*.gguf")
        before, after = metadata_of(file), metadata_of(made)
        changed = {"general.quantized_by", "general.file_type", "quantkit.schemes", "quantkit.version"}
        assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= changed
        assert after["tokenizer.ggml.merges"] == (gguf.GGUFValueType.ARRAY, [])
        for name in layers_of(source)[:7]:
            exact = plain.read(f"{name}.weight").float()
            lost = (export.weight(name).dequantize(torch.float32) - exact).norm() / exact.norm()
            assert 0.01 < lost < 0.12


def metadata_of(file: Path) -> dict[str, tuple[gguf.GGUFValueType, Any]]:
    """The keys of a GGUF file with their types and values, as the package gguf reads them."""
    fields = gguf.GGUFReader(file).fields.values()
    return {field.name: (field.types[0], field.contents()) for field in fields if not field.name.startswith("GGUF.")}


def test_only_what_belongs_to_a_tokenizer_is_copied(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(source, out)
    names = {path.name for path in out.iterdir()}
    assert "tokenizer.json" in names
    assert not names & {"config.json", "model.safetensors"}
