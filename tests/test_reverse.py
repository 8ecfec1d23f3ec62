"""The reverse walk has the gradients that transformers has, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import reverse
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.kept_calls import Keep, OnDisk, on_cpu, on_device
from quantkit.engine.reverse import ReverseWalk, from_checkpoint, standing_in
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton
from tests.architectures import BASE, make
from tests.test_engine_memory import PeakBytes
from tests.tiny import VOCABULARY, make_model, tiny_rows

CPU = torch.device("cpu")
GEMMA3N: dict[str, Any] = {
    **BASE, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4,
}  # fmt: skip
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": BASE, "qwen3": BASE, "gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {}, "mixtral": {},
    "gpt2": {}, "opt": {}, "cohere": {}, "zamba2": {}, "mamba": MAMBA, "gemma3n_text": GEMMA3N, "hrm_text": {},
    "llama4_text": {},
}  # fmt: skip


def loss(logits: torch.Tensor, _: Batch, places: torch.Tensor) -> torch.Tensor:
    """A sum over tokens in which each counts in its own way."""
    return (logits.float().log_softmax(-1)[:, 7] * (1 + 0.1 * places)).sum()


def gradients(
    folder: Path,
    batches: Sequence[Batch],
    keep: Keep = on_device,
    on_output: Callable[[int, torch.Tensor], None] | None = None,
    holds: Callable[[], bool] = lambda: False,
) -> tuple[float, dict[str, torch.Tensor], Skeleton]:
    """Of the loss to all parameters of the blocks, by their names in the model."""
    skeleton, reader = Skeleton(folder), CheckpointReader(folder)
    plain = from_checkpoint(skeleton, reader, CPU, torch.float32)
    found: dict[str, torch.Tensor] = {}

    @contextmanager
    def loaded(segment: Segment, for_gradients: bool) -> Iterator[None]:
        with plain(segment, for_gradients):
            own = {name: each.detach().requires_grad_() for name, each in segment.module.named_parameters()}
            with standing_in(segment.module, own):
                yield
            for name, each in own.items():
                if each.grad is not None:
                    full = f"{segment.prefix}.{name}"
                    found[full] = found[full] + each.grad if full in found else each.grad

    with ReverseWalk(skeleton, reader, CPU, torch.float32, loaded, keep, holds=holds, on_output=on_output) as walk:
        total = walk.run(batches, loss)
    return total, found, skeleton


def expected(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Leave the gradients at the parameters of transformers' own model."""
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.token_ids, use_cache=False).logits
        flat = batch.tokens_of(logits.flatten(0, 1))[0]
        value = loss(flat, batch, torch.arange(len(flat)))
        value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    return total


@pytest.mark.parametrize("architecture", KINDS)
def test_gradients_are_those_of_transformers(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path, architecture, **KINDS[architecture])
    batches = make_batches(tiny_rows(3, 8, 12), CPU, may_pad=architecture != "mixtral")
    monkeypatch.setattr(reverse, "CHUNK_LOGITS", 7 * VOCABULARY)
    total, found, skeleton = gradients(tmp_path, batches)
    held, same_again, _ = gradients(tmp_path, batches, holds=lambda: True)
    assert held == total
    assert all(torch.equal(same_again[name], each) for name, each in found.items())
    assert total == pytest.approx(expected(model, batches), rel=1e-5)
    alike, blocks = 0, tuple(f"{segment.prefix}." for segment in skeleton.segments)
    for name, parameter in model.named_parameters():
        same = [found[each] for each in aliases(model, parameter) if each in found and each.startswith(blocks)]
        if same and not isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            assert parameter.grad is not None
            close = 1e-4 * float(parameter.grad.abs().max())
            torch.testing.assert_close(sum(same), parameter.grad, rtol=1e-3, atol=close, msg=name)
            alike += 1
    assert alike >= 8


def aliases(model: PreTrainedModel, parameter: torch.Tensor) -> list[str]:
    """All names of a parameter; blocks may share it."""
    return [name for name, each in model.named_parameters(remove_duplicate=False) if each is parameter]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def test_a_gradient_from_between_the_blocks_joins_the_one_from_behind(llama: Path) -> None:
    def weighed(output: torch.Tensor) -> torch.Tensor:
        return 3 * output.square().sum()

    seen = list[int]()

    def on_output(index: int, output: torch.Tensor) -> None:
        seen.append(index)
        if index == 0:
            torch.autograd.backward(weighed(output))

    batches = make_batches(tiny_rows(2, 8, 12), CPU, may_pad=True)
    _, found, _ = gradients(llama, batches, on_output=on_output)
    assert set(seen) == {0, 1, 2}
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    outputs = list[torch.Tensor]()
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    expected(model, batches)
    before = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    for batch in batches:
        model(input_ids=batch.token_ids, use_cache=False)
        torch.autograd.backward(weighed(outputs[-1]))
    for number in range(3):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        torch.testing.assert_close(found[name], model.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, model.model.layers[0].mlp.down_proj.weight.grad, rtol=1e-2)


