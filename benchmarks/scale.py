"""Models larger than a machine, on paper: what quantkit's planner says of them on one GPU, on eight, and on 64 nodes.

    python benchmarks/scale.py [MODEL ...] [--card h100] [--tokens 65536]

It prints the tables of ``docs/scale.md``. Memory and how a stage gets by are what ``quantkit plan`` tells
(:mod:`quantkit.estimation.stages`), for a machine that is described here instead of measured. Seconds are those of
``benchmarks/gpu_time.py``, by the same counts, from data sheets and an assumed share of them. Nothing was measured on
CUDA. How work is dealt to several devices is what ``docs/cluster.md`` says.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from gpu_time import CARDS, DISK, Card, Work, in_words, loops, per_column, products

from quantkit.engine.batches import BATCH_TOKENS
from quantkit.engine.steps import BATCH_WEIGHTS
from quantkit.engine.twins import paired_tokens
from quantkit.estimation import anatomy_of
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.stages import Room, StageNeed, scoring_need, walk_need
from quantkit.estimation.streaming import Scored
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.quantization.memory_use import EXPERTS_MEMORY
from quantkit.recipe import VariantSpec

MODELS = {
    "Llama 3.1 70B": "llama-3.1-70b",
    "Llama 3.1 405B": "llama-3.1-405b",
    "Qwen3 235B-A22B": "qwen3-235b-a22b",
    "DeepSeek-V3": "deepseek-v3",
}
VARIANT = VariantSpec.model_validate({"name": "gptq", "method": "gptq", "bits": 4, "group_size": 128})
CARD_BYTES, HOST_BYTES = 80 * 10**9, 10**12
"""Memory of an H100 by its data sheet, and of a host, taken for granted."""
USED = 0.95
"""Share of a card that is free when a walk begins."""
NVLINK = 450e9
"""Bytes a second that an H100 sends to the others of its machine, by its data sheet (900 GB/s both ways)."""
SHARED_DISK = 50e9
"""Bytes a second of a folder that 64 nodes share, taken for granted."""
GPUS, NODES = 8, 64
SCORED_TOKENS, WINDOW = 2 * 8192, 512
"""Of a recipe's default texts."""


@dataclass(frozen=True, slots=True)
class Solve:
    """What is solved as one matrix.

    Attributes:
        rows, columns: of it.
        count: how many of these there are in the model.
        share: of the tokens that reach one.
        layers: that it is made of.
        experts: of a layer that have one each; 0 where it is none of theirs.
    """

    rows: int
    columns: int
    count: int
    share: float
    layers: int
    experts: int

    @property
    def gram_bytes(self) -> int:
        """Of the sums of products of its input, in float32."""
        return 4 * self.columns**2


@cache
def file_of(name: str) -> Stored:
    """What the quantized file of a model holds."""
    return stored(anatomy_of(name), VARIANT, "bfloat16")


@cache
def solves(name: str) -> tuple[Solve, ...]:
    """All that is solved in the blocks of a model: those of the largest block, as often as there are blocks like it.

    Other blocks, as DeepSeek's first three, have the same attention, and what else they hold is grouped by its width.
    """
    anatomy = anatomy_of(name)
    weights = {each.layer: each for each in anatomy.weights if each.kind == "linear" and each.block is not None}
    sizes = Counter[int]()
    for weight in anatomy.weights:
        if weight.block is not None:
            sizes[weight.block] += weight.numel
    alike = sum(size == sizes[anatomy.largest] for size in sizes.values())
    kinds = Counter[tuple[int, int, float, int]]()
    for read in anatomy.inputs:
        members = [weights[layer] for layer in read.layers if layer in weights]
        if members:
            rows, columns = sum(weight.matrix[0] for weight in members), members[0].matrix[1]
            kinds[rows, columns, members[0].share, len(members)] += 1
    found = [
        Solve(rows, columns, alike * count, share, layers, count if share < 1 else 0)
        for (rows, columns, share, layers), count in kinds.items()
    ]
    return (*found, *_other_blocks(anatomy, sizes))


