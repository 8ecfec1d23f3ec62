"""Recovery: what a format stores is trained, the divergence falls, and the file stays what it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.precision import training_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.exports import open_export
from quantkit.exports.manifest import read_manifest
from quantkit.numerics.trained_codes import TrainedCodes
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.recipe.recovering import RecoverOptions
from quantkit.recovery import training
from quantkit.recovery.descent import NotFiniteError
from quantkit.recovery.losses import divergence as divergence_of
from quantkit.recovery.losses import relative_error
from quantkit.recovery.saved import save_state
from quantkit.recovery.stage import recover, training_folder
from quantkit.recovery.student import NEAR
from quantkit.recovery.targets import Targets
from quantkit.recovery.training import Training
from quantkit.recovery.whole_changes import whole_changes
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes import IntScheme
from quantkit.system.memory_bounds import MemoryBounds
from quantkit.system.progress import Silent
from tests.runs import Notebook
from tests.tiny import make_model, tiny_rows

NF4 = {"format": "bitsandbytes", "scheme": "nf4", "bits": None, "group_size": 64, "double_quant": False}
FEW = RecoverOptions(steps=30, batch_tokens=192, evaluations=3, held_out=0.2, learning_rate=1e-2, norm_rate=1e-2)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny float model and rows."""
    folder = make_model(tmp_path_factory.mktemp("float"), num_hidden_layers=2)
    return Job(folder, {"reference": "tiny"}, "float32", rows=tiny_rows(24), calibration_sha256="rows", device="cpu")


def exported(job: Job, out: Path, **keys: Any) -> Path:
    given = {"name": "it", "method": "rtn", "bits": 2, "group_size": 32, **keys}
    return quantize(job, VariantSpec.model_validate(given), out).folder


