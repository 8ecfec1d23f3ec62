"""What a run would do with a variant of a library, before it does it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.float_parts import block_weights
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantkitError, SchemeError
from quantkit.estimation.weights import float_bytes
from quantkit.formats import FORMATS
from quantkit.isolation.attempt import device_for, made_from
from quantkit.isolation.codes import chosen_format
from quantkit.isolation.environments import environment_of
from quantkit.libraries.base import CODES
from quantkit.quantization import Job, finished_variant
from quantkit.recipe import LibrarySpec
from quantkit.schemes import Scheme

STATES = {
    "absent": "its environment will be installed",
    "outdated": "its environment will be installed, for the one that is there has another lock",
    "broken": "its environment is broken and will be installed again",
}


def library_forecast(job: Job, variant: LibrarySpec, skeleton: Skeleton, out: Path) -> dict[str, Any]:
    """The plan of one variant; ``size_bytes`` is None where the library's grid is not known before it has run.

    See :func:`quantkit.pipeline.plan.forecast` for the keys.
    """
    linears = {layer.name: layer for layer in skeleton.layers()}
    head = skeleton.head.linears[0] if skeleton.head else None
    reached = [name for name in linears if name != head and not variant.stays_float(linears[name].path)]
    shapes = {name: linears[name].shape for name in reached}
    scheme = variant.asked_scheme()
    words = f"{variant.width} bits" if scheme is None else scheme.describe()
    return {
        "name": variant.name,
        "state": _state(job, variant, out),
        "method": variant.label,
        "format": variant.stores() or CODES,
        "scheme": words,
        "schemes": {words: len(reached)},
        "layers": (len(reached), len(linears)),
        "share": _share(skeleton, set(reached)),
        "notes": [],
        "size_bytes": None if scheme is None else _size(job, variant, scheme, shapes),
        "strategy": "by the library" if variant.calibrated else "weights only",
    }


def _share(skeleton: Skeleton, reached: Collection[str]) -> float:
    """The part of the weights in the blocks' matrices that the library is given."""
    inside = [layer for segment in skeleton.segments for layer in segment.layers if layer.name in reached]
    return sum(layer.weight.numel() for layer in inside) / max(1, block_weights(skeleton.segments))


def _state(job: Job, variant: LibrarySpec, out: Path) -> str:
    try:
        device_for(variant, job)
        if finished_variant(out, made_from(job, variant)) is not None:
            return "finished, for the calibration set that is there" if variant.calibrated else "finished"
        if variant.env == "current":
            return "to do, in this environment"
        state = environment_of(variant.plugin).state
        return f"to do; {STATES[state]}" if state in STATES else "to do"
    except QuantkitError as error:
        return f"cannot run: {error}"


def _size(job: Job, variant: LibrarySpec, scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> int | None:
    """Bytes of the checkpoint if the library keeps to what it is asked for; None where no format stores that."""
    try:
        name = variant.stores()
        store = FORMATS.get(name) if name else chosen_format(None, {"": scheme})
        packed = sum(store(job.dtype).layer_bytes(scheme, *shape) for shape in shapes.values())
    except SchemeError:
        return None
    reader = CheckpointReader(job.source)
    kept = [name for name in reader.names() if name.removesuffix(".weight") not in shapes]
    floats = ((reader.shape(each), str(reader.dtype(each)).removeprefix("torch.")) for each in kept)
    return packed + sum(math.prod(shape) * float_bytes(store.container, dtype, shape) for shape, dtype in floats)