def _other_blocks(anatomy: Anatomy, sizes: Counter[int]) -> list[Solve]:
    others = [block for block in sizes if sizes[block] != sizes[anatomy.largest]]
    found = []
    for block in others:
        wide = Counter[int]()
        for weight in anatomy.weights:
            if weight.block == block and weight.kind == "linear":
                wide[weight.matrix[1]] += weight.matrix[0]
        found += [Solve(rows, columns, 1, 1.0, 1, 0) for columns, rows in wide.items()]
    return found


@cache
def work(name: str, tokens: int, runs: float) -> dict[str, Work]:
    """What a walk has to compute, by part; the output head and the embedding stay float.

    Args:
        name: of the model.
        tokens: of the calibration set.
        runs: how often each block is run for all of them.
    """
    anatomy, twins = anatomy_of(name), paired_tokens(tokens, "cuda")
    file = file_of(name)
    inside = sum(each.numel * each.share for each in anatomy.weights if each.block is not None)
    attention = 2 * 2 * anatomy.queries * WINDOW / 2 * anatomy.blocks
    passes = Work(half=(tokens * runs + twins) * (2 * inside + attention))
    grams, solver, looped = Work(), Work(), Work()
    for each in solves(name):
        width = each.columns if each.layers > 1 else min(each.rows, each.columns)
        if each.layers == 1 and each.rows == anatomy.hidden and not each.experts:
            width = 2 * each.rows
        flops = 2.0 * each.share * each.columns * (tokens * each.columns + twins * width)
        grams.single += each.count * flops
        solver.single += products(each.rows, each.columns, outputs=each.layers == 1).single * each.count
        together = together_of(each)
        solving = per_column(refinements=0)  # of experts together; what refines them takes one after another
        looped.operations += (solving / together + per_column() - solving) * each.columns * each.count
        looped.columns += (1 / together + 1) * each.columns * each.count
        alone = loops(each.rows, each.columns)
        looped.moved += alone.moved * each.count
        looped.numbers += alone.numbers * each.count
    return {
        "read and written": Work(filed=2.0 * anatomy.parameters + 2.0 * file.nbytes),
        "forward passes": passes,
        "Gram matrices": grams,
        "products of the solver": solver,
        "loops over columns": looped,
    }


