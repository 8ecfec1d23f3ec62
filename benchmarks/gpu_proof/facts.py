"""The card, the machine, and what they do in a second."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpu_proof.found import Found
from quantkit.system.devices import synchronize
from quantkit.system.environment import describe
from quantkit.system.units import in_units

OPERATIONS = 1000


def facts(found: Found) -> None:
    """Say what is there, and measure products, bandwidths, the disk and the time of an operation."""
    machine = describe()
    name = _card(machine["device"]) if found.device == "cuda" else "cpu, no GPU was used"
    versions = {key: machine["packages"].get(key) for key in ("quantkit", "torch", "transformers")}
    told = ", ".join(f"{key} {version}" for key, version in versions.items())
    found.say(f"{name}; {told}, CUDA {machine['cuda']}", {"card": name, "machine": machine})
    found.say(f"{machine['cpu']}, {machine['cores']} cores, {in_units(machine['memory_bytes'])}")
    rates: dict[str, float] = {}
    for measure, scale, unit in ((_products, 1e12, "TFLOP/s"), (_bandwidths, 1e9, "GB/s"), (_operations, 1e6, "a us")):
        own = measure(found)
        rates |= own
        said = ", ".join(f"{what} {rate / scale:,.3g} {unit}" for what, rate in own.items())
        found.say(f"{said}, on {found.device}", {"rates": rates})


def _card(name: str) -> str:
    properties = torch.cuda.get_device_properties(0)
    capability = f"capability {properties.major}.{properties.minor}"
    return f"{name}, {in_units(properties.total_memory)}, {capability}, driver {_driver()}"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown, as nvidia-smi does not answer"
    return told.strip().partition("\n")[0]


def _products(found: Found) -> dict[str, float]:
    """FLOP/s of square products by kind."""
    size, device = (256 if found.small else 8192), torch.device(found.device)
    spent = {}
    for kind, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        left = torch.randn(size, size, device=device, dtype=dtype)
        spent[kind] = best(partial(torch.mm, left, left), device)
    if found.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        left = torch.randn(size, size, device=device)
        spent["tf32"] = best(partial(torch.mm, left, left), device)
        torch.backends.cuda.matmul.allow_tf32 = False
    return {kind: 2 * size**3 / seconds for kind, seconds in spent.items()}


def _bandwidths(found: Found) -> dict[str, float]:
    """Bytes a second in memory, read and written, over the bus, and to the disk."""
    device, nbytes = torch.device(found.device), (1 << 23 if found.small else 1 << 30)
    target = torch.empty(nbytes // 4, device=device)
    rates = {"copy": 2 * nbytes / best(partial(target.copy_, torch.ones_like(target)), device)}
    if found.device == "cuda":
        for kind, pinned in (("pageable", False), ("pinned", True)):
            host = torch.ones(nbytes // 4, pin_memory=pinned)
            rates[f"to the card, {kind}"] = nbytes / best(partial(target.copy_, host), device)
    rates["disk written"] = nbytes / _written(found.work / "disk", nbytes)
    return rates


def _written(path: Path, nbytes: int) -> float:
    """Seconds of writing a file until it is on the disk."""
    data = bytes(nbytes)
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _operations(found: Found) -> dict[str, float]:
    """Operations of torch a second, on a tensor of one element."""
    device = torch.device(found.device)
    one = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(OPERATIONS):
            one.add_(1)

    return {"operations of torch": OPERATIONS / best(many, device)}


def best(work: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Seconds of the shortest of some calls, the first left out."""
    spent = []
    for _ in range(1 + calls):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        spent.append(time.perf_counter() - started)
    return min(spent[1:])