def test_what_waits_elsewhere_gives_the_same(llama: Path, tmp_path: Path) -> None:
    batches = make_batches(tiny_rows(4, 8, 12), CPU, may_pad=True, limit=24)
    assert len(batches) > 1
    total, wanted, _ = gradients(llama, batches)
    for keep in (on_cpu, OnDisk(tmp_path)):
        again, found, _ = gradients(llama, batches, keep)
        assert again == total
        assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert not list(tmp_path.iterdir())


def are_empty(skeleton: Skeleton) -> bool:
    """Whether no block has its matrices."""
    return all(each.is_meta for segment in skeleton.segments for each in segment.module.parameters() if each.ndim > 1)


def test_some_blocks_hold_their_graph_and_others_are_run_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(tiny_rows(4, 8, 12), CPU, may_pad=True, limit=24)
    runs = list[int]()
    own = LlamaMLP.forward

    def counted(self: LlamaMLP, hidden: torch.Tensor) -> Any:
        runs.append(1)
        return own(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    total, wanted, _ = gradients(llama, batches)
    assert len(runs) == 2 * 3 * len(batches)
    runs.clear()
    answers = iter([True, False, True])
    again, found, skeleton = gradients(llama, batches, on_cpu, holds=lambda: next(answers))
    assert len(runs) == (3 + 1) * len(batches)
    assert again == total
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert are_empty(skeleton)


def test_an_error_lets_go_of_what_blocks_hold(llama: Path) -> None:
    skeleton, reader = Skeleton(llama), CheckpointReader(llama)

    def fails(*_: object) -> torch.Tensor:
        raise ValueError("loss")

    with (
        ReverseWalk(skeleton, reader, CPU, torch.float32, holds=lambda: True) as walk,
        pytest.raises(ValueError, match="loss"),
    ):
        walk.run(make_batches(tiny_rows(2, 8, 12), CPU, may_pad=True), fails)
    assert are_empty(skeleton)


def test_hidden_states_and_logits_are_the_models(tmp_path: Path) -> None:
    model = make(tmp_path, "gemma2", final_logit_softcapping=2.0)
    (batch,) = make_batches(tiny_rows(3, 8, 12), CPU, may_pad=True)
    assert batch.valid is not None
    skeleton, reader = Skeleton(tmp_path), CheckpointReader(tmp_path)
    with ReverseWalk(skeleton, reader, CPU, torch.float32) as walk:
        (hidden,) = walk.hidden([batch])
        assert skeleton.head is not None
        skeleton.load(skeleton.head, reader, CPU, torch.float32)
        found = walk.logits(hidden)
    with torch.no_grad():
        wanted = model(input_ids=batch.token_ids).logits.flatten(0, 1)[batch.valid]
        torch.testing.assert_close(found, wanted)
        assert float(wanted.abs().max()) <= 2.0
    assert "forward" not in vars(skeleton.blocks[0])


def test_a_head_is_given_the_dtype_that_its_weight_has_once_it_is_loaded(tmp_path: Path) -> None:
    """Mamba's code asks the head for its dtype, which stands in while blocks run."""
    model, batches = make(tmp_path, "mamba", **MAMBA), make_batches(tiny_rows(2, 8, 12), CPU, may_pad=False)
    with ReverseWalk(Skeleton(tmp_path), CheckpointReader(tmp_path), CPU, torch.bfloat16) as walk:
        assert walk.run(batches, loss) == pytest.approx(expected(model, batches), rel=0.02)


def test_tensors_that_stand_in_pass_their_gradient_on_once() -> None:
    linear = torch.nn.Linear(4, 3)
    factor = torch.tensor(2.0, requires_grad=True)
    inputs, before = torch.randn(5, 4), linear.weight
    with standing_in(linear, {"weight": linear.weight.detach() * factor}):
        for row in inputs:
            linear(row).sum().backward()
    assert linear.weight is before
    assert factor.grad is not None
    assert float(factor.grad) == pytest.approx(float((before.detach() @ inputs.T).sum()), rel=1e-4)


def test_peak_does_not_grow_with_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(tiny_rows(1, 8, 8), CPU, may_pad=True)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}

    def peak(blocks: int) -> int:
        folder = tmp_path / str(blocks)
        if not folder.exists():
            make_model(folder, num_hidden_layers=blocks, **shape)
        tracker = PeakBytes()
        with tracker:
            skeleton, reader = Skeleton(folder), CheckpointReader(folder)
            (tmp_path / "kept").mkdir(exist_ok=True)
            with ReverseWalk(skeleton, reader, CPU, torch.float32, keep=OnDisk(tmp_path / "kept")) as walk:
                walk.run(batches, loss)
        return tracker.peak

    few, many = peak(3), peak(6)
    assert many <= 1.05 * few
    monkeypatch.setattr(Skeleton, "unload", lambda *_: None)
    assert peak(6) > 1.5 * many