@pytest.fixture(scope="module")
def two_bits(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(job, tmp_path_factory.mktemp("two") / "int2")


@pytest.fixture(scope="module")
def recovered(job: Job, two_bits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recover(job, two_bits, FEW, tmp_path_factory.mktemp("done") / "better", Silent()).folder


def divergence(job: Job, checkpoint: Path, rows: list[list[int]]) -> float:
    """Of a checkpoint from the float model, by the runtime that decodes anything."""
    found = []
    for folder in (job.source, checkpoint):
        loaded = RUNTIMES.get("reference").load(folder, LoadOptions(device="cpu", dtype="float32", context_length=64))
        found.append([loaded.logits(torch.tensor(row)).float().log_softmax(-1) for row in rows])
    return float(torch.cat([(one.exp() * (one - other)).sum(-1) for one, other in zip(*found, strict=True)]).mean())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_other_rows_diverge_less_and_the_file_has_the_same_tensors(job: Job, two_bits: Path, recovered: Path) -> None:
    other = tiny_rows(4, seed=5)
    assert divergence(job, recovered, other) < 0.8 * divergence(job, two_bits, other)
    before, after = CheckpointReader(two_bits), CheckpointReader(recovered)
    assert {name: (before.dtype(name), before.shape(name)) for name in before.names()} == {
        name: (after.dtype(name), after.shape(name)) for name in after.names()
    }
    assert (two_bits / "config.json").read_bytes() == (recovered / "config.json").read_bytes()
    manifest = read_manifest(recovered)
    assert manifest is not None
    assert manifest["recovered"]["after"] < 0.8 * manifest["recovered"]["before"]


def block_errors(job: Job, checkpoint: Path, rows: list[list[int]]) -> float:
    """Of what the first block gives for every token, relative to what the float model's gives, on average."""
    given: list[list[torch.Tensor]] = [[], []]
    for folder, found in zip((job.source, checkpoint), given, strict=True):
        options = LoadOptions(device="cpu", dtype="float32", context_length=64)
        loaded: Any = RUNTIMES.get("reference").load(folder, options)
        block = loaded.model.model.layers[0]
        block.register_forward_hook(lambda _block, _args, output, found=found: found.append(output[0]))
        for row in rows:
            loaded.logits(torch.tensor(row))
    return float(relative_error(torch.cat(given[0]), torch.cat(given[1]))) / sum(map(len, rows))


def test_hidden_states_between_the_blocks_come_closer(
    job: Job, two_bits: Path, recovered: Path, tmp_path: Path
) -> None:
    nearer = recover(job, two_bits, replace_options(FEW, hidden=16.0), tmp_path / "nearer", Silent()).folder
    other = tiny_rows(4, seed=5)
    assert block_errors(job, nearer, other) < 0.95 * block_errors(job, recovered, other)
    assert divergence(job, nearer, other) < 1.1 * divergence(job, recovered, other)


def test_codes_of_two_bits_are_trained_unless_it_is_said_what(job: Job, two_bits: Path, tmp_path: Path) -> None:
    layer = next(iter(open_export(two_bits).schemes))
    scales = replace_options(FEW, train=("scales",))
    alone = recover(job, two_bits, scales, tmp_path / "alone", Silent()).folder
    given, held = (open_export(each).weight(layer) for each in (two_bits, alone))
    assert torch.equal(given.codes, held.codes)
    assert not torch.equal(given.scales, held.scales)
    norm = "model.norm.weight"
    assert torch.equal(open_export(two_bits).float_tensor(norm), open_export(alone).float_tensor(norm))


def test_all_that_is_trained_by_default_changes(two_bits: Path, recovered: Path) -> None:
    before, after = open_export(two_bits), open_export(recovered)
    for layer in before.schemes:
        one, other = before.weight(layer), after.weight(layer)
        assert not torch.equal(one.codes, other.codes)
        assert not torch.equal(one.scales, other.scales)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert not torch.equal(before.float_tensor(name), after.float_tensor(name))
    untouched = "model.embed_tokens.weight"
    assert torch.equal(before.float_tensor(untouched), after.float_tensor(untouched))


def replace_options(options: RecoverOptions, **changes: Any) -> RecoverOptions:
    return options.model_copy(update=changes)


class Killed(BaseException):
    """Ends a process in the middle of its work."""


@pytest.fixture
def killed_behind_the_second_save(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own, saves = save_state, list[int]()

    def save(*args: Any) -> None:
        own(*args)
        saves.append(args[1])
        if len(saves) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save)
        yield


def test_a_killed_training_goes_on_and_writes_the_same_bytes(
    job: Job, two_bits: Path, recovered: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("killed_behind_the_second_save")
    out = tmp_path / "again"
    with pytest.raises(Killed):
        recover(job, two_bits, FEW, out, Silent())
    assert training_folder(out).is_dir()
    steps = Notebook()
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.undo()
    done = recover(job, two_bits, FEW, out, steps)
    assert next(place for step, place, _ in steps.steps if step == "step") > 18
    assert bytes_of(done.folder) == bytes_of(recovered)
    assert not training_folder(out).exists()


def test_blocks_that_find_no_room_are_run_again_for_the_same_bytes(
    job: Job, two_bits: Path, recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: set[bool] = set()
    bounded = replace(job, bounds=MemoryBounds({"cpu": 1}))
    holding = Training._holding

    def told(self: Training) -> Callable[[], bool]:
        found = holding(self)

        def answer() -> bool:
            answers.add(found())
            return found()

        return answer

    monkeypatch.setattr(Training, "_holding", told)
    assert bytes_of(recover(bounded, two_bits, FEW, tmp_path / "little", Silent()).folder) == bytes_of(recovered)
    assert answers == {False}


def test_freed_memory_is_given_back_after_each_step(
    job: Job, two_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(training, "give_back", lambda: seen.append("given"))
    recover(job, two_bits, replace_options(FEW, steps=3, evaluations=1), tmp_path / "few", Silent())
    assert len(seen) == 3


def test_what_is_there_is_reused(job: Job, two_bits: Path, recovered: Path) -> None:
    assert recover(job, two_bits, FEW, recovered, Silent()).reused


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far(
    job: Job, two_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = Training._step, []

    def step(self: Training, rows: list[int]) -> None:
        calls.append(rows)
        if len(calls) == 6:
            raise NotFiniteError
        own(self, rows)

    monkeypatch.setattr(Training, "_step", step)
    few = replace_options(FEW, steps=15, train=("scales", "norms"))
    done = recover(job, two_bits, few, tmp_path / "out", Silent())
    assert any("step 6: the loss is not finite" in note for note in done.facts["notes"])
    told = done.facts["recovered"]
    assert told["steps"] == 5
    assert told["after"] == min(loss for _, loss in told["history"]) < told["before"]


def test_what_is_never_better_stays_as_it_was(job: Job, two_bits: Path, tmp_path: Path) -> None:
    wild = replace_options(FEW, norm_rate=1.0, warmup=0.0, train=("norms",), steps=6)
    done = recover(job, two_bits, wild, tmp_path / "out", Silent())
    assert done.facts["recovered"]["after"] == done.facts["recovered"]["before"]
    assert any("stays as it is" in note for note in done.facts["notes"])
    assert bytes_of(done.folder) == bytes_of(two_bits)


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.22), (25, 0.044), (100, 0.022), (120, 0.02), (240, 0.01)])
def test_codes_go_a_step_of_the_grid_in_many_steps_and_less_in_few(steps: int, rate: float) -> None:
    assert RecoverOptions(steps=steps).rate_of_codes() == pytest.approx(rate, rel=0.01)
    assert RecoverOptions(steps=steps, code_rate=0.5).rate_of_codes() == 0.5


def test_codes_of_the_file_are_not_given_up_by_the_first_steps(job: Job, two_bits: Path, tmp_path: Path) -> None:
    few = replace_options(FEW, steps=6, train=("codes",), evaluations=6, held_out=0.5)
    found = recover(job, two_bits, few, tmp_path / "few", Silent()).facts["recovered"]["history"]
    rate = few.rate_of_codes()
    assert NEAR + 3 * rate < 0.5 < NEAR + 5 * rate
    assert [loss for step, loss in found if step <= 3] == [found[0][1]] * 4
    assert found[-1][1] != found[0][1]


def test_the_divergence_and_its_gradient_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(5, 11, generator=draw).log_softmax(-1)
    ours, theirs = (torch.randn(5, 11, generator=draw.manual_seed(1)).requires_grad_() for _ in range(2))
    own = divergence_of(target, ours)
    wanted = torch.nn.functional.kl_div(theirs.log_softmax(-1), target, log_target=True, reduction="sum")
    torch.testing.assert_close(own, wanted)
    torch.autograd.backward([own / 3, wanted / 3])
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_passes_that_are_run_backward_are_never_in_float16() -> None:
    cuda = torch.device("cuda")
    assert training_dtype(cuda, torch.float16) == training_dtype(cuda, torch.float32) == torch.bfloat16
    assert training_dtype(torch.device("cpu"), torch.float16) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("keys", "runtime"),
    [
        ({"format": "gptq", "bits": 4}, "reference"),
        ({"format": "awq", "bits": 4, "symmetric": False}, "reference"),
        ({"format": "hqq", "bits": 2, "symmetric": False, "zeros": "float"}, "reference"),
        ({"format": "gguf", "bits": 4}, "llama.cpp"),
        ({"format": "compressed-tensors", "bits": 4}, "transformers"),
        (NF4, "reference"),
    ],
    ids=lambda each: each["format"] if isinstance(each, dict) else each,
)
def test_every_format_is_trained_and_loads_where_it_did(
    job: Job, tmp_path: Path, keys: dict[str, Any], runtime: str
) -> None:
    given = exported(job, tmp_path / "given", **keys)
    options = replace_options(
        FEW, steps=8, batch_tokens=96, evaluations=2, learning_rate=2e-3, train=("scales", "zeros")
    )
    done = recover(job, given, options, tmp_path / "done", Silent())
    told = done.facts["recovered"]
    assert told["after"] < told["before"]
    row = torch.tensor(tiny_rows(1)[0])
    options_of_load = LoadOptions(device="cpu", dtype="float32", context_length=64)
    ours = RUNTIMES.get(runtime).load(done.folder, options_of_load).logits(row).float()
    decoded = RUNTIMES.get("reference").load(done.folder, options_of_load).logits(row).float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), decoded.flatten(), dim=0) > 0.999