def together_of(each: Solve) -> int:
    """How many experts' matrices are solved at a time."""
    return max(1, min(each.experts, BATCH_WEIGHTS["cuda"] // max(each.rows * each.columns, each.columns**2)))


def runs_of(name: str, need: StageNeed) -> float:
    """How often a block is run: once in one pass; else once for each group, twice for each part of its experts."""
    room = EXPERTS_MEMORY * USED * CARD_BYTES
    per_block = [each for each in solves(name) if each.count >= anatomy_of(name).blocks // 2]
    experts = [each for each in per_block if each.experts]
    if need.how.startswith("one pass") and not experts:
        return 1.0
    parts = [max(1, -(-each.experts * each.gram_bytes // int(room))) for each in experts]
    return 1.0 + len(per_block) - len(experts) + sum(2 * count if count > 1 else 1 for count in parts)


def seconds(name: str, parts: dict[str, Work], card: Card, gpus: int, tokens: int) -> dict[str, float]:
    """Seconds by part on some GPUs of a machine: batches are dealt out, and experts; a dense group is solved by one."""
    batches = max(1, -(-tokens // BATCH_TOKENS["cuda"]))
    dealt = min(gpus, batches)
    found = {part: each.seconds(card) for part, each in parts.items()}
    for part in ("forward passes", "Gram matrices"):
        found[part] /= dealt
    experts = sum(each.rows * each.columns * each.count for each in solves(name) if each.experts)
    whole = sum(each.rows * each.columns * each.count for each in solves(name))
    for part in ("products of the solver", "loops over columns"):
        share = experts / whole
        found[part] *= (1 - share) + share / gpus
    if gpus > 1:
        sent = sum(each.gram_bytes * each.count for each in solves(name)) * batches
        found["sums between GPUs"] = sent / NVLINK
    return found


@cache
def needs(name: str, tokens: int) -> dict[str, StageNeed]:
    """What the stages take on one card, as ``quantkit plan`` tells it."""
    anatomy = anatomy_of(name)
    room, use = Room("cuda", int(USED * CARD_BYTES), HOST_BYTES), Use(calibration_tokens=tokens)
    scored = Scored(SCORED_TOKENS, WINDOW, "bfloat16", "cuda")
    return {
        "scoring": scoring_need("scoring", anatomy, scored, room),
        "walk": walk_need("walk", anatomy, [(VARIANT, file_of(name))], use, room),
    }


def memory_rows(title: str, tokens: int) -> list[str]:
    """What the stages of a model take on one card, and how they get by."""
    rows = []
    for stage, need in needs(MODELS[title], tokens).items():
        size = (need.nbytes or 0) / 1e9
        rows.append(f"| {title} | {stage} | {size:,.1f} GB | {need.beside / 1e9:,.1f} GB | {need.how} |")
    return rows


def facts_row(title: str, tokens: int) -> str:
    """Bytes of a model and of what a walk holds of it."""
    name = MODELS[title]
    anatomy, file = anatomy_of(name), file_of(name)
    waiting = 2 * 2 * anatomy.hidden * tokens
    widest = max(each.columns for each in solves(name))
    grams = max(each.gram_bytes for each in solves(name))
    inside = anatomy.in_largest() * 2
    cells = [2 * anatomy.parameters, file.nbytes, inside, waiting, grams]
    return f"| {title} | " + " | ".join(f"{cell / 1e9:,.1f} GB" for cell in cells) + f" | {widest:,} |"


def time_rows(title: str, card: Card, tokens: int) -> list[str]:
    """Seconds of a walk by part, on one GPU and on eight."""
    name = MODELS[title]
    runs = runs_of(name, needs(name, tokens)["walk"])
    parts = work(name, tokens, runs)
    one, eight = (seconds(name, parts, card, gpus, tokens) for gpus in (1, GPUS))
    rows = [
        f"| {title} | {part} | {in_words(parts[part]) if part in parts else 'sums of each batch'} | "
        f"{one.get(part, 0):,.0f} | {took:,.0f} |"
        for part, took in eight.items()
    ]
    totals = [sum(each.values()) for each in (one, eight)]
    return [*rows, f"| {title} | all, each block run {runs:g} times | | {totals[0]:,.0f} | {totals[1]:,.0f} |"]


def bound_row(title: str, card: Card, tokens: int) -> str:
    """Where the bound lies on one GPU, on eight, and on 64 nodes that each do one of 64 walks."""
    name = MODELS[title]
    parts = work(name, tokens, runs_of(name, needs(name, tokens)["walk"]))
    cells = []
    for gpus in (1, GPUS):
        found = seconds(name, parts, card, gpus, tokens)
        most = max(found, key=lambda part: found[part])
        cells.append(f"{most}, {found[most] / sum(found.values()):.0%}")
    found["read and written"] = max(found["read and written"], NODES * parts["read and written"].filed / SHARED_DISK)
    most = max(found, key=lambda part: found[part])
    cells.append(f"{sum(found.values()) / 60:,.0f} min, {sum(found.values()) / 60 / NODES:,.1f} min a variant")
    cells.append(f"{most}, {found[most] / sum(found.values()):.0%}")
    return f"| {title} | " + " | ".join(cells) + " |"


HEADS = {
    "facts": ["model", "read", "written", "largest block", "activations between blocks", "largest Gram", "width"],
    "memory": ["model", "stage", "on the card", "in CPU memory", "how it gets by"],
    "time": ["model", "part", "counted", "1 GPU, s", "8 GPUs, s"],
    "bound": ["model", "bound of 1 GPU", "bound of 8", "64 variants on 64 nodes of 8", "bound there"],
}


def tables(titles: Sequence[str], card: Card, tokens: int) -> str:
    """All four tables in Markdown."""
    rows = {
        "facts": [facts_row(title, tokens) for title in titles],
        "memory": [row for title in titles for row in memory_rows(title, tokens)],
        "time": [row for title in titles for row in time_rows(title, card, tokens)],
        "bound": [bound_row(title, card, tokens) for title in titles],
    }
    found = []
    for name, head in HEADS.items():
        found += [f"| {' | '.join(head)} |", "|" + ":--|" * len(head), *rows[name], ""]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--tokens", type=int, default=128 * 512)
    given = parser.parse_args()
    card = CARDS[given.card]
    print(f"{card.name}, by its data sheet; a disk of {DISK / 1e9:g} GB/s; {given.tokens:,} calibration tokens.\n")
    print(tables(given.models or list(MODELS), card, given.tokens))


if __name__ == "__main__":
    main()
