"""Models from quantizing to scores: real-sized blocks, SmolLM2, and the solver by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_time import Shape, Work, forward, grams, mismatches, moved_per_weight, per_column, products

from gpu_proof.facts import best
from gpu_proof.found import BLOCKS, DEEP, PACKAGED, SMOLLM2, TINY, Found
from gpu_proof.phases import REST
from gpu_proof.work import (
    GPTQ,
    Run,
    divergence,
    estimated,
    job_of,
    phases_in_words,
    random_llama,
    random_rows,
    run,
    score,
)
from quantkit.engine.twins import paired_tokens
from quantkit.errors import QuantkitError
from quantkit.methods.base import InputStatistics
from quantkit.numerics.fused import refusal
from quantkit.recipe import ModelSpec, VariantSpec
from quantkit.runtimes._checkpoint import load_tokenizer
from quantkit.source import resolve
from quantkit.system.units import in_units

PROSE = Path(__file__).resolve().parents[2] / "quantkit" / "eval_data" / "prose.txt"
LENGTH = 512


def blocks(found: Found) -> None:
    """Real-sized blocks: time by phase, achieved rates, memory, and what was written read again."""
    keys = TINY if found.small else BLOCKS
    folder = random_llama(found.work / "blocks", found.device, **keys)
    rows = random_rows(keys["vocab_size"], *found.calibration)
    size = f"{keys['num_hidden_layers']} random blocks {keys['hidden_size']} and {keys['intermediate_size']} wide"
    found.say(f"{size}, {len(rows)} rows of {len(rows[0])} random tokens, gptq int4 g128")
    job = job_of(folder, rows, found.device)
    # this one pays for kernels that are loaded when they are first used
    tiny = random_llama(found.work / "tiny", "cpu", **TINY)
    run(job_of(tiny, random_rows(TINY["vocab_size"], 16, 64), found.device), GPTQ, found.work / "warm")
    done = run(job, GPTQ, found.work / "blocks-out")
    _tell_run(found, done, estimated(folder, job, GPTQ))
    if not found.small:
        whole = done.seconds + (DEEP - len(done.segments)) * done.by_block()
        found.say(
            f"{DEEP} such blocks: {whole:.0f} s on {found.device}, told from these; writing more is not in it",
            {"whole": whole},
        )
    _tell_phases(found, run(job, GPTQ, found.work / "blocks-timed", by_phase=True), keys, job.tokens)
    _score(found, folder, done.done.folder, random_rows(keys["vocab_size"], *found.scored, seed=1))


def smollm2(found: Found) -> None:
    """SmolLM2, or a random model of its shape, from quantizing to scores."""
    try:
        if found.small:
            raise QuantkitError("small sizes take one")
        source = resolve(ModelSpec(source=PACKAGED), found.work / "smollm2")
        folder, dtype = source.folder, source.dtype
        ids: list[int] = load_tokenizer(folder, trust_remote_code=False)(PROSE.read_text("utf-8"))["input_ids"]
        cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
        held, rows, keys = cut[:4], cut[4:], SMOLLM2
        found.say(f"SmolLM2-135M-Instruct, {len(rows)} rows of text calibrate and {len(held)} others are scored")
    except QuantkitError as error:
        keys, dtype = (TINY if found.small else SMOLLM2), "bfloat16"
        folder = random_llama(found.work / "shape", found.device, **keys)
        rows, held = (
            random_rows(keys["vocab_size"], *found.calibration),
            random_rows(keys["vocab_size"], *found.scored, 1),
        )
        found.say(f"a random model in its place: {error}")
    job, variant = job_of(folder, rows, found.device, dtype), {**GPTQ, "group_size": 64}
    done = run(job, variant, found.work / "smollm2-out")
    _tell_run(found, done, estimated(folder, job, variant))
    _tell_phases(found, run(job, variant, found.work / "smollm2-timed", by_phase=True), keys, job.tokens)
    _score(found, folder, done.done.folder, held)


def solver(found: Found) -> None:
    """The method by itself on weights of the shapes of o and down, beside the operations that the model counts."""
    sizes = ((64, 256), (64, 512)) if found.small else ((4096, 4096), (4096, 14336))
    device, variant = torch.device(found.device), VariantSpec.model_validate(GPTQ)
    method, scheme = variant.build_method(), variant.base_scheme()
    reason = refusal(device, scheme.grids())
    found.say(f"loops over columns go operation by operation: {reason}" if reason else "a kernel for blocks of columns")
    found.say(f"triton {version('triton')}" if find_spec("triton") else "triton is not installed", {"loops": reason})
    for rows, columns in sizes:
        inputs = torch.randn(2 * columns, columns, device=device)
        gram = inputs.T @ inputs / len(inputs)
        weight = torch.randn(rows, columns, device=device)

        def solve(weight: torch.Tensor = weight, gram: torch.Tensor = gram) -> object:
            known = InputStatistics(tokens=2 * len(gram), gram=gram)
            return method.quantize(weight, known, scheme, torch.float16)

        with torch.no_grad():
            seconds = best(solve, device, calls=2)
        operations = per_column(is_fused=not reason) * columns
        each = f"{seconds / operations * 1e6:.1f} us for each of {operations:,.0f} operations"
        found.say(f"{rows} x {columns}: {seconds:.3f} s on {found.device}, {each}", {f"{rows}x{columns}": seconds})


def _tell_run(found: Found, done: Run, expected: int) -> None:
    found.say(
        f"quantized and written in {done.seconds:.1f} s, {done.by_block():.2f} s a block, on {found.device}",
        {"seconds": done.seconds, "segments": done.segments, "estimate": expected, "peak": done.peak},
    )
    if done.peak is None:
        found.say(f"peak memory: not measured on a cpu; the estimate is {in_units(expected)}")
        return
    allocated, reserved = done.peak
    peak = f"peak memory {in_units(allocated)} allocated, {in_units(reserved)} reserved"
    found.say(f"{peak}; estimate {in_units(expected)}, {expected / allocated:.2f} of what was allocated")


def _tell_phases(found: Found, timed: Run, keys: Mapping[str, Any], tokens: int) -> None:
    """Seconds by phase, and what was achieved of the rates that the facts have."""
    found.say(f"by phase, {timed.seconds:.1f} s: {phases_in_words(timed.phases)}", {"phases": timed.phases})
    rates, achieved = found.setting["known"].get("facts", {}).get("rates", {}), {}
    for (phase, rate), amount in _amounts(keys, tokens, found.device).items():
        seconds, unit = timed.phases.get(phase, 0.0), "FLOP/s" if "float" in rate else "B/s"
        if (phase, rate) == ("solve", "float32"):
            seconds += timed.phases.get("correct", 0.0)  # whose products are counted with the solver's
        if seconds:
            achieved[f"{phase}, {unit}"] = amount / seconds
            share = f", {amount / seconds / rates[rate]:.1%} of what was measured for {rate}" if rate in rates else ""
            found.say(
                f"{phase}: {amount / seconds / 1e12:.3g} T{unit}{share}, on {found.device}", {"achieved": achieved}
            )


def _amounts(keys: Mapping[str, Any], tokens: int, device: str) -> dict[tuple[str, str], float]:
    """FLOPs, or bytes, of a phase of all blocks, by the phase and the rate that they are to be compared with."""
    shape = Shape(
        keys["hidden_size"],
        keys["intermediate_size"],
        keys["num_attention_heads"],
        keys["num_key_value_heads"],
        keys["num_hidden_layers"],
        keys["vocab_size"],
        keys["head_dim"],
    )
    twins = paired_tokens(tokens, device)
    each = {
        (REST, "bfloat16"): forward(shape, tokens + twins).half,
        ("Grams", "float32"): grams(shape, tokens).single,
        ("Grams of what was lost", "float32"): mismatches(shape, twins).single,
        ("solve", "float32"): _of_groups(products, shape),
        ("solve", "copy"): moved_per_weight() * shape.block_weights,
        ("load", "to the card, pageable"): 2.0 * 2 * shape.block_weights,  # for the passes, and to be solved
    }
    return {place: amount * shape.blocks for place, amount in each.items()}


def _of_groups(work: Callable[..., Work], shape: Shape) -> float:
    """FLOPs in float32 of what is done to each matrix of a block."""
    groups = shape.groups().items()
    return sum(work(*group, outputs=name in ("o", "down")).single for name, group in groups)


def _score(found: Found, folder: Path, checkpoint: Path, rows: list[list[int]]) -> None:
    """Load the float model and what was written by the reference runtime, and compare them."""
    new_tokens = 4 if found.small else 32
    float_model, quantized = (score(each, rows, found.device, new_tokens) for each in (folder, checkpoint))
    for name, each in (("float", float_model), ("quantized, decoded", quantized)):
        figures = {"load": each.load, "read": each.read, "prefill": each.prefill, "decode": each.decode}
        read = f"loaded in {each.load:.1f} s, {len(rows)} x {len(rows[0])} tokens read in {each.read:.2f} s"
        speed = f"prefill {each.prefill:,.0f} and decode {each.decode:,.1f} tokens/s"
        found.say(f"{name}: {read}, {speed}, on {found.device}", {name: figures})
    nats, plain, ours = divergence(float_model, quantized, rows)
    found.say(
        f"divergence {nats:.5f} nats a token, perplexity {plain:.2f} float, {ours:.2f} quantized, on {found.device}",
        {"kl": nats, "perplexity": [plain, ours]},
        failed=not -1e-4 < nats < 10,  # also NaN
    )