def test_refusals(job: Job, two_bits: Path, tmp_path: Path) -> None:
    k_quant = exported(job, tmp_path / "nf4", bits=None, group_size=None, scheme="nf4", format="bitsandbytes")
    with pytest.raises(QuantizationError, match=r"stores nothing of scales, norms|stores nothing of codes"):
        recover(job, k_quant, replace_options(FEW, train=("codes",)), tmp_path / "a", Silent())
    with pytest.raises(QuantizationError, match="3 rows are too few"):
        recover(replace(job, rows=job.rows[:3]), two_bits, FEW, tmp_path / "b", Silent())
    with pytest.raises(QuantizationError, match="no rows to train on"):
        recover(replace(job, rows=()), two_bits, FEW, tmp_path / "c", Silent())
    shutil.copytree(two_bits, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that quantkit wrote"):
        recover(job, tmp_path / "foreign", FEW, tmp_path / "d", Silent())


def test_gradients_go_straight_through_the_rounding_within_the_grid() -> None:
    from quantkit.numerics.grid_search import encode, quantized

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=draw)
    scheme = IntScheme(2, 16, False, "float")
    grid = scheme.grids().spanning(scheme.grids().grouped(weight), torch.float32)
    found = TrainedCodes.of(quantized(encode(weight, grid, scheme), grid, scheme), weight)
    with torch.no_grad():
        found.latents.add_(torch.randn(found.latents.shape, generator=draw))
    leaves = found.parameters()
    apart = {name: each.detach().clone().requires_grad_() for name, each in leaves.items()}
    given, held = found.trainable.given, apart["latents"].clamp(0, 3)
    codes = held + (held.round() - held).detach()
    levels = codes - (given.zeros.float() + apart["shifts"]).unsqueeze(-1)
    plain = (levels * (given.scales.float() * apart["factors"]).unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(found.weight(), plain)
    gradient = torch.randn(plain.shape, generator=draw)
    torch.autograd.backward([found.weight(), plain], [gradient, gradient])
    assert found.latents.grad is not None
    assert bool((found.latents.grad == 0).any())
    for name, wanted in apart.items():
        torch.testing.assert_close(leaves[name].grad, wanted.grad)


@pytest.mark.parametrize(
    "scheme", [IntScheme(3, 16), IntScheme(3, 16, symmetric=False), IntScheme(3, 16, False, "float")]
)
def test_trained_codes_begin_with_the_nearest_of_the_float_weight(scheme: IntScheme) -> None:
    from quantkit.numerics.grid_search import encode, quantized

    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    groups = scheme.grids().grouped(weight)
    grid = scheme.grids().spanning(groups, torch.float32)
    given = quantized(encode(weight, grid, scheme), grid, scheme)
    found = TrainedCodes.of(given, weight)
    torch.testing.assert_close(found.weight().detach(), given.dequantize(torch.float32))
    assert torch.equal(found.result().codes, given.codes)
    torch.autograd.backward([found.weight().square().sum()])
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in found.parameters().values())


