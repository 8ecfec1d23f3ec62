"""What the history knows of a run: typed, without torch, the same whether it comes from a report or from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, str, str]
"""Metric, text and figure, such as ``("kl_divergence", "prose", "mean")``; what does not apply is empty."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token at which a file departs far from the float model; see :mod:`quantkit.evaluation.divergence`."""

    window: int
    position: int
    kl_divergence: float
    nll: float
    context: str
    token: str
    expected: str
    predicted: str


@dataclass(frozen=True, slots=True)
class TextRecord:
    """How a file did on each window of a text.

    Attributes:
        token_ids_sha256: of the windows' tokens; two texts with the same hash are compared window by window.
        context_length: tokens of a window as asked for.
        tokens_per_window: scored tokens in each.
        nll: sum of negative log-likelihoods of each window, nats.
        kl: sum of divergences from the float model of each window, nats; None where none was taken.
        agreements: how many tokens of each window the float model would have chosen too; None likewise.
        departures: the furthest tokens.
    """

    token_ids_sha256: str
    context_length: int
    tokens_per_window: int
    nll: tuple[float, ...]
    kl: tuple[float, ...] | None = None
    agreements: tuple[int, ...] | None = None
    departures: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A quantized layer: its scheme, and the error of its output, see docs/report.md."""

    name: str
    scheme: str
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A scored file: a variant, or the float model.

    Attributes:
        name: of the variant.
        status: ``ok`` or ``failed``, with the reason in ``error``.
        method, format, scheme: as the report has them.
        loaded_by: the runtime that scored it.
        device: what it was scored on: ``cpu`` or the name of the GPU, its class.
        cpu: the processor's name.
        dtype, threads: in what it was computed, and by how many threads.
        figures: every finite figure.
        texts: by name.
        timings: seconds per token of each repetition, of ``prefill`` and ``decode``.
        layers: of a variant.
        content: fingerprint of the file; None for the float model.
    """

    name: str
    status: str
    error: str | None = None
    method: str = ""
    format: str = ""
    scheme: str = ""
    loaded_by: str | None = None
    device: str = ""
    cpu: str = ""
    dtype: str = ""
    threads: int = 0
    figures: Mapping[Key, float] = field(default_factory=dict)
    texts: Mapping[str, TextRecord] = field(default_factory=dict)
    timings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    content: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run.

    Attributes:
        name: of the recipe.
        kind: ``run`` or ``check``.
        started, finished: UTC, ISO 8601.
        status: ``ok``; ``failed`` if a variant or a gate did; ``error`` if nothing could run; ``interrupted``.
        error: why, for the last two.
        verdict: of a check.
        quantkit: version.
        recipe: resolved; paths are those of :mod:`quantkit.run_history.location`.
        source: what the recipe calls the model.
        source_fingerprint: of its content.
        calibration_fingerprint: of the calibration tokens; None where no method needs any.
        device, cpu, cores, driver: of the machine.
        packages: name to version, with ``python`` and ``cuda`` among them.
        folder: where the run's results lay.
        baseline: the float model.
        variants: in the order of the report.
        id: number in the file; None until it is there.
        accepted: names of the variants for which this run is the reference now.
    """

    name: str
    kind: str
    started: str
    finished: str
    status: str
    error: str | None = None
    verdict: str | None = None
    quantkit: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    source_fingerprint: str | None = None
    calibration_fingerprint: str | None = None
    device: str = ""
    cpu: str = ""
    cores: int = 0
    driver: str | None = None
    platform: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    baseline: VariantRecord | None = None
    variants: tuple[VariantRecord, ...] = ()
    id: int | None = None
    accepted: tuple[str, ...] = ()

    def variant(self, name: str) -> VariantRecord | None:
        """The variant of that name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)
