"""The walk on CUDA without a GPU: with fake tensors, that have a device and no values.

Torch refuses to mix fake tensors of two devices as it refuses real ones, and to read a value of one. So a tensor
that is made on the wrong device, or a question to the device outside ``quantkit.system.host``, fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import mismatch as engine_mismatch
from quantkit.engine import smoothing as folds
from quantkit.engine import solver as solving
from quantkit.engine import statistics as statistics_module
from quantkit.engine.batches import make_batches
from quantkit.engine.ordering import quantize_in_order
from quantkit.engine.originals import Originals
from quantkit.engine.precision import pass_dtype, training_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Inputs, Strategy, Walk, WalkSettings
from quantkit.evaluation import scoring
from quantkit.exports import layer_store
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.gguf import blocks
from quantkit.methods.base import InputStatistics, Method
from quantkit.numerics import factor, fused, in_turn, mismatch
from quantkit.numerics import smoothing as awq
from quantkit.numerics.grid_search import encode, quantized, search_grid
from quantkit.schemes import Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, Nvfp4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.base import grids_of
from quantkit.schemes.ggml import Q4KScheme
from quantkit.schemes.grids import base as grids_base
from quantkit.schemes.grids import blockfloat, codebook, integer
from quantkit.schemes.grids.codebook import CodebookGrids
from quantkit.system import host
from quantkit.system.devices import Moment
from tests.tiny import Collected, TinySteps, make_model, tiny_rows, tiny_steps, tiny_task

CUDA = torch.device("cuda", 0)
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
ROWS = tiny_rows(count=3, shortest=6, longest=12)
aten = torch.ops.aten


class WithoutGuard(TorchFunctionMode):
    """Indexing and copies by way of operators.

    Their usual way asks for a guard of the device, which a build of torch without CUDA does not have.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            view, tensors = select(args[0], args[1])
            return view if tensors is None else aten.index.Tensor(view, tensors)
        if func is torch.Tensor.__setitem__:
            view, tensors = select(args[0], args[1])
            if tensors is None:
                return aten.copy_.default(view, torch.as_tensor(args[2]))
            return aten.index_put_.default(view, tensors, args[2])
        if func is torch.Tensor.copy_:
            return aten.copy_.default(args[0], args[1])
        if func is torch.Tensor.contiguous:
            return aten.clone.default(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def select(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """The view that the ints, slices, None and ... of an index give, and the tensors by which it is indexed then."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if dots:
        named = sum(part is not None and part is not Ellipsis for part in parts)
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (tensor.dim() - named)
    tensors: list[torch.Tensor | None] = []
    for part in parts:
        if isinstance(part, int):
            tensor = aten.select.int(tensor, len(tensors), part)
            continue
        if part is None:
            tensor = aten.unsqueeze.default(tensor, len(tensors))
        elif isinstance(part, slice):
            tensor = aten.slice.Tensor(tensor, len(tensors), part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, torch.Tensor) else None)
    return tensor, tensors if any(part is not None for part in tensors) else None


class FakeReader:
    """A checkpoint's tensors without their values, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.real = CheckpointReader(folder)

    def __contains__(self, name: str) -> bool:
        return name in self.real

    def dtype(self, name: str) -> torch.dtype:
        return self.real.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return torch.empty(self.real.shape(name), dtype=self.real.dtype(name))

    read_finite = read


CODEBOOKS = [Nf4Scheme(32, False), Nf4Scheme(32)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, and answers to the questions that the numerics ask: all is well at once."""
    factorized = cycle([False, True])  # "did it fail?", "is it finite?"
    monkeypatch.setattr(factor, "decide", lambda _: next(factorized))
    monkeypatch.setattr(grids_base, "decide", lambda _: True)
    monkeypatch.setattr(in_turn, "whole_numbers", lambda values: list(range(len(values))))  # "which come first?"
    monkeypatch.setattr(fused, "_refusal", lambda device, kind: "a kernel wants values")
    monkeypatch.setattr(Moment, "now", lambda _: Moment(0.0))
    monkeypatch.setattr(statistics_module, "decide", lambda _: True)  # "is every input finite?"
    monkeypatch.setattr(folds, "decide", lambda _: True)  # "is it close?": every first candidate folds
    monkeypatch.setattr(engine_mismatch, "decide", lambda _: True)  # "does it add up?"
    monkeypatch.setattr(engine_mismatch, "numbers", lambda _: [1.0, 4.0])  # tokens that are held out, and all
    monkeypatch.setattr(mismatch, "decide", lambda _: False)  # "was nothing lost?", "did it fail?"
    monkeypatch.setattr(mismatch, "numbers", lambda judged: [0.5] * len(judged))  # shares and gains
    errors = count(1e6, -1)
    # "what is lost?": ever less, so that factors are found
    monkeypatch.setattr(awq, "numbers", lambda lost: [next(errors) for _ in lost])
    _forget_grids()
    table, tables = codebook.dynamic_table(torch.device("cpu")), [scheme.grids() for scheme in CODEBOOKS]
    with FakeTensorMode() as mode, WithoutGuard():
        # Tables are computed with real numbers, and then made fake.
        monkeypatch.setattr(codebook, "dynamic_table", lambda device: mode.from_tensor(table).to(device))
        for grids in tables:
            assert isinstance(grids, CodebookGrids)
            grids._tables = {device: _faked(mode, kept) for device, kept in grids._tables.items()}
        yield
    _forget_grids()


def _forget_grids() -> None:
    """Tables are kept for the process, and those of a test are fake."""
    grids_of.cache_clear()
    blockfloat._table.cache_clear()


def _faked(mode: FakeTensorMode, tables: Any) -> Any:
    tensors = {field.name: getattr(tables, field.name) for field in fields(tables)}
    return replace(tables, **{k: mode.from_tensor(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def solve(folder: Path, method: Method | TinySteps, scheme: Scheme | None = None, **settings: Any) -> Collected:
    skeleton = Skeleton(folder)
    task, sink = tiny_task(skeleton, method, scheme, head=True)
    batches = make_batches(ROWS, CUDA, may_pad=True)
    assert batches[0].valid is not None
    dtype = pass_dtype(CUDA, torch.float32)
    Walk(skeleton, FakeReader(folder), batches, [task], WalkSettings(CUDA, dtype, **settings)).run()
    return sink


def assert_on_cuda(sink: Collected, layers: int) -> None:
    assert len(sink.results) == layers
    for name, result in sink.results.items():
        weight = result.weight
        for part in (weight.codes, weight.scales, weight.zeros, result.error, result.error_before):
            assert isinstance(part, FakeTensor)
            assert part.device == CUDA, name
        dtypes = (torch.uint8, torch.float16 if weight.scheme.kind == "int" else weight.scales.dtype, torch.uint8)
        assert (weight.codes.dtype, weight.scales.dtype, weight.zeros.dtype) == dtypes
        assert all(part.device == CUDA for part in weight.parts.values())


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "hqq"])
def test_walk_stays_on_its_device(tmp_path: Path, method: str, inputs: Inputs, strategy: Strategy) -> None:
    folder = make_real_model(tmp_path, "llama")
    assert_on_cuda(solve(folder, tiny_steps(method), inputs=inputs, strategy=strategy), layers=8)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "gpt_neox"])
def test_every_family_stays_on_its_device(tmp_path: Path, family: str) -> None:
    own = {"sliding_window": 4} if family == "mistral" else {}
    folder = make_real_model(tmp_path, family, tie_word_embeddings=True, **own)
    sink = solve(folder, tiny_steps("gptq"), IntScheme(3, -1, False))
    assert_on_cuda(sink, layers=5 if family == "gpt_neox" else 8)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"range": "search"}),
        ("gptq", {"activation_order": False, "refinements": 1}),
        ("gptq", {"refinements": 0, "search": 1}),
    ],
)
@pytest.mark.parametrize("scheme", [IntScheme(4, 16, False), IntScheme(8, -1, True)], ids=IntScheme.describe)
def test_every_option_stays_on_its_device(
    tmp_path: Path, method: str, options: dict[str, Any], scheme: IntScheme
) -> None:
    folder = make_real_model(tmp_path, "llama")
    assert_on_cuda(solve(folder, tiny_steps(method, **options), scheme), layers=8)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "scheme",
    [*CODEBOOKS, Fp8Scheme(), Fp8Scheme("block"), Mxfp4Scheme(), Nvfp4Scheme()],
    ids=lambda scheme: scheme.describe(),
)
def test_every_scheme_stays_on_its_device(tmp_path: Path, method: str, scheme: Scheme) -> None:
    folder = make_real_model(tmp_path, "llama")
    assert_on_cuda(solve(folder, tiny_steps(method), scheme), layers=8)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts that for which a host waits: values that it reads, sizes that follow from values, copies to a device."""

    READ = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, kind = func(*args, **(kwargs or {})), func.overloadpacket
        given = [each for each in args if isinstance(each, torch.Tensor)]
        reads = kind in self.READ or (kind == aten.repeat_interleave and len(given) > 1)
        chosen = args[1] if kind in (aten.index, aten.index_put, aten.index_put_) else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in chosen)
        moves = kind in (aten._to_copy, aten.copy_) and any(each.device != found.device for each in given)
        self.count += reads or by_mask or moves
        return found


def waits(method: str, options: dict[str, Any], scheme: Scheme, columns: int, device: torch.device) -> int:
    """How often the host waits for the device while a weight is solved."""
    solver = tiny_steps(method, **options).method
    weight, inputs = (torch.rand(rows, columns, device=device) for rows in (16, 1000))
    means = inputs.mean(0)
    known = InputStatistics(1000, abs_mean=means, square_mean=means, gram=inputs.T @ inputs)
    quantize = quantize_in_order(solver) if scheme.orders_columns else solver.quantize
    with Waits() as found:
        quantize(weight, known, scheme, torch.float16)
    count: int = found.count
    return count


IN_LOOPS: list[tuple[str, dict[str, Any], Scheme]] = [
    ("gptq", {}, IntScheme(4, 32, False)),
    ("gptq", {"refinements": 2, "activation_order": False}, IntScheme(4, 32, True)),
    ("gptq", {"scales": "in_turn"}, IntScheme(4, 32, False)),
    ("gptq", {"scales": "in_turn"}, Mxfp4Scheme()),
    ("gptq", {}, IntScheme(4, 32, False, desc_act=True)),
    ("gptq", {}, Nvfp4Scheme()),
    ("gptq", {}, Nf4Scheme(32)),
    ("gptq", {}, Q4KScheme()),
    ("rtn", {"range": "search"}, IntScheme(4, 32, False)),
    ("awq", {}, IntScheme(4, 32, False)),
    ("awq", {}, Mxfp4Scheme()),
    ("hqq", {"beta_unit": "step"}, IntScheme(4, 32, False)),
    ("hqq", {}, IntScheme(4, 32, False, zeros="float")),
]


@pytest.mark.parametrize(
    ("method", "options", "scheme"), IN_LOOPS, ids=lambda given: str(getattr(given, "kind", given))
)
def test_no_loop_over_columns_or_groups_asks_for_a_value(method: str, options: dict[str, Any], scheme: Scheme) -> None:
    _, few, many = (waits(method, options, scheme, columns, torch.device("cpu")) for columns in (256, 256, 512))
    assert few == many


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("method", "options", "scheme"),
    [
        ("gptq", {"scales": "in_turn"}, IntScheme(4, 16, False)),
        ("gptq", {"refinements": 0}, Nvfp4Scheme()),
        ("awq", {}, IntScheme(4, 16, False)),
        ("hqq", {}, IntScheme(4, 16, False)),
    ],
    ids=lambda given: str(getattr(given, "kind", given)),
)
def test_no_loop_over_columns_or_groups_copies_to_the_device(
    method: str, options: dict[str, Any], scheme: Scheme
) -> None:
    waits(method, options, scheme, 16, CUDA)  # tables go there once
    few, many = (waits(method, options, scheme, columns, CUDA) for columns in (32, 64))
    assert few == many


def test_a_question_in_a_loop_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = in_turn.OpenLayer.steps

    def asking(self: in_turn.OpenLayer, start: int, stop: int) -> Any:
        return steps(self, start, stop) if self.scales.isfinite().any() >= 0 else None

    monkeypatch.setattr(in_turn.OpenLayer, "steps", asking)
    given = ("gptq", {"scales": "in_turn"}, IntScheme(4, 32, False))
    assert waits(*given, 64, torch.device("cpu")) < waits(*given, 128, torch.device("cpu"))


@pytest.mark.usefixtures("fake")
def test_a_copy_in_a_loop_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = in_turn.OpenLayer.steps

    def copying(self: in_turn.OpenLayer, start: int, stop: int) -> Any:
        self._group_of = self._group_of.cpu().to(CUDA)
        return steps(self, start, stop)

    monkeypatch.setattr(in_turn.OpenLayer, "steps", copying)
    given = ("gptq", {"scales": "in_turn", "refinements": 0}, IntScheme(4, 16, False))
    assert waits(*given, 32, CUDA) < waits(*given, 64, CUDA)


def make_real_model(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint with values; it is made outside the fake mode, where saving would find none."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.overrides import _pop_mode_temporarily

    heads: dict[str, Any] = {} if family == "gpt_neox" else {"head_dim": 8}
    with unset_fake_temporarily(), _pop_mode_temporarily():
        return make_model(folder, family, **(SMALL | heads | changes))


# Scoring


class Transfers(TorchFunctionMode):
    """Counts the tensors that go from CUDA to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        leaves = isinstance(found, torch.Tensor) and found.device.type == "cpu"
        self.count += leaves and any(isinstance(each, torch.Tensor) and each.device == CUDA for each in args)
        return found


@pytest.mark.parametrize("compared", [False, True])
def test_figures_of_a_window_come_from_the_device_at_once(monkeypatch: pytest.MonkeyPatch, compared: bool) -> None:
    """However many chunks there are; the tokens and the reference are on the CPU."""
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cuda", 5 * 300)
    with FakeTensorMode(), WithoutGuard(), Transfers() as transfers:
        logits = torch.empty(33, 300, dtype=torch.bfloat16, device=CUDA)
        targets = torch.empty(33, dtype=torch.int64)
        stored = torch.empty(33, 300, dtype=torch.float16)
        expected = (lambda start, stop: stored[start:stop]) if compared else None
        figures = scoring.window_figures(logits, targets, expected, None)
        assert (figures.device, figures.shape) == (CUDA, (6, 33))
        assert transfers.count == 0
        assert figures.cpu().device.type == "cpu"
        assert transfers.count == 1


def test_a_gpu_is_given_more_rows_at_once_than_the_cache_of_a_cpu_holds() -> None:
    assert scoring.CHUNK_ELEMENTS["cuda"] // 128_000 > 500 > 30 > scoring.CHUNK_ELEMENTS["cpu"] // 128_000


STORED: list[tuple[str, Scheme]] = [
    ("compressed-tensors", IntScheme(4, 32, False)),
    ("compressed-tensors", IntScheme(8, -1, True)),
    ("compressed-tensors", Fp8Scheme("block")),
    ("compressed-tensors", Mxfp4Scheme()),
    ("compressed-tensors", Nvfp4Scheme()),
    ("gptq", IntScheme(3, 32, False)),
    ("gptq", IntScheme(4, 32, True)),
    ("awq", IntScheme(4, 32, False)),
    ("hqq", IntScheme(3, 32, False, zeros="float")),
    ("hqq", IntScheme(4, 32, False, zeros="float", axis=0)),
    ("bitsandbytes", IntScheme(8, -1, True, activations="dynamic")),
    ("bitsandbytes", Nf4Scheme(32)),
    ("gguf", IntScheme(4, 32, True)),
    ("gguf", IntScheme(5, 32, False, zeros="float")),
    ("gguf", IntScheme(8, 32, True)),
    ("gguf", Mxfp4Scheme()),
]


@pytest.fixture(params=STORED, ids=lambda given: f"{given[0]} {given[1].describe()}")
def packer(request: pytest.FixtureRequest) -> tuple[Format, QuantizedWeight]:
    """A format, and a weight with values."""
    name, scheme = request.param
    matrix = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    grid = search_grid(matrix, None, scheme, torch.float16, 4)
    return FORMATS.get(name)("float16"), quantized(encode(matrix, grid, scheme), grid, scheme)


def test_layers_are_packed_on_their_device(
    packer: tuple[Format, QuantizedWeight], fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is as large as the codes stays there, and nothing mixes devices; small things may come from the CPU."""
    monkeypatch.setattr(blocks, "decide", lambda _: True)
    monkeypatch.setattr(host, "number", lambda _: 0.5)
    store, weight = packer[0], faked_on_cuda(packer[1])
    packed = store.pack(store.fitted(weight))
    largest = max(packed.values(), key=lambda tensor: tensor.nbytes)
    assert largest.device == CUDA
    assert largest.nbytes * 8 >= weight.codes.numel() * weight.scheme.bits
    assert all(tensor.device == CUDA for tensor in packed.values() if tensor.nbytes > 4 * 256)


WITHOUT_VALUES = [
    given
    for given in STORED
    if (given[0] == "compressed-tensors" and given[1].kind != "int")
    or given in (("gptq", IntScheme(3, 32, False)), ("awq", IntScheme(4, 32, False)))
]
"""Those whose decoding looks at no value, and can be followed without."""


@pytest.mark.parametrize("packer", WITHOUT_VALUES, ids=lambda given: f"{given[0]} {given[1].describe()}", indirect=True)
def test_of_a_layer_that_is_kept_only_packed_bytes_leave_the_device(
    packer: tuple[Format, QuantizedWeight], fake: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layer_store, "same_values", lambda one, other: one.codes.device == other.codes.device)
    store, weight = packer[0], faked_on_cuda(packer[1])
    kept = layer_store.LayerStore(tmp_path, store)
    with Leaving() as leaving:
        kept.keep("layer", weight)
    assert 0 < leaving.nbytes <= kept.stored_bytes


def test_a_format_that_decodes_on_the_cpu_alone_is_asked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the device says no, the CPU has the last word."""
    asked: list[str] = []

    class Store:
        def unpack(self, packed: Any, scheme: Scheme) -> QuantizedWeight:
            asked.append(packed["codes"].device.type)
            if asked[-1] == "meta":
                raise RuntimeError("two devices")
            return QuantizedWeight(scheme, packed["codes"], torch.ones(1, 1), torch.ones(1, 1))

    weight = QuantizedWeight(IntScheme(4, 4, True), torch.ones(1, 4, device="meta"), torch.ones(1, 1), torch.ones(1, 1))
    monkeypatch.setattr(QuantizedWeight, "to", lambda self, device: replace(self, codes=torch.ones(1, 4)))
    store: Any = Store()
    packed = {"codes": torch.ones(1, 4)}
    assert layer_store.gives_back(store, packed, weight)
    assert not layer_store.gives_back(store, {"codes": torch.zeros(1, 4)}, weight)
    assert asked == ["meta", "cpu"] * 2


class Leaving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that come from CUDA to the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and args[0].device == CUDA and found.device.type == "cpu":
            self.nbytes += found.nbytes
        return found


def faked_on_cuda(weight: QuantizedWeight) -> QuantizedWeight:
    """The same without its values."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    parts = {name: moved(part) for name, part in weight.parts.items()}
    return replace(
        weight, codes=moved(weight.codes), scales=moved(weight.scales), zeros=moved(weight.zeros), parts=parts
    )


# The tests above would see a mistake


def on_cpu(function: Any) -> Any:
    def moved(*args: Any, **kwargs: Any) -> Any:
        return torch.empty_like(function(*args, **kwargs), device="cpu")

    return moved


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("method", "name"), [("gptq", "spread"), ("rtn", "stored"), ("gptq", "stored")])
def test_numerics_on_the_wrong_device_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    folder = make_real_model(tmp_path, "llama")
    owner: Any = integer if name == "stored" else integer.IntGrids
    monkeypatch.setattr(owner, name, on_cpu(getattr(owner, name)))
    with pytest.raises(RuntimeError, match="found at least two devices"):
        solve(folder, tiny_steps(method))


@pytest.mark.usefixtures("fake")
def test_statistics_on_the_wrong_device_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gatherer = statistics_module.Gatherer
    folder = make_real_model(tmp_path, "llama")
    monkeypatch.setattr(gatherer, "_sum", on_cpu(gatherer._sum))
    with pytest.raises(RuntimeError, match="found at least two devices"):
        solve(folder, tiny_steps("gptq"))


@pytest.mark.usefixtures("fake")
def test_a_question_to_the_device_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_real_model(tmp_path, "llama")
    monkeypatch.setattr(grids_base, "decide", bool)
    with pytest.raises(RuntimeError, match="local_scalar_dense"):
        solve(folder, tiny_steps("rtn"))


def test_a_task_is_not_charged_for_what_was_asked_of_the_gpu_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are those of events in its queue; it is waited for when they are asked for, and not before."""
    queue = SimpleNamespace(until=0.0, waits=0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == CUDA
            self.at = queue.until

        def synchronize(self) -> None:
            queue.waits += 1

        def elapsed_time(self, other: Any) -> float:
            milliseconds: float = 1000 * (other.at - self.at)
            return milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    originals, task = Originals(None, None, CUDA), SimpleNamespace(name="a")  # type: ignore[arg-type]
    solver = solving.Solver([task], originals, live=False, tries_again=False)  # type: ignore[list-item]

    def asks(seconds: float) -> None:
        queue.until += seconds

    spent = solver.clock()
    for own in (2.0, 3.0):
        asks(10.0)  # of the passes
        solver.work(task, partial(asks, own))  # type: ignore[arg-type]
    assert queue.waits == 0
    assert solver.seconds() == {"a": 5.0}
    assert spent.elapsed() == 25.0
    assert queue.waits == 3


def test_passes_compute_in_sixteen_bits_on_cuda() -> None:
    assert pass_dtype(CUDA, torch.float32) is torch.bfloat16
    assert pass_dtype(CUDA, torch.bfloat16) is torch.bfloat16
    assert pass_dtype(CUDA, torch.float16) is torch.float16


@pytest.mark.parametrize(
    ("amx", "avx512", "used"), [(True, False, True), (False, True, True), (False, False, True), (True, True, False)]
)
def test_passes_compute_in_bfloat16_on_a_cpu_that_is_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, used: bool
) -> None:
    """``used``: oneDNN may use the instructions."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: used)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for checkpoint in (torch.float32, torch.float16, torch.bfloat16):
        fast = used and (amx or avx512)
        assert pass_dtype(torch.device("cpu"), checkpoint) is (torch.bfloat16 if fast else torch.float32)
        assert training_dtype(torch.device("cpu"), checkpoint) is pass_dtype(torch.device("cpu"), checkpoint)