def test_trained_codes_can_begin_near_those_of_the_file() -> None:
    from quantkit.numerics.grid_search import encode, quantized

    scheme = IntScheme(2, 16, symmetric=False)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    grid = scheme.grids().spanning(scheme.grids().grouped(weight), torch.float32)
    given = quantized(encode(weight.roll(1, 0), grid, scheme), grid, scheme)
    found = TrainedCodes.of(given, weight, within=0.4)
    assert torch.equal(found.result().codes, given.codes)
    off = found.latents.detach() - given.scheme.grids().grouped(given.codes).float()
    assert off.abs().max() == pytest.approx(0.4, abs=1e-5)
    towards = weight - given.dequantize(torch.float32)
    assert torch.equal(off.flatten(1).sign(), towards.sign())
    assert not torch.equal(TrainedCodes.of(given, weight).result().codes, given.codes)


def test_a_rotated_file_comes_closer_too(job: Job, tmp_path: Path) -> None:
    """Its weights are those of the turned float model, and so are its hidden states."""
    rotated = exported(job, tmp_path / "rotated", transforms=["rotate"], bits=3)
    floats = Skeleton(job.source), CheckpointReader(job.source)
    changes = whole_changes(read_manifest(rotated), *floats, torch.device("cpu"))
    name = "model.layers.1.self_attn.o_proj"
    stored, weight = open_export(rotated).weight(name).dequantize(torch.float32), floats[1].read(f"{name}.weight")
    turned = changes.apply(name, "weight", weight)
    assert (stored - turned).norm() < 0.3 * turned.norm()
    assert (stored - weight).norm() > weight.norm()
    few = replace_options(FEW, steps=15, evaluations=1)
    done = recover(job, rotated, few, tmp_path / "better", Silent()).folder
    other = tiny_rows(4, seed=5)
    assert divergence(job, done, other) < 0.9 * divergence(job, rotated, other)


def test_targets_are_hidden_states_as_they_were_turned(job: Job, tmp_path: Path) -> None:
    rotated = exported(job, tmp_path / "rotated", transforms=["rotate"], bits=8)
    quantkit.convert(rotated, to="gptq", out=tmp_path / "gptq")
    floats = Skeleton(job.source), CheckpointReader(job.source)
    changes = whole_changes(read_manifest(tmp_path / "gptq"), *floats, torch.device("cpu"))
    loaded: Any = RUNTIMES.get("reference").load(rotated, LoadOptions(dtype="float32"))
    with Targets(*floats, job.rows, tmp_path / "targets", torch.device("cpu"), torch.float32, changes, True) as targets:
        targets.prepare(lambda _done, _total: None)
        (batch,) = targets.batches([0])
        ids = torch.tensor([job.rows[0]])
        found = loaded.model.model(ids, output_hidden_states=True).hidden_states[1][0].detach()
        wanted = targets.hidden(batch, 0)
        assert float(relative_error(wanted, found)) < 1e-3 * len(job.rows[0])
        head = targets.log_probabilities(targets.hidden(batch))
        torch.testing.assert_close(head, loaded.logits(ids[0]).log_softmax(-1), rtol=0.02, atol=0.02)
