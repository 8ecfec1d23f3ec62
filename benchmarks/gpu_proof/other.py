"""The same work by gptqmodel, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from gpu_proof.found import BLOCKS, TINY, Found
from gpu_proof.work import random_llama, random_rows
from quantkit.isolation.environments import environment_of
from quantkit.libraries.gptqmodel import Gptqmodel
from quantkit.system.units import in_units

OTHER = """
import json, sys, time
import torch
from gptqmodel import GPTQModel, QuantizeConfig
model, rows, out, device = sys.argv[1:]
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in json.load(open(rows))]
told, started = {}, time.perf_counter()
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128, sym=True), device=device)
told["load"], started = time.perf_counter() - started, time.perf_counter()
loaded.quantize(data, batch_size=1)
told["quantize"], started = time.perf_counter() - started, time.perf_counter()
told["peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
print("\\nPROOF " + json.dumps(told), flush=True)
loaded.save(out)
told["save"] = time.perf_counter() - started
print("\\nPROOF " + json.dumps(told), flush=True)
"""
MARK = "PROOF "


def gptqmodel(found: Found) -> None:
    """The random blocks again by gptqmodel, from the same rows."""
    python = found.setting.get("gptqmodel_python") or _interpreter()
    if python is None:
        found.say("gptqmodel is not installed: 'quantkit env install gptqmodel', or --gptqmodel-python; it was not run")
        return
    keys = TINY if found.small else BLOCKS
    folder = random_llama(found.work / "blocks", found.device, **keys)
    rows = found.work / "rows.json"
    rows.write_text(json.dumps(random_rows(keys["vocab_size"], *found.calibration)), "utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **Gptqmodel.variables(os.cpu_count() or 2, found.device)}
    environment.pop("PYTHONPATH", None)
    command = [python, "-c", OTHER, str(folder), str(rows), str(found.work / "other"), found.device]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            if line.startswith(MARK):
                _tell(found, json.loads(line.removeprefix(MARK)))
    if child.returncode:
        found.say(f"gptqmodel ended with {child.returncode}", failed=True)


def _interpreter() -> str | None:
    """One that has gptqmodel: this one, or that of the environment that ``quantkit env install`` made."""
    if importlib.util.find_spec("gptqmodel") is not None:
        return sys.executable
    made = environment_of(Gptqmodel)
    return str(made.python) if made.state == "ready" else None


def _tell(found: Found, told: dict[str, Any]) -> None:
    """What it took so far, in the place of what was said before."""
    parts = ", ".join(f"{what} {told[what]:.1f} s" for what in ("load", "quantize", "save") if what in told)
    found.lines = []
    peak = "" if told["peak"] is None else f", peak memory {in_units(told['peak'])} allocated"
    found.say(f"gptqmodel: {parts}{peak}, on {found.device}", told)
    ours = found.setting["known"].get("blocks", {}).get("seconds")
    if ours:
        found.say(f"quantkit: {ours:.1f} s with loading and writing, {ours / sum(_spent(told)):.2f} of its time")


def _spent(told: dict[str, Any]) -> list[float]:
    return [told[what] for what in ("load", "quantize", "save") if what in told]
