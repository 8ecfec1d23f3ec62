"""Loops over columns as one kernel: it finds what they find, by triton's interpreter too, and is left where it fails.

``make fused`` runs these with triton; without it a stand-in of torch takes the kernel's place, so that what is handed
to it is tested, and where its results go.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.methods.base import InputStatistics
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.numerics import fused
from quantkit.quantization import resume
from quantkit.quantization.solving_notes import loop_notes
from quantkit.schemes import Fp4Scheme, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.ggml import Q4KScheme, Q6KScheme
from quantkit.schemes.grids.base import Uniform
from tests.tiny import tiny_steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1: make fused")
KINDS = ("LIMITS", "SHIFTED", "TABLE", "FLOATS")


def nearest(values: torch.Tensor, low: Any, high: Any, levels: fused.Levels) -> torch.Tensor:
    """What the kinds of levels mean."""
    if levels.kind == "LIMITS":
        return values.round().clamp(low, high)
    if levels.kind == "SHIFTED":
        shifted: torch.Tensor = (values + low).round().clamp(0, high) - low
        return shifted
    if levels.table is not None:
        count = (len(levels.table) + 1) // 2
        return levels.table[count - 1 :][torch.bucketize(values, levels.table[: count - 1])]
    dtype = torch.float8_e4m3fn if levels.high == 448 else torch.float16
    steps = values.clamp(-float(levels.high), float(levels.high))
    if dtype == torch.float16:  # E2M1 is float16 rounded to one bit behind the first, from 1 on
        power = steps.abs().log2().floor().clamp(min=0).exp2()
        return torch.copysign((steps / power * 2).round() * power / 2, values)
    return steps.to(dtype).float()


def by_torch(
    start: torch.Tensor,
    scales: torch.Tensor,
    levels: fused.Levels,
    push: torch.Tensor,
    found: torch.Tensor,
    errors: torch.Tensor,
    before: torch.Tensor | None = None,
) -> None:
    """What the kernel does."""
    left, layers = start.clone(), len(start)

    def of(value: torch.Tensor | float, column: int) -> Any:
        return value[column].expand(layers, -1) if isinstance(value, torch.Tensor) else value

    for column in range(start.shape[1]):
        old = torch.zeros(()) if before is None else before[:, column].clone()
        values = old + left[:, column] / scales[:, column]
        new = nearest(values, of(levels.low, column), of(levels.high, column), levels)
        error = left[:, column] - new * scales[:, column] if before is None else (new - old) * scales[:, column]
        found[:, column], errors[:, column] = new, error
        left[:, column + 1 :] -= push[:, column, column + 1 :].unsqueeze(2) * error.unsqueeze(1)


class Kernel:
    """Takes the place of the loops on the CPU once it is put there.

    Attributes:
        widths: of the blocks that it was given.
    """

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.widths: list[int] = []
        self._run, self._monkeypatch = run, monkeypatch

    def put(self) -> None:
        self._monkeypatch.setattr(fused, "run", self)
        self._monkeypatch.setattr(fused, "_refusal", lambda device, kind: "")
        self._monkeypatch.setattr(fused, "is_fused", lambda device, rounder: fused._kind(rounder) is not None)

    def __call__(self, start: torch.Tensor, *rest: Any) -> None:
        self.widths.append(start.shape[1])
        self._run(start, *rest)


@pytest.fixture(params=["stand-in", pytest.param("triton", marks=needs_interpreter)])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(by_torch if request.param == "stand-in" else fused.run, monkeypatch)


def inputs_of(columns: int, seed: int) -> InputStatistics:
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(900, 12, generator=draw) @ torch.randn(12, columns, generator=draw)
    inputs = shared + torch.randn(900, columns, generator=draw)
    return InputStatistics(900, gram=inputs.T @ inputs / 900)


def solved(scheme: Scheme, options: dict[str, Any], columns: int, layers: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    given = [(torch.randn(40, columns, generator=draw), inputs_of(columns, seed)) for seed in range(layers)]
    solutions = Gptq(GptqOptions(**options)).quantize_alike(given, scheme, torch.float32)
    return [each.weight.dequantize() for each in solutions]


SOLVED: list[tuple[Scheme, dict[str, Any], int, int]] = [
    (IntScheme(4, 32, False), {}, 160, 1),
    (IntScheme(4, -1, True), {"activation_order": False, "refinements": 2}, 150, 1),
    (IntScheme(3, 32, False), {}, 160, 3),
    (IntScheme(4, 32, False), {"scales": "in_turn"}, 160, 2),
    (IntScheme(4, 32, False, zeros="float"), {}, 160, 1),
    (Nf4Scheme(32), {}, 160, 1),
    (Fp4Scheme(32), {}, 160, 2),
    (Fp8Scheme(), {}, 160, 1),
    (Nvfp4Scheme(), {}, 160, 1),
    (Mxfp4Scheme(), {"scales": "in_turn"}, 160, 1),
    (Q4KScheme(), {}, 256, 1),
    (Q6KScheme(), {"refinements": 0}, 256, 1),
]


@pytest.mark.parametrize(("scheme", "options", "columns", "layers"), SOLVED, ids=lambda given: str(given))
def test_a_layer_is_solved_as_it_is_column_by_column(
    scheme: Scheme, options: dict[str, Any], columns: int, layers: int, kernel: Kernel
) -> None:
    """But for rows in which a near tie falls to the other side, as sums are taken in another order."""
    expected = solved(scheme, options, columns, layers)
    kernel.put()
    for found, wanted in zip(solved(scheme, options, columns, layers), expected, strict=True):
        same = (found - wanted).norm(dim=1) <= 1e-4 * wanted.norm(dim=1)
        assert same.float().mean() >= 0.9
    assert max(kernel.widths) == 128 or "scales" in options or scheme.kind == "nvfp4"


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_finds_what_the_plain_loop_finds(kind: str) -> None:
    assert fused.agrees(CPU, kind)


@needs_interpreter
@pytest.mark.parametrize(("layers", "width", "rows"), [(1, 1, 1), (2, 7, 33), (1, 100, 70)])
def test_the_kernel_writes_its_block_and_nothing_else(layers: int, width: int, rows: int) -> None:
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(layers, width + 9, rows, generator=draw)
    start, kept = whole[:, 4 : 4 + width], whole.clone()
    scales = torch.rand(1, 1, rows, generator=draw).add(0.5).expand(layers, width, rows)
    push = torch.randn(layers, width + 5, width, generator=draw)[:, 5:] * 0.1
    found, errors = (torch.full_like(whole, 77.0) for _ in range(2))
    expected, missed = torch.empty_like(start), torch.empty_like(start)
    levels = fused.Levels("LIMITS", -8.0, 7.0)
    fused.run(start, scales, levels, push, found[:, 4 : 4 + width], errors[:, 4 : 4 + width])
    by_torch(start, scales, levels, push, expected, missed)
    assert torch.equal(whole, kept)
    assert torch.equal(found[:, 4 : 4 + width], expected)
    torch.testing.assert_close(errors[:, 4 : 4 + width], missed, rtol=1e-4, atol=1e-5)
    for written in (found, errors):
        assert bool((written[:, :4] == 77).all() & (written[:, 4 + width :] == 77).all())


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantkit.numerics import columns_kernel as kernel
names = kernel.columns_kernel.arg_names
tensors = {"start", "before", "scales", "low", "high", "table", "push", "levels", "errors"}
for kind in ("LIMITS", "SHIFTED", "TABLE", "FLOATS"):
    for descends in (False, True):
        known = {"KIND": getattr(kernel, kind).value, "VARIES": kind in ("LIMITS", "SHIFTED"), "DESCENDS": descends}
        known |= {"WIDTH": 128, "ROWS": 32}
        kinds = {**dict.fromkeys(tensors, "*fp32"), **dict.fromkeys(known, "constexpr")}
        kinds |= dict.fromkeys(("low_number", "high_number", "factor"), "fp32")
        signature = {name: kinds.get(name, "i32") for name in names}
        source = ASTSource(kernel.columns_kernel, signature, {(names.index(name),): known[name] for name in known})
        options = {"num_warps": 4, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        assert "div.rn.f32" in made.asm["ptx"] and ".local" not in made.asm["ptx"] and made.asm["cubin"]
print("compiled")
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: make fused")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_cards_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """To machine code, with division that rounds to nearest and without what does not fit into registers."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES.replace("CAPABILITY", str(capability))],
        env={**plain, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr


# Where there is no kernel


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are made anew; triton seems to be there."""
    fused._refusal.cache_clear()
    monkeypatch.setattr(fused, "find_spec", lambda name: name)


def test_a_kernel_that_cannot_be_compiled_is_not_used(tried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device, kind: str) -> bool:
        raise RuntimeError("\nFailed to find C compiler\nPlease specify via CC")

    monkeypatch.setattr(fused, "agrees", fails)
    grids = IntScheme(4, 32, True).grids()
    told = "the kernel failed when it was tried: RuntimeError: Failed to find C compiler"
    assert fused.refusal(CUDA, grids) == told
    rounder = grids.rounder(grids.spanning(grids.grouped(torch.randn(4, 32)), torch.float32), 4, 32)
    assert not fused.is_fused(CUDA, rounder)
    assert fused.levels_of(rounder, 0, 32, CUDA) is None
    fused._refusal.cache_clear()


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "run", by_torch)
    assert fused.agrees(CPU, "FLOATS")

    def wrong(start: torch.Tensor, scales: torch.Tensor, levels: fused.Levels, push: torch.Tensor, *rest: Any) -> None:
        by_torch(start, scales, levels, push.mT, *rest)

    monkeypatch.setattr(fused, "run", wrong)
    assert not fused.agrees(CPU, "FLOATS")


def test_each_reason_is_told(tried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins: Any = SimpleNamespace(scheme=Fp8Scheme())
    assert "CPU" in fused.refusal(CPU, IntScheme(4, 32, True).grids())
    assert "no kernel for the levels" in fused.refusal(CUDA, plugins)
    assert fused._kind(Uniform(plugins)) is None
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    gptq, rtn = (tiny_steps(name).method for name in ("gptq", "rtn"))
    (note,) = loop_notes(CUDA, [(gptq, IntScheme(4, 32, True)), (gptq, Nf4Scheme(32)), (rtn, Nvfp4Scheme())])
    assert note.startswith("loops over columns go operation by operation, which takes several times as long: ")
    assert note.endswith("triton is not installed")
    assert loop_notes(CPU, [(gptq, IntScheme(4, 32, True))]) == []
    assert loop_notes(CUDA, [(rtn, Nvfp4Scheme())]) == []
    fused._refusal.cache_clear()


def test_a_run_on_a_gpu_goes_on_with_the_same_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "find_spec", lambda name: name)
    monkeypatch.setattr(resume, "version_of", lambda name: f"{name} 1")
    assert resume.packages_of(CUDA)["triton"] == "triton 1"
    assert "triton" not in resume.packages_of(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_kernel_on_a_gpu(kind: str) -> None:
    pytest.importorskip("triton")
    assert fused._refusal(CUDA, kind) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("scheme", "options", "columns", "layers"), SOLVED, ids=lambda given: str(given))
def test_a_gpu_solves_a_layer_as_a_cpu_does(
    scheme: Scheme, options: dict[str, Any], columns: int, layers: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solved(scheme, options, columns, layers)
    if plain:
        monkeypatch.setattr(fused, "_refusal", lambda device, kind: "as asked for")
    draw = torch.Generator().manual_seed(7)
    given = []
    for seed in range(layers):
        weight, known = torch.randn(40, columns, generator=draw).to(CUDA), inputs_of(columns, seed)
        assert known.gram is not None
        given.append((weight, InputStatistics(known.tokens, gram=known.gram.to(CUDA))))
    for found, wanted in zip(
        Gptq(GptqOptions(**options)).quantize_alike(given, scheme, torch.float32), expected, strict=True
    ):
        same = (found.weight.dequantize().cpu() - wanted).norm(dim=1) <= 1e-3 * wanted.norm(dim=1)
        assert same.float().mean() >= 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plain", [False, True])
def test_no_loop_waits_for_a_gpu(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks the device asks once a layer, outside of loops: torch raises where something else does."""
    from quantkit.numerics.columns import solve_columns
    from quantkit.numerics.refine import descend, refit_scales

    if plain:
        monkeypatch.setattr(fused, "_refusal", lambda device, kind: "as asked for")
    scheme, rows, columns = IntScheme(4, 32, False), 48, 256
    grids, weight = scheme.grids(), torch.randn(rows, columns, device=CUDA)
    grid = grids.spanning(grids.grouped(weight), torch.float32)
    rounder, scales = grids.rounder(grid, rows, columns), grids.spread(grid.scales, rows, columns)
    fused.is_fused(CUDA, rounder)  # which tries the kernel
    hessian = torch.eye(columns, device=CUDA) + 0.01
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    given = weight.T.contiguous()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one = (given.clone().unsqueeze(0), factor.unsqueeze(0), scales.unsqueeze(0))
        (levels,) = solve_columns(*one, rounder.beside([]))
        refit_scales(hessian @ given, levels, hessian, grid.scales.shape[1])
        descend(given, levels, scales, rounder, hessian)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(levels.isfinite().all())
