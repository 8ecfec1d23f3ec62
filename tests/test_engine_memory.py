"""Memory holds one block, however many the model has."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import solve as solve_module
from quantkit.engine import stacks as stacks_module
from quantkit.engine.batches import make_batches
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.stacks import InputGroup
from quantkit.engine.tasks import VariantTask
from quantkit.engine.walk import Inputs, Strategy, Walk, WalkSettings
from quantkit.methods.base import InputStatistics
from quantkit.schemes import IntScheme
from tests.tiny import Forgetful, TinySteps, make_model, tiny_method, tiny_rows, tiny_steps, tiny_task

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
FEW, MANY = 3, 6
WEAK_REFERENCE: Any = reductions.StorageWeakRef
SOLVE: dict[str, Any] = {"search": 1, "refinements": 0}
QUICK: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": SOLVE, "awq+gptq": {**SOLVE, "alphas": 2}}


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base has no type hints
    """The most bytes of tensors alive at any operation; views count once, meta tensors do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.alive: dict[Any, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference = WEAK_REFERENCE(storage)
        if reference not in self.alive:
            self.alive = {known: size for known, size in self.alive.items() if not known.expired()}
            self.alive[reference] = storage.nbytes()
            self.peak = max(self.peak, sum(self.alive.values()))


def peak_of(folder: Path, method: TinySteps, **settings: Any) -> int:
    tracker = PeakBytes()
    with tracker:
        skeleton = Skeleton(folder)
        task, _ = tiny_task(skeleton, method, IntScheme(4, 64, True))
        task = replace(task, sink=Forgetful())
        batches = make_batches(tiny_rows(count=2, shortest=16, longest=16), CPU, may_pad=True)
        Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU, **settings)).run()
    return tracker.peak


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models by their number of blocks."""
    return {
        blocks: make_model(tmp_path_factory.mktemp(f"blocks{blocks}"), num_hidden_layers=blocks, **SHAPE)
        for blocks in (FEW, MANY)
    }


def block_bytes(folder: Path) -> int:
    reader = CheckpointReader(folder)
    return sum(reader.nbytes(name) for name in reader.names() if name.startswith("model.layers.0."))


@pytest.mark.parametrize(
    ("method", "inputs", "strategy"),
    [
        ("rtn", "quantized", "one-pass"),
        ("gptq", "quantized", "one-pass"),
        ("gptq", "quantized", "recompute"),
        ("gptq", "float", "one-pass"),
        ("awq+gptq", "float", "one-pass"),
        ("awq+gptq", "quantized", "one-pass"),
    ],
)
def test_peak_does_not_grow_with_the_blocks(
    models: dict[int, Path], method: str, inputs: Inputs, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = tiny_steps(method, **QUICK[method])
    few = peak_of(models[FEW], quantizer, inputs=inputs, strategy=strategy)
    many = peak_of(models[MANY], quantizer, inputs=inputs, strategy=strategy)
    assert few > block_bytes(models[FEW])
    assert many <= 1.05 * few
    # The tracker would see it if blocks were not let go.
    monkeypatch.setattr(Skeleton, "unload", lambda *_: None)
    kept = peak_of(models[MANY], quantizer, inputs=inputs, strategy=strategy)
    assert kept - many >= 0.85 * (MANY - 1) * block_bytes(models[MANY])


def test_layers_that_are_large_together_are_solved_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {
        name: torch.randn(8, 64, generator=torch.Generator().manual_seed(place)) for place, name in enumerate("abc")
    }
    task = VariantTask("v", tiny_method(), dict.fromkeys(weights, IntScheme(4, 32, True)), torch.float16, Forgetful())
    rows: list[list[int]] = []

    def solved() -> dict[str, torch.Tensor]:
        group = InputGroup(dict(weights), InputStatistics())
        return {each.name: each.weight.codes for each in solve_module.solve_groups(task, [group])}

    plain = solve_module._solved

    def seen(task: VariantTask, method: Any, stacks: Any, scheme: Any) -> Any:
        rows.append([len(each.weight) for each in stacks])
        return plain(task, method, stacks, scheme)

    monkeypatch.setattr(solve_module, "_solved", seen)
    together = solved()
    monkeypatch.setattr(stacks_module, "STACKED", 2 * 8 * 64)
    apart = solved()
    assert rows == [[24], [16], [8]]
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], codes) for name, codes in together.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_shard_stays_open_or_mapped(tmp_path: Path) -> None:
    folder = make_model(tmp_path, shards=3)
    assert len(list(folder.glob("*.safetensors"))) > 1
    seen: list[str] = []

    def look(*_: int) -> None:
        process = Path("/proc/self")
        opened = [str(link.readlink()) for link in (process / "fd").iterdir() if link.is_symlink()]
        seen.append((process / "maps").read_text() + "\n".join(opened))

    skeleton = Skeleton(folder)
    names = [name for segment in skeleton.segments for name in segment.linears]
    task = VariantTask(
        "variant", tiny_method(), dict.fromkeys(names, IntScheme(4, 32, True)), torch.float16, Forgetful()
    )
    batches = make_batches(tiny_rows(), CPU, may_pad=True)
    with (folder / "config.json").open("rb"):
        look()
        assert str(folder / "config.json") in seen.pop()
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU), look).run()
    assert len(seen) == 2
    shards = [str(shard) for shard in folder.glob("*.safetensors")]
    assert not any(shard in each for shard in shards for each in seen)
