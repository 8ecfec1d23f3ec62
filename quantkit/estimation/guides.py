"""Figures that guides give, and ours for the same: ``python -m quantkit.estimation.guides`` prints the tables."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from quantkit.estimation.estimate import estimate

NF4: dict[str, Any] = {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes"}
INT8: dict[str, Any] = {
    "method": "rtn", "bits": 8, "group_size": -1, "activations": "dynamic", "format": "bitsandbytes",
}  # fmt: skip
GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 128, "format": "gptq"}
AWQ: dict[str, Any] = {"method": "awq", "group_size": 128, "symmetric": False, "format": "awq"}
COLUMNS = {
    "training": ("weights", "adapters", "gradients", "optimizer", "saved activations", "activations", "decoded layer"),
    "inference": ("weights", "KV cache", "activations"),
}
"""The lines of each part that get a column, beside the device's."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of a guide.

    Attributes:
        title: what it is of.
        model: the same as a well-known model.
        keys: what is done to it, and how it is used.
        said: gigabytes that the guide gives.
    """

    title: str
    model: str
    keys: dict[str, Any]
    said: str


def _use(rank: int, batch: int, context: int) -> dict[str, Any]:
    return {"lora_rank": rank, "batch": batch, "context": context}


TRAINING = (
    Row("7B NF4, rank 8, batch 1, 512 tokens", "llama-2-7b", {**NF4, **_use(8, 1, 512)}, "3.5-4"),
    Row("7B NF4, rank 16, batch 2, 1024 tokens", "llama-2-7b", {**NF4, **_use(16, 2, 1024)}, "6-7"),
    Row("7B 8-bit, rank 16, batch 2, 1024 tokens", "llama-2-7b", {**INT8, **_use(16, 2, 1024)}, "10-11"),
    Row("13B NF4, rank 8, batch 1, 512 tokens", "llama-2-13b", {**NF4, **_use(8, 1, 512)}, "6-7"),
    Row("13B NF4, rank 16, batch 1, 1024 tokens", "llama-2-13b", {**NF4, **_use(16, 1, 1024)}, "9-10"),
    Row("30B GPTQ-4, rank 8, batch 1, 512 tokens", "llama-30b", {**GPTQ, **_use(8, 1, 512)}, "12-14"),
)
INFERENCE = (
    Row("7B AWQ-4", "llama-2-7b", AWQ, "3-4"),
    Row("7B 8-bit", "llama-2-7b", INT8, "7-8"),
    Row("13B GPTQ-4", "llama-2-13b", GPTQ, "6-7"),
    Row("13B 8-bit", "llama-2-13b", INT8, "13-14"),
    Row("30B AWQ-4", "llama-30b", AWQ, "15-17"),
    Row("70B GPTQ-4", "llama-2-70b", GPTQ, "35-40"),
)


def guide_table(rows: tuple[Row, ...], part: str) -> str:
    """The rows in Markdown, in gigabytes of 10^9 bytes: the guide's figure, ours, and the lines that make it up."""
    columns = (*COLUMNS[part], "device")
    head = ["", "the guide", "ours", *columns]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        found = estimate(row.model, train=part == "training", **row.keys).part(part)
        figures = [found.nbytes, *(found.line(name).nbytes for name in columns)]
        cells = [row.title, row.said.replace("-", "\N{EN DASH}"), *(f"{nbytes / 1e9:.2f}" for nbytes in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{guide_table(TRAINING, 'training')}\n\n{guide_table(INFERENCE, 'inference')}\n")
