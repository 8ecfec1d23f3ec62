"""What a run ran on, for its records."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from quantkit.system.distribution import version_of
from quantkit.system.threads import processors

PACKAGES = (
    "quantkit", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "bitsandbytes", "datasets",
    "gguf", "numpy", "peft", "xllamacpp", "lm-eval", "rouge-score",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Python, platform, processor, memory, device and package versions."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": processors(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
