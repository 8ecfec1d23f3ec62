"""Writes quantkit/verification/models/models.json and docs/models.md anew: ``python -m tests.models_file``.

Every architecture of :mod:`tests.zoo` is made small, quantized, written in each of :data:`FORMATS` and loaded in
transformers, whose logits are compared with those of the reference decoder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.errors import EvaluationError, QuantkitError
from quantkit.exports.manifest import read_manifest
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.system.artifacts import read_json, write_json
from quantkit.verification.models.table import LOADS, MODELS_FILE, models_markdown
from tests import zoo
from tests.tiny import tiny_rows

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf")
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 4, "group_size": 32},
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32, "symmetric": False},
    "gguf": {"bits": 8, "group_size": 32},
}
"""The formats, and a scheme that each stores."""
FIRST = "compressed-tensors"
"""The format whose file is loaded, and whose plan is told."""
NEAR = 1e-3
"""Logits of transformers and of the reference decoder differ by no more, relative to their spread."""
SHOWN = 120
"""Characters of what transformers says at most."""
MARK = "<!-- table -->"


def facts_of(architecture: str, folder: Path) -> dict[str, Any]:
    """What becomes of a small model of an architecture; see :func:`quantkit.verification.models.read_models`."""
    model, out = folder / "model", folder / "out"
    try:
        made = zoo.make(model, architecture)
        with torch.no_grad():
            made(input_ids=torch.tensor(tiny_rows(1, 20, 20)), use_cache=False)
    except Exception as error:  # transformers' own code, which may ask for more than sizes and a text
        return {"class": "", "untried": " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]}
    name = type(made).__name__
    formats = {each: _tried(model, out, each, keys) for each, keys in FORMATS.items()}
    if formats[FIRST] != LOADS:
        return {"class": name, "refused": formats[FIRST]}
    manifest = read_manifest(out / FIRST) or {}
    runtimes = {"transformers": _loaded(out / FIRST, manifest)}
    return {
        "class": name,
        "share": round(manifest["share"], 4),
        "float": manifest["float"],
        "formats": formats,
        "runtimes": runtimes,
    }


def _tried(model: Path, out: Path, store: str, keys: dict[str, Any]) -> str:
    try:
        quantkit.quantize(model, out=out / store, method="rtn", format=store, device="cpu", dtype="own", **keys)
    except QuantkitError as error:
        return error.problem.replace(str(model), "it")
    return LOADS


def _loaded(checkpoint: Path, manifest: dict[str, Any]) -> str:
    """Whether transformers loads a checkpoint as the reference decoder does, which has to load every one."""
    decoded = _logits(checkpoint, "reference")
    if not decoded.isfinite().all():
        raise AssertionError(f"the reference decoder computes no finite logits of {checkpoint}")
    if not manifest["transformers_loads"]:
        notes: list[str] = read_json(checkpoint / "stage.json")["facts"]["notes"]
        return next(note for note in notes if note.startswith("transformers"))
    try:
        found = _logits(checkpoint, "transformers")
    except EvaluationError as error:
        return error.problem.partition("cannot be loaded: ")[2]
    shift = float((found - decoded).abs().max() / decoded.std())
    return LOADS if shift < NEAR else f"computes other logits ({shift:.1g} of their spread)"


def _logits(checkpoint: Path, runtime: str) -> torch.Tensor:
    loaded: Any = RUNTIMES.get(runtime)().load(checkpoint, LoadOptions(device="cpu", dtype="float32"))
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(input_ids=torch.tensor(tiny_rows(2, 20, 20)), use_cache=False).logits
    return logits


def page(found: dict[str, Any]) -> str:
    """The text of docs/models.md with its table made anew."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{head}{MARK}\n\n{models_markdown(found)}\n\n{MARK}{rest.partition(MARK)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    names = parser.parse_args().names
    kept = read_json(MODELS_FILE)["architectures"] if MODELS_FILE.exists() and names else {}
    for name in names or zoo.architectures():
        with tempfile.TemporaryDirectory() as scratch:
            kept[name] = facts_of(name, Path(scratch))
        said = next(kept[name][key] for key in ("untried", "refused", "share") if key in kept[name])
        sys.stdout.write(f"{name}: {said}\n")
        sys.stdout.flush()
    found = {"architectures": dict(sorted(kept.items())), "versions": {name: version(name) for name in PACKAGES}}
    write_json(MODELS_FILE, found)
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
