"""What a stage of a run takes at most, of the process that does it and of a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from quantkit.evaluation.memory import probe_of


@cache
def warm_up() -> None:
    """Have this process read what libraries read when they first compute, so that no stage is held to have taken it.

    That is code of products, of factorizations, of attention and of gradients, 20 to 50 MiB, and the buffers that
    products keep. It takes a fifth of a second, once a process.
    """
    inputs, weight = torch.zeros(512, 1024), torch.zeros(2048, 1024)
    square = torch.eye(64, requires_grad=True)
    heads = torch.zeros(1, 2, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, len(inputs)):
            functional.linear(inputs[:count].to(dtype), weight.to(dtype))
        given = heads.to(dtype)
        functional.scaled_dot_product_attention(given, given, given, is_causal=True)
    functional.silu(inputs).log_softmax(-1).argsort()
    torch.cholesky_inverse(torch.linalg.cholesky(square.detach()))
    (square @ square).sum().backward()  # type: ignore[no-untyped-call]  # torch gives it no types


@dataclass(slots=True)
class StagePeaks:
    """The peaks of stages by their titles.

    Attributes:
        found: for each ``kind`` (of the measurement), ``baseline_bytes`` that were there before, ``peak_bytes``, and
            ``seconds``.
    """

    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str, device: torch.device, *, there: bool = False) -> Iterator[None]:
        """Measure what this process takes inside the block; nothing where no peak can be begun anew.

        Args:
            stage: its title.
            device: on which it computes: on a GPU torch's allocator is asked.
            there: its result is there, so that it takes nothing worth telling.
        """
        probe = probe_of(device)
        if not there and device.type == "cpu":
            warm_up()
        if there or not probe.begin():
            yield
            return
        before, begun = probe.read()["used_bytes"], time.perf_counter()
        yield
        peak, seconds = probe.read()["peak_bytes"], time.perf_counter() - begun
        self.note(stage, {"kind": probe.kind, "baseline_bytes": before, "peak_bytes": peak}, seconds)

    def note(self, stage: str, peak: Mapping[str, Any] | None, seconds: float) -> None:
        """What was seen of a stage, in another process too; None where that is nothing."""
        if peak is not None:
            self.found[stage] = {**peak, "seconds": seconds}
