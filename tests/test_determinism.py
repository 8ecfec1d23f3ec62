"""The same inputs give the same bytes: every own method, twice, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantkit.methods import METHODS

CODE = """
import json, sys
from pathlib import Path
from quantkit.system.artifacts import file_sha256
from quantkit.quantization import Job, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from tests.tiny import tiny_rows
model, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for inputs in ("quantized", "float"):
    for given in variants:
        spec = VariantSpec.model_validate(given)
        job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, inputs, "cpu")
        (done,) = quantize_together(job, [Wanted(spec, out / inputs / spec.name)])
        if isinstance(done, Exception):
            raise done
        for path in sorted(done.folder.iterdir()):
            if path.name != "stage.json":
                found[f"{inputs} {spec.name} {path.name}"] = file_sha256(path)
print(json.dumps(found))
"""
OWN: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32},
    "gptq": {"group_size": 32},
    "awq": {"group_size": 32},
    "awq+gptq": {"group_size": 32},
    "hqq": {"group_size": 32, "symmetric": False},
    "none": {"scheme": "bfloat16", "format": "float"},
    "llama.cpp": {"scheme": "iq4_nl", "format": "gguf"},
}


def digests(model: Path, out: Path) -> dict[str, str]:
    names = {name: name.translate({ord("+"): "-", ord("."): "-"}) for name in OWN}
    variants = [{"name": names[name], "method": name, **keys} for name, keys in OWN.items()]
    command = [sys.executable, "-c", CODE, str(model), str(out), json.dumps(variants)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_own_method_is_listed() -> None:
    assert {method.name for method in METHODS if method.__module__.startswith("quantkit.methods.")} <= set(OWN)


def test_the_same_inputs_give_the_same_bytes_in_another_process(model: Path, tmp_path: Path) -> None:
    first, second = digests(model, tmp_path / "first"), digests(model, tmp_path / "second")
    assert len({name.split()[1] for name in first}) == len(OWN)
    assert first == second
