"""What lies beside a checkpoint that a library quantized: its recipe and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.exports.manifest import FOREIGN, public_reference, write_manifest
from quantkit.libraries.base import CODES
from quantkit.system.artifacts import STAGE_FILE, write_text

if TYPE_CHECKING:
    from quantkit.quantization import Job
    from quantkit.recipe import LibrarySpec
    from quantkit.schemes import Scheme


def write_records(
    folder: Path,
    job: Job,
    variant: LibrarySpec,
    store: str,
    schemes: Mapping[str, Scheme],
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write ``recipe.yaml`` and ``manifest.json``.

    The manifest says ``foreign`` where the library wrote the tensors, which then are read as any file of its kind.
    """
    write_text(folder / "recipe.yaml", yaml.safe_dump(variant.resolved(), sort_keys=False))
    library = facts["library"]
    made_by = f"{variant.library} {library['versions'].get(variant.plugin.distribution, '')}".strip()
    write_manifest(
        folder,
        {
            "schema": 1,
            "created_by": f"{made_by}, run by quantkit {version('quantkit')}",
            FOREIGN: variant.offer.writes != CODES,
            "source": {**job.source_facts, "reference": public_reference(job.source_facts.get("reference"))},
            "calibration_sha256": identity["calibration"],
            "feed": None,
            "format": store,
            "layers": {name: scheme.to_json() for name, scheme in schemes.items()},
            "embedding": None,
            "versions": {"quantkit": version("quantkit"), **library["versions"]},
            "variables": library["variables"],
            "bits_per_weight": facts["bits_per_weight"],
            "stage_file": STAGE_FILE,
        },
    )
