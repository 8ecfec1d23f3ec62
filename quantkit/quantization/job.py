"""What is quantized, and what its bytes depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.causality import can_be_padded
from quantkit.engine.precision import pass_dtype
from quantkit.engine.routing import ROUTED, ExpertSettings
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Inputs
from quantkit.exports.manifest import is_whole
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import read_stage
from quantkit.system.devices import Devices, resolve_device
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds

if TYPE_CHECKING:
    import torch

STAGE = "quantize"
CODE_VERSION = 6
"""Part of the fingerprint: raised when the same inputs would give other bytes."""
ROUNDING_VERSION = 1
"""Likewise, of what is calibrated on inputs that are rounded."""
WRITING_VERSION = 1
"""Part of the fingerprint of variants that are calibrated on generated tokens: raised when others would be written."""
NOT_IN_BYTES = ("name", "title", "allow_float", "strict")
"""Keys of a variant that change no byte of it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the float model wrote to be calibrated on; see :mod:`quantkit.quantization.generated`.

    Attributes:
        rows: token ids.
        note: why there are none although they were wanted; else empty.
        key: tells what they depend on; empty where none were wanted.
    """

    rows: Sequence[Sequence[int]] = ()
    note: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A finished stage of sensitivity, see :mod:`quantkit.quantization.sensitivity`, and how it is used.

    Attributes:
        folder: of the stage.
        fingerprint: of what it was made from.
        token_weights: see :class:`quantkit.recipe.CalibrationSpec`.
    """

    folder: Path
    fingerprint: str
    token_weights: float = 0.0

    def made_from(self) -> dict[str, Any]:
        """What a variant depends on."""
        return {"fingerprint": self.fingerprint, "token_weights": self.token_weights}


@dataclass(frozen=True, slots=True)
class Job:
    """What is quantized, for all variants alike.

    Attributes:
        source: folder of the float checkpoint.
        source_facts: what identifies it, and how the manifest names it.
        dtype: of the checkpoint, in which scales are stored: ``float32``, ``float16`` or ``bfloat16``.
        rows: calibration token ids; empty if no method needs them.
        calibration_sha256: of the token ids, and of the images.
        audit: of the calibration set, which goes along with each checkpoint.
        generated: tokens that the float model writes beside the rows, for each variant that is calibrated; None is as
            many as suit those that are tuned.
        written: those rows, once they are there.
        inputs: see :class:`quantkit.recipe.CalibrationSpec`.
        experts: how experts are calibrated.
        device: ``auto`` is CUDA where there is one.
        devices: over which walks are dealt, see :func:`quantkit.system.devices.resolve_devices`. No byte depends on it.
        trust_remote_code: run Python code that comes with the model.
        hub: name and commit of the model on the hub, for one that comes from there.
        images: of rows with images the further inputs of the model, by the places of the rows and by name.
        sensitivity: what is known of the model's loss, for methods that are calibrated; None for nothing.
        bounds: what the work may take of each device; no byte depends on it.
    """

    source: Path
    source_facts: dict[str, Any]
    dtype: str
    rows: Sequence[Sequence[int]] = ()
    calibration_sha256: str | None = None
    inputs: Inputs = "quantized"
    device: str = "auto"
    devices: Devices = None
    trust_remote_code: bool = False
    hub: tuple[str, str | None] | None = None
    experts: ExpertSettings = ROUTED
    images: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    audit: Mapping[str, Any] | None = None
    generated: int | None = None
    written: Written = Written()
    sensitivity: Known | None = None
    bounds: MemoryBounds = NO_BOUNDS

    @property
    def tokens(self) -> int:
        """Of the rows."""
        return sum(map(len, self.rows))

    @property
    def all_rows(self) -> list[Sequence[int]]:
        """The rows, and behind them those that the float model wrote."""
        return [*self.rows, *self.written.rows]

    @property
    def all_tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.all_rows))

    def generates(self, variant: VariantSpec) -> bool:
        """Whether the float model is to write tokens on which a variant is calibrated."""
        wanted = variant.tune is not None if self.generated is None else self.generated > 0
        return wanted and variant.calibrated

    def batches(
        self,
        skeleton: Skeleton,
        reader: CheckpointReader,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int,
        *,
        ends_short: bool = False,
    ) -> list[Batch]:
        """All rows as batches, padded where the model allows it.

        Args:
            skeleton: the model.
            reader: where its weights come from.
            device: where the batches go.
            dtype: of the passes, and so of images.
            batch_tokens: of a batch that has several rows.
            ends_short: see :func:`quantkit.engine.batches.make_batches`.
        """
        may_pad = len(set(map(len, self.all_rows))) > 1 and not skeleton.has_routed_layers()
        may_pad = may_pad and can_be_padded(skeleton, reader, device, dtype)
        images = {
            place: {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
            for place, inputs in self.images.items()
        }
        return make_batches(self.all_rows, device, may_pad, batch_tokens, images, ends_short=ends_short)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished variant.

    Attributes:
        folder: the checkpoint.
        facts: of ``stage.json``: ``bits_per_weight``, ``seconds``, ``layers``, ``notes``, ``strategy``, ``resumed``.
        reused: it was already there.
    """

    folder: Path
    facts: dict[str, Any]
    reused: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A variant and the folder of its checkpoint.

    Attributes:
        variant: what is made.
        out: where.
        documents: by name JSON files that go along with the checkpoint and on which no byte of it depends.
    """

    variant: VariantSpec
    out: Path
    documents: Mapping[str, Any] = field(default_factory=dict)


def made_from(job: Job, variant: VariantSpec) -> dict[str, Any]:
    """What a variant's bytes depend on, for its fingerprint.

    Of the device its class, and of torch the minor version, as their kernels take sums in orders of their own. What
    runs the model counts where the model is run, for a method that is calibrated: the dtype of the passes and the
    minor version of transformers.

    Raises:
        QuantkitError: the device is not there.
    """
    calibrated = variant.calibrated
    settings = {key: value for key, value in variant.resolved().items() if key not in NOT_IN_BYTES}
    device = resolve_device(job.device)
    return {
        "code": CODE_VERSION,
        "source": job.source_facts,
        "variant": settings,
        "calibration": job.calibration_sha256 if calibrated else None,
        "inputs": job.inputs if calibrated else None,
        "experts": asdict(job.experts) if calibrated else None,
        **({"generated": [WRITING_VERSION, job.generated]} if job.generates(variant) else {}),
        "device": device.type,
        "passes": str(pass_dtype(device, FLOATS[job.dtype])) if calibrated else None,
        "versions": minor_versions("torch", *(["transformers"] if calibrated else [])),
        **({"sensitivity": job.sensitivity.made_from()} if calibrated and job.sensitivity is not None else {}),
        **({"rounding": ROUNDING_VERSION} if calibrated and _sees_rounding(job, variant) else {}),
    }


def _sees_rounding(job: Job, variant: VariantSpec) -> bool:
    """Whether the passes round the inputs of layers that are solved, or static scales of inputs are calibrated."""
    roundings = [scheme.input_rounding for scheme in variant.schemes()]
    return any(each is not None and (each.static or job.inputs == "quantized") for each in roundings)


def minor_versions(*packages: str) -> dict[str, str]:
    """The versions of packages up to their minor numbers."""
    return {name: ".".join(version(name).split(".")[:2]) for name in packages}


def finished_variant(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The ``stage.json`` of a whole variant in ``out`` made from exactly ``identity``, or None."""
    finished = read_stage(out, STAGE, identity)
    return finished if finished is not None and is_whole(out) else None
