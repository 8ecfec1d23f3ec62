"""What a walk needs can be sent elsewhere: pickled, and run in a process that knows nothing else."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, MissingDependencyError, QuantkitError
from quantkit.publishing import describe
from quantkit.quantization import Job, Quantized, WalkJob, Wanted, run_walk
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import file_sha256
from tests.tiny import tiny_rows

VARIANTS: list[dict[str, Any]] = [
    {"name": "gptq", "method": "gptq", "group_size": 32},
    {"name": "awq", "method": "awq", "group_size": 32, "symmetric": False, "format": "awq"},
    {"name": "odd", "method": "rtn", "group_size": 48},
]


def walk_job(model: Path, out: Path) -> WalkJob:
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, "float", "cpu")
    wanted = tuple(Wanted(VariantSpec.model_validate(keys), out / keys["name"]) for keys in VARIANTS)
    return WalkJob(job, wanted, partial(describe, job))


def digests(found: list[Quantized | Exception]) -> dict[str, str]:
    folders = [each.folder for each in found if isinstance(each, Quantized)]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.name != "stage.json"]
    return {f"{path.parent.name}/{path.name}": file_sha256(path) for path in files}


def test_a_walk_in_another_process_writes_the_bytes_of_one_here(model: Path, tmp_path: Path) -> None:
    here = run_walk(walk_job(model, tmp_path / "here"))
    sent = pickle.loads(pickle.dumps(walk_job(model, tmp_path / "there")))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(run_walk, sent).result()
    assert digests(here) == digests(there)
    assert {"gptq/README.md", "gptq/model.safetensors", "awq/model.safetensors"} <= digests(there).keys()
    failed, wanted = there[2], here[2]
    assert isinstance(failed, QuantkitError)
    assert isinstance(wanted, QuantkitError)
    assert (str(failed), failed.problem, failed.remedy) == (str(wanted), wanted.problem, wanted.remedy)


def test_errors_survive_the_way_between_processes() -> None:
    for error in (CheckpointError("it is broken", "get it again"), MissingDependencyError("gguf", "reading")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (again.problem, again.remedy, str(again)) == (error.problem, error.remedy, str(error))
