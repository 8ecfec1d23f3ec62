"""The estimate that stands beside a measurement in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.held import Held, held_by, loaded_line, running_part, without_device
from quantkit.estimation.lines import Line
from quantkit.estimation.models import anatomy_by
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.recipe import VariantSpec
from quantkit.system.validation import parse_section

ESTIMATED = "weights_estimated_bytes"
ESTIMATES = "estimates"


def beside_measured(
    figures: dict[str, Any], result: dict[str, Any], folder: Path, variant: VariantSpec | None = None
) -> dict[str, Any]:
    """Figures of a variant with estimates beside those of memory.

    Args:
        figures: as the report has them.
        result: of the evaluation, which tells what loaded the checkpoint and in which dtype.
        folder: of the checkpoint, of which only the config is read.
        variant: what was done to the model; None for a float model.

    Returns:
        The figures; their ``memory`` with :data:`ESTIMATED` and :data:`ESTIMATES`, see :func:`estimates`, both None for
        a model that transformers does not build.
    """
    memory = figures.get("memory")
    if not memory:
        return figures
    anatomy = _known_anatomy(folder)
    found = None if anatomy is None else estimates(anatomy, variant or _float(anatomy), memory, result)
    weights = found["weights"]["estimated_bytes"] if found else None
    return {**figures, "memory": {**memory, ESTIMATED: weights, ESTIMATES: found}}


def estimates(
    anatomy: Anatomy, variant: VariantSpec, memory: dict[str, Any], result: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What was to be expected of each measured figure, by its name.

    ``weights`` are those that were loaded. ``prefill`` and ``decode`` are peaks over what was there before the model:
    of the resident set on a CPU, of torch's allocator on CUDA. ``process_prefill`` and ``process_decode`` are what the
    whole process held on a CUDA device.

    Args:
        anatomy: the model.
        variant: what was done to it.
        memory: as it was measured.
        result: of the evaluation.

    Returns:
        For each ``estimated_bytes``, ``measured_bytes``, ``ratio`` (estimated by measured) and ``lines``; what was not
        measured is not there.
    """
    own = str(result["environment"].get("dtype"))
    file, held = stored(anatomy, variant), held_by(result.get("loaded_by"), variant.format, own)
    found = {"weights": _beside([loaded_line(anatomy, file, held)], memory.get("weights_bytes"))}
    for name, phase in (memory.get("phases") or {}).items():
        if name != "load" and "tokens" in phase:
            found |= _of_phase(anatomy, file, held, memory, name)
    return {name: each for name, each in found.items() if each is not None}


def _of_phase(
    anatomy: Anatomy, file: Stored, held: Held, memory: dict[str, Any], name: str
) -> dict[str, dict[str, Any] | None]:
    phase, on_cpu = memory["phases"][name], memory.get("peak_kind") == "RSS"
    prompt = phase.get("prompt_tokens", phase["tokens"])
    context = phase["tokens"] + phase.get("prompt_tokens", 0)
    part = running_part(anatomy, file, held, Use(context=context, device="cpu" if on_cpu else "cuda"), prompt)
    whole = list(part.lines)
    if on_cpu or phase.get("peak_bytes") is not None:
        grown = phase["peak_bytes"] - memory["baseline_bytes"]
        found = {name: _beside(list(without_device(part).lines), grown)}
    else:
        found = {}
    return found if on_cpu else found | {f"process_{name}": _beside(whole, phase.get("process_bytes"))}


def _beside(lines: list[Line], measured: int | None) -> dict[str, Any] | None:
    if not measured or measured < 0:
        return None
    estimated = sum(line.nbytes for line in lines)
    return {
        "estimated_bytes": estimated,
        "measured_bytes": measured,
        "ratio": estimated / measured,
        "lines": [line.to_json() for line in lines],
    }


def _known_anatomy(folder: Path) -> Anatomy | None:
    try:
        return _anatomy(folder)
    except SourceError:
        return None


def _anatomy(folder: Path) -> Anatomy:
    file = folder / "config.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    else:
        from quantkit.exports import open_export

        data = open_export(folder).config()
    return anatomy_by(data, "the checkpoint")


def _float(anatomy: Anatomy) -> VariantSpec:
    """A float model as a variant in its own dtype."""
    kind = {"float16": "float16"}.get(anatomy.dtype, "bfloat16")
    keys = {"name": "float", "method": "none", "format": "float", "scheme": kind}
    return parse_section(VariantSpec, keys, "estimate")
