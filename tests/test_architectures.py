"""Models of many architectures: their layers are found, computed with, solved, written and read again."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.float_parts import float_parts
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import CheckpointError
from quantkit.exports import open_export
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from tests.architectures import ARCHITECTURES, DENSE, MIXTURES, ODD, make
from tests.tiny import tiny_method, tiny_rows, tiny_task

CPU = torch.device("cpu")
ROUTERS = ("gate", "router", "router.layer")
NOT_LAYERS = (
    *("conv.weight", "conv1d.weight", "conv_1d.weight", "_bias", ".A_log", ".D", ".dt_proj_weight"),
    *(f"{router}.weight" for router in ROUTERS),
)
"""What stays float inside blocks: convolutions, routers, biases of experts, and the steps of a recurrence."""
RECORDS = [
    {"instruction": f"Say {word}.", "output": word * 12}
    for word in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
]


def loaded(folder: Path) -> Skeleton:
    """A skeleton with everything in it."""
    skeleton, reader = Skeleton(folder), CheckpointReader(folder)
    skeleton.load_frame(reader, CPU, torch.float32)
    for segment in [*skeleton.segments, *([skeleton.head] if skeleton.head else [])]:
        skeleton.load(segment, reader, CPU, torch.float32)
    return skeleton


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ODD])
def test_the_skeleton_computes_what_transformers_computes(tmp_path: Path, architecture: str) -> None:
    """So every parameter has come from its tensors, and experts compute by their layers as they do in a stack."""
    model = make(tmp_path, architecture)
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = loaded(tmp_path).model(input_ids=ids, use_cache=False).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [*DENSE, *MIXTURES])
def test_every_matrix_of_the_blocks_is_a_layer(tmp_path: Path, architecture: str) -> None:
    model = make(tmp_path, architecture)
    skeleton = Skeleton(tmp_path)
    prefixes = tuple({segment.prefix.rpartition(".")[0] + "." for segment in skeleton.segments})
    total = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and parameter.ndim >= 2 and not name.endswith(NOT_LAYERS)
    )
    layers = [layer for segment in skeleton.segments for layer in segment.layers if not layer.name.endswith(ROUTERS)]
    assert sum(rows * columns for rows, columns in (layer.shape for layer in layers)) == total
    assert len({layer.name for layer in layers}) == len(layers)


@pytest.mark.parametrize("architecture", ["longcat_flash", "inkling_text"])
def test_experts_of_an_odd_kind_are_layers(tmp_path: Path, architecture: str) -> None:
    make(tmp_path, architecture)
    names = {layer.name for layer in Skeleton(tmp_path).layers()}
    routed = {f"experts.{index}.{leaf}_proj" for index in range(4) for leaf in ("gate", "up", "down")}
    shared = {f"shared_experts.{index}.{leaf}_proj" for index in range(2) for leaf in ("gate", "up", "down")}
    for suffix in routed | (shared if architecture == "inkling_text" else set()):
        assert any(name.endswith(f".{suffix}") for name in names), suffix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_every_layer_is_solved_from_what_reaches_it(tmp_path: Path, architecture: str, inputs: Any) -> None:
    make(tmp_path, architecture)
    skeleton, rows = Skeleton(tmp_path), tiny_rows()
    task, sink = tiny_task(skeleton, tiny_method())
    batches = make_batches(rows, CPU, may_pad=not skeleton.has_routed_layers())
    Walk(skeleton, CheckpointReader(tmp_path), batches, [task], WalkSettings(CPU, inputs=inputs)).run()
    assert set(sink.results) == {name for segment in skeleton.segments for name in segment.linears}
    errors = torch.stack([result.error for result in sink.results.values() if result.tokens])
    assert errors.isfinite().all()
    assert (errors < 0.1).all()
    alone = [name for name in sink.results if sum(part.isdigit() for part in name.split(".")) == 1]
    seen = {sink.results[name].tokens for name in alone}
    assert seen == {sum(map(len, rows))}


@pytest.mark.parametrize("architecture", sorted(MIXTURES.keys() - {"jetmoe", "dbrx"}))
def test_experts_share_out_the_tokens_that_are_routed(tmp_path: Path, architecture: str) -> None:
    make(tmp_path, architecture)
    skeleton, rows = Skeleton(tmp_path), tiny_rows()
    task, sink = tiny_task(skeleton, tiny_method())
    Walk(skeleton, CheckpointReader(tmp_path), make_batches(rows, CPU, may_pad=False), [task], WalkSettings(CPU)).run()
    tokens: dict[str, dict[str, int]] = {}
    for name, result in sink.results.items():
        if ".experts." in name:
            block, _, rest = name.partition(".experts.")
            tokens.setdefault(block, {})[rest] = result.tokens
    for experts in tokens.values():
        by_index = {
            index: {count for name, count in experts.items() if name.startswith(f"{index}.")} for index in "0123"
        }
        assert all(len(counts) == 1 for counts in by_index.values()), "gate, up and down of an expert see its tokens"
        assert sum(next(iter(counts)) for counts in by_index.values()) == 2 * sum(map(len, rows))


def quantized(folder: Path, architecture: str, **options: Any) -> tuple[Path, Path]:
    """A model and its 4-bit checkpoint."""
    make(folder / "model", architecture)
    (folder / "records.json").write_text(json.dumps(RECORDS))
    calibration = {"dataset": str(folder / "records.json"), "max_length": 48, "samples": 6}
    out = quantkit.quantize(
        folder / "model", out=folder / "out", calibration=calibration, bits=4, group_size=32, device="cpu",
        dtype="own", **options,
    )  # fmt: skip
    return folder / "model", out


NAMED = ("mixtral", "qwen3_moe", "gemma2", "gpt2", "gemma3", "gpt_oss", "qwen3_5_moe_text")


@pytest.mark.parametrize("architecture", NAMED)
def test_an_export_decodes_to_a_model_near_the_float_one(tmp_path: Path, architecture: str) -> None:
    folder, out = quantized(tmp_path, architecture)
    ids = torch.tensor(tiny_rows(2, 20, 20))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
        near = decoded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        divergence = (plain.exp() * (plain - near)).sum(-1).mean()
    assert 0 < divergence < 0.1
    export = open_export(out)
    skeleton = Skeleton(folder)
    linears = {layer.name for segment in skeleton.segments for layer in segment.layers}
    assert set(export.schemes) == linears - set(float_parts(skeleton))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gemma2", "gemma3"])
def test_transformers_computes_from_the_packed_file_what_the_reference_decoder_does(
    tmp_path: Path, architecture: str
) -> None:
    _, out = quantized(tmp_path, architecture)
    ids = torch.tensor(tiny_rows(2, 20, 20))
    packed, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    with torch.no_grad():
        found = packed.eval()(input_ids=ids, use_cache=False).logits
        expected = decoded.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def transformers_finds_all(out: Path) -> bool:
    try:
        _, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    except AttributeError as error:  # of tensors that are tied and are not there
        if "no attribute `weight`" not in str(error):
            raise
        return False
    return not info["missing_keys"]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss", "zamba2"])
def test_what_transformers_has_no_place_for_is_said_and_decoded_by_the_reference(
    tmp_path: Path, architecture: str
) -> None:
    _, out = quantized(tmp_path, architecture)
    notes = json.loads((out / "stage.json").read_text())["facts"]["notes"]
    assert any("transformers has no place for packed layers such as" in note for note in notes)
    assert not transformers_finds_all(out), "the note has to go"
    assert choose_runtime(out).name == "reference"


def test_a_file_that_transformers_loads_is_its_own(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "mixtral")
    assert choose_runtime(out).name == "transformers"


@pytest.mark.parametrize("architecture", NAMED)
def test_an_export_has_what_its_model_needs_and_no_more(tmp_path: Path, architecture: str) -> None:
    _, out = quantized(tmp_path, architecture)
    assert quantkit.inspect(out)["problems"] == []


def test_the_output_head_stays_float_whatever_the_file_calls_it(tmp_path: Path) -> None:
    folder, out = quantized(tmp_path, "gpt_neox", method="rtn")
    assert "embed_out.weight" in CheckpointReader(folder)
    assert torch.equal(
        CheckpointReader(folder).read("embed_out.weight"), CheckpointReader(out).read("embed_out.weight")
    )
    _, out = quantized(tmp_path / "pattern", "gpt_neox", method="rtn", ignore=["embed_out"])
    assert "embed_out.weight" in CheckpointReader(out)
    _, out = quantized(tmp_path / "whole", "gpt_neox", method="rtn", ignore=[])
    assert "embed_out.weight_packed" in CheckpointReader(out)


def test_experts_of_a_stack_that_stay_float_are_written_by_themselves(tmp_path: Path) -> None:
    folder, out = quantized(tmp_path, "gpt_oss", ignore=[r"experts\.2\.", "lm_head"], format="hqq")
    written, source = CheckpointReader(out), CheckpointReader(folder)
    stack = source.read("model.layers.0.mlp.experts.gate_up_proj")
    gate = written.read("model.layers.0.mlp.experts.2.gate_proj.weight")
    assert torch.equal(gate, stack[2].T[0::2])
    assert "model.layers.0.mlp.experts.gate_up_proj" not in written
    assert "model.layers.0.mlp.experts.1.gate_proj.W_q" in written
    ids = torch.tensor(tiny_rows(1, 20, 20))
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    own = decoded.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(own[2], stack[2])
    assert not torch.equal(own[1], stack[1])
    assert decoded.model(input_ids=ids, use_cache=False).logits.isfinite().all()


def test_a_weight_that_blocks_share_is_solved_once_and_computed_with_wherever_it_is_used(tmp_path: Path) -> None:
    make(tmp_path, "zamba2")
    skeleton = Skeleton(tmp_path)
    task, sink = tiny_task(skeleton, tiny_method())
    first, second = (f"model.layers.{index}.shared_transformer.self_attn.q_proj" for index in (1, 3))
    used: dict[str, torch.Tensor] = {}
    for path in (first, second):
        hook = lambda module, _args, _out, path=path: used.update({path: module.weight.detach().clone()})  # noqa: E731
        skeleton.model.get_submodule(path).register_forward_hook(hook)
    walk = Walk(skeleton, CheckpointReader(tmp_path), make_batches(tiny_rows(), CPU, True), [task], WalkSettings(CPU))
    walk.run()
    assert second not in sink.results
    solved = sink.results[first].weight.dequantize(torch.float32)
    assert torch.equal(used[first], solved)
    assert torch.equal(used[second], solved)
    assert not torch.equal(solved, skeleton.read(f"{second}.weight", CheckpointReader(tmp_path).read))


def test_batches_do_not_mix_the_states_that_modules_keep(tmp_path: Path) -> None:
    """RecurrentGemma's recurrence keeps its last state in the module, and a pass pauses before that is read."""
    make(tmp_path, "recurrent_gemma")
    found = []
    for strategy in ("one-pass", "recompute"):
        skeleton = Skeleton(tmp_path)
        task, sink = tiny_task(skeleton, tiny_method())
        settings = WalkSettings(CPU, strategy=strategy)
        batches = make_batches([*tiny_rows(2, 48, 48), *tiny_rows(1, 30, 30)], CPU, may_pad=False)
        Walk(skeleton, CheckpointReader(tmp_path), batches, [task], settings).run()
        found.append(sink.results)
    assert [len(batch.token_ids) for batch in batches] == [2, 1], "states of different shapes"
    for name, result in found[0].items():
        assert torch.equal(result.error, found[1][name].error), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_blocks_that_share_weights_are_written_once_and_read_back_everywhere(tmp_path: Path, method: str) -> None:
    folder, out = quantized(tmp_path, "zamba2", method=method)
    assert quantkit.inspect(out)["problems"] == []
    assert not any(".layers.3.shared_transformer" in name for name in CheckpointReader(out).names())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    q_proj = [
        decoded.model.get_parameter(f"model.layers.{index}.shared_transformer.self_attn.q_proj.weight")
        for index in (1, 3)
    ]
    assert torch.equal(*q_proj)
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        near = decoded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert 0 < (plain.exp() * (plain - near)).sum(-1).mean() < 0.1


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss", "jetmoe"])
def test_files_of_a_base_model_keep_its_names_and_are_read_again(tmp_path: Path, architecture: str) -> None:
    """A base model that was saved by itself has no ``model.`` before its names; transformers loads it nonetheless."""
    model: Any = make(tmp_path / "model", architecture, tie_word_embeddings=True)
    config = (tmp_path / "model/config.json").read_text()
    model.model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(config)
    assert not any(name.startswith("model.") for name in CheckpointReader(tmp_path / "model").names())
    out = quantkit.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", bits=8, group_size=32, dtype="own")
    assert all(name.startswith("layers.") for name in open_export(out).schemes)
    assert quantkit.inspect(out)["problems"] == []
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        near = decoded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert 0 < (plain.exp() * (plain - near)).sum(-1).mean() < 0.01


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("architecture", "change", "text"),
    [
        ("mixtral", lambda tensors: tensors.pop(EXPERT), r"are missing: there are 3 like .*w1\.weight and 4 like"),
        (
            "mixtral",
            lambda tensors: [tensors.pop(EXPERT.replace("w1", leaf)) for leaf in ("w1", "w2", "w3")],
            r"of shape \(3, 256, 64\), the model expects \(4, 256, 64\)",
        ),
        ("mixtral", lambda tensors: tensors.update({EXPERT: tensors[EXPERT] * torch.nan}), "w1.weight' of .* is nan"),
        ("mixtral", lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:5].clone()}), r"has shape \(5, 64\)"),
        ("gpt_oss", lambda tensors: tensors.update({STACK: tensors[STACK][:3].clone()}), r"of shape \(3, 128, 64\)"),
        (
            "gpt_oss",
            lambda tensors: tensors.pop(STACK),
            r"tensor model\.layers\.0\.mlp\.experts.* is not in",
        ),
    ],
)
def test_experts_that_are_missing_or_misshapen_are_one_line(
    tmp_path: Path, architecture: str, change: Any, text: str
) -> None:
    make(tmp_path, architecture)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=text):
        loaded(tmp_path)


