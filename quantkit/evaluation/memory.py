"""What a model takes: on disk, once loaded, and at its peaks while it is loaded, reads a prompt and writes tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.memory_probe import Probe, peak_rss, probe_of
from quantkit.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS
from quantkit.exports import IMATRIX
from quantkit.runtimes.base import LoadedModel
from quantkit.system.devices import device_name

__all__ = ["MemoryWatch", "checkpoint_bytes", "peak_rss"]

Phase = Literal["load", "prefill", "decode"]
WEIGHTS = ("*.safetensors", "*.gguf")
"""The files that hold weights."""


def checkpoint_bytes(path: Path) -> int:
    """Bytes of a file, or of all files with weights directly in a folder."""
    if path.is_file():
        return path.stat().st_size
    files = (file for pattern in WEIGHTS for file in path.glob(pattern) if file.name != IMATRIX)
    return sum(file.stat().st_size for file in files)


class MemoryWatch:
    """Watches one process's memory from before the model is loaded, phase by phase.

    On a CPU that is the process's resident set. On CUDA it is what torch's allocator gave out, and beside it, where
    ``nvidia-ml-py`` is installed and the driver tells, what the whole process holds on the device. Each phase begins
    its peaks anew, where the system allows it.

    Args:
        device: where the model will run.
        own_allocator: whether the runtime that loads it takes memory of a GPU past torch's allocator, so that NVML
            alone can tell.
    """

    def __init__(self, device: torch.device, *, own_allocator: bool = False) -> None:
        self._device = device
        self._probe: Probe = probe_of(device)
        self._knows = device.type == "cpu" or not own_allocator
        before = self._probe.read()
        self._resets = self._probe.begin()
        baseline = self._probe.read()
        self._baseline: int = baseline["used_bytes"]
        self._process_baseline: int | None = baseline.get("process_bytes")
        self._highest: int = before["peak_bytes"] if device.type == "cpu" else self._baseline
        self._phases: dict[Phase, dict[str, Any]] = {}
        self._weights = 0

    def loaded(self, model: LoadedModel) -> None:
        """Note the weights as they were loaded, and what loading took, before any forward pass."""
        self._weights = model.weights_bytes()
        self._note("load")

    def run(self, model: LoadedModel, ids: torch.Tensor) -> None:
        """Have the model read a prompt, then continue a short one, and note what either takes.

        Args:
            model: that was loaded.
            ids: int64 ``[n]``, the prompt; its first tokens, again and again if need be, are continued.
        """
        with self.phase("prefill", tokens=len(ids)):
            model.prefill(ids)
        prompt = ids.repeat(-(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
        try:
            with self.phase("decode", tokens=NEW_TOKENS, prompt_tokens=PROMPT_TOKENS):
                model.decode(prompt, NEW_TOKENS)
        except EvaluationError as error:  # it keeps no KV cache
            self._phases["decode"] = {"missing": error.problem}

    @contextmanager
    def phase(self, name: Phase, **facts: int) -> Iterator[None]:
        """Watch what is done inside.

        Args:
            name: of the phase.
            facts: what its figures say beside bytes.
        """
        self._probe.begin()
        yield
        self._note(name, **facts)

    def figures(self, model: LoadedModel) -> dict[str, Any]:
        """All figures, after the phases.

        Returns:
            ``weights_bytes`` as loaded, ``weights_bytes_running`` now; ``peak_bytes``, the largest of all phases and on
            a CPU of all that the process did before, and ``peak_kind``; ``peaks_are_of``, ``phase`` or ``process``
            where no peak could be begun anew; ``baseline_bytes`` before loading; ``phases``, by name ``used_bytes`` at
            its end and ``peak_bytes``, with the tokens of a prompt and of an answer; ``device``.

            On CUDA each phase also has ``reserved_bytes`` and ``process_bytes``, and ``process_bytes`` is the largest
            of these; None is what cannot be told, as the allocator's figures of a runtime that has its own.
        """
        processes = [phase.get("process_bytes") for phase in self._phases.values()]
        figures: dict[str, Any] = {
            "weights_bytes": self._weights,
            "weights_bytes_running": model.weights_bytes(),
            "peak_bytes": self._highest if self._knows else max(filter(None, processes), default=None),
            "peak_kind": self._probe.kind if self._knows else "NVML",
            "peaks_are_of": "phase" if self._resets else "process",
            "baseline_bytes": self._baseline if self._knows else self._process_baseline,
            "phases": dict(self._phases),
            "device": device_name(self._device),
        }
        if self._device.type == "cuda":
            figures["process_bytes"] = max(filter(None, processes), default=None)
        return figures

    def _note(self, name: Phase, **facts: int) -> None:
        found = self._probe.read()
        self._highest = max(self._highest, found["peak_bytes"])
        if not self._resets:  # the kernel counts in portions for each core, so that its own figure may fall a little
            found["peak_bytes"] = self._highest
        if not self._knows:
            found |= dict.fromkeys(("used_bytes", "peak_bytes", "reserved_bytes"))
        self._phases[name] = {**found, **facts}
