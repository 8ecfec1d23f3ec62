"""The bytes of a file are told from the plan of its variant, to the byte, for files of several schemes too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import ShardWriter
from quantkit.engine.skeleton import Skeleton
from quantkit.evaluation.memory import checkpoint_bytes
from quantkit.formats import FORMATS
from quantkit.quantization.foreseen import foreseen_bytes
from quantkit.quantization.job import Job
from quantkit.quantization.stage import quantize
from quantkit.recipe import VariantSpec
from tests.architectures import make
from tests.tiny import make_model, tiny_rows

EXPERTS = {"q_proj|k_proj|v_proj": {"bits": 8}, "1.block_sparse_moe": {"bits": 3}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("untied", {"bits": 4, "group_size": 32, "ignore": ["lm_head", "0.mlp.down"], "overrides": {"o_proj": "int3"}}),
    ("tied", {"group_size": 32, "ignore": [], "embeddings": {"bits": 8}}),
    ("experts", {"group_size": 32, "overrides": EXPERTS}),
    ("tied", {"format": "gptq", "group_size": 32, "ignore": ["lm_head", "o_proj"], "overrides": {"down": {"bits": 8}}}),
    ("untied", {"scheme": "nf4", "format": "bitsandbytes", "ignore": ["lm_head", "layers.0.mlp"]}),
    ("tied", {"format": "gguf", "embeddings": {"bits": 8}, "overrides": {"down_proj": {"bits": 8}}}),
    ("tied", {"format": "gguf", "embeddings": {"bits": 8}, "ignore": ["o_proj"]}),
    ("untied", {"bits": 8, "kv_cache": "fp8"}),
    ("experts", {"bits": 8, "kv_cache": "int8_head"}),
    ("experts", {"format": "gguf", "overrides": {"q_proj": {"scheme": "mxfp4"}, "w2": {"bits": 8}}}),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("untied", "tied"):
        make_model(folder / name, num_hidden_layers=2, tie_word_embeddings=name == "tied")
    make(folder / "experts", "mixtral")
    facts = {"reference": "somebody/model"}
    return {name: Job(folder / name, facts, "float32", device="cpu") for name in ("untied", "tied", "experts")}


@pytest.mark.parametrize(("model", "keys"), CASES)
def test_the_bytes_of_a_file_are_those_that_were_foreseen(
    model: str, keys: dict[str, Any], jobs: dict[str, Job], tmp_path: Path
) -> None:
    job, variant = jobs[model], VariantSpec.model_validate({"name": "mix", "method": "rtn", **keys})
    job = replace(job, rows=tiny_rows(), calibration_sha256="0" * 64) if variant.calibrated else job
    foreseen = foreseen_bytes(job, Skeleton(job.source), variant)
    made = quantize(job, variant, tmp_path / "out")
    slack = FORMATS.get(variant.format).varies * len(made.facts["layers"])
    assert foreseen - 2 * slack <= checkpoint_bytes(made.folder) <= foreseen


def test_of_files_in_several_parts_the_index_counts(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_shard_bytes=64) as writer:
        for name in "abc":
            writer.declare(name, torch.float32, (4, 3))
        foreseen = writer.nbytes()
        for name in "abc":
            writer.write(name, torch.zeros(4, 3))
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert foreseen == sum(file.stat().st_size for file in files)