class Counting(CheckpointReader):
    """Counts how often a tensor is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_names: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return super().read(name)


def test_a_stack_is_read_once_for_all_its_experts_and_let_go_with_its_block(tmp_path: Path) -> None:
    make(tmp_path, "gpt_oss")
    skeleton, reader = Skeleton(tmp_path), Counting(tmp_path)
    segment = skeleton.segments[0]
    skeleton.load(segment, reader, CPU, torch.float32)
    stacks = [name for name in reader.read_names if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == len(set(stacks)) == 2
    stack = weakref.ref(skeleton.names._made[f"{segment.prefix}.mlp.experts.gate_up_proj"])
    skeleton.unload(segment)
    assert stack() is None


def test_factors_of_awq_leave_a_mixture_as_good_as_its_norms_allow(tmp_path: Path) -> None:
    """The norm before a router is not scaled, for the router reads it as well."""
    folder, out = quantized(tmp_path, "mixtral", method="awq")
    source, written = CheckpointReader(folder), CheckpointReader(out)
    for block in range(2):
        name = f"model.layers.{block}.post_attention_layernorm.weight"
        assert torch.equal(source.read(name), written.read(name))


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_transposed_layers_that_stay_float_keep_their_layout(tmp_path: Path, method: str) -> None:
    """One of them is square, so that a wrong layout would have the right shape; AWQ changes the other."""
    folder, out = quantized(tmp_path, "gpt2", method=method, ignore=[r"attn\.c_proj", r"mlp\.c_fc", "lm_head"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(decoded.model.get_parameter(square), model.get_parameter(square))
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        near = decoded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert 0 < (plain.exp() * (plain - near)).sum(-1).mean() < 0.1


def test_parts_of_stacks_that_awq_changes_and_that_stay_float_are_written_as_they_became(tmp_path: Path) -> None:
    """With the original up_proj beside a rescaled down_proj the experts would compute something else."""
    keys = {"method": "awq", "format": "hqq", "ignore": ["(gate|up)_proj$", "self_attn", "lm_head"]}
    folder, out = quantized(tmp_path, "granitemoe", **keys)
    source, written = CheckpointReader(folder), CheckpointReader(out)
    original = source.read("model.layers.0.block_sparse_moe.input_linear.weight")[1].chunk(2)[1]
    changed = written.read("model.layers.0.block_sparse_moe.experts.1.up_proj.weight")
    assert not torch.equal(changed, original), "the test needs a factor that is not 1"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        near = decoded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert (plain.exp() * (plain - near)).sum(-1).mean() < 0.02
