"""What the tests on a GPU measure of a running model, and the table that they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.estimation import anatomy_of
from quantkit.estimation.measured import estimates
from quantkit.evaluation.memory import MemoryWatch
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.system.devices import resolve_device

HEAD = "| what | estimated | measured | estimated / measured |\n|---|---:|---:|---:|\n"
WORDS = {
    "weights": "weights after loading",
    "prefill": "prefill, over what was there before",
    "decode": "decode, over what was there before",
    "process_prefill": "prefill, the whole process (NVML)",
    "process_decode": "decode, the whole process (NVML)",
}


class Table:
    """The rows of the table that is written."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def add(self, what: str, estimated: int, measured: int) -> float:
        """Note a row and give the ratio."""
        sizes = " | ".join(f"{nbytes / 2**20:,.1f} MiB" for nbytes in (estimated, measured))
        self.rows.append(f"| {what} | {sizes} | {estimated / measured:.3f} |")
        return estimated / measured

    def add_all(self, name: str, found: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Note all estimates that stand beside a measurement, and give their ratios."""
        return {
            key: self.add(f"{name}: {WORDS[key]}", each["estimated_bytes"], each["measured_bytes"])
            for key, each in found.items()
        }

    def text(self, title: str) -> str:
        """As it goes to a file."""
        return f"{title}\n\n{HEAD}" + "\n".join(self.rows) + "\n"


def watched(
    folder: Path, variant: VariantSpec, runtime: str, options: LoadOptions, tokens: torch.Tensor
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Load a checkpoint, run it, and put estimates beside the figures, as an evaluation and its report do.

    Returns:
        The figures of memory, and the estimates by name.
    """
    watch = MemoryWatch(resolve_device(options.device), own_allocator=RUNTIMES.get(runtime).own_allocator)
    model = RUNTIMES.get(runtime).load(folder, options)
    watch.loaded(model)
    watch.run(model, tokens)
    memory = watch.figures(model)
    if memory["peak_kind"] == "RSS":
        memory["baseline_bytes"] = 0  # what earlier tests left in this process may shrink meanwhile
    result = {"loaded_by": runtime, "environment": {"dtype": model.dtype}}
    return memory, estimates(anatomy_of(str(folder)), variant, memory, result)


def context_bytes(memory: dict[str, Any]) -> list[int]:
    """For each phase what the process held on the device beside what torch's allocator did: the device's own."""
    phases = memory["phases"].values()
    return [
        phase["process_bytes"] - phase["reserved_bytes"]
        for phase in phases
        if phase.get("process_bytes") is not None and phase.get("reserved_bytes") is not None
    ]
