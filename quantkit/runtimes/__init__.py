"""Runtimes: who loads an exported file and computes. One file each."""

from __future__ import annotations

from quantkit.runtimes.base import Runtime
from quantkit.system.registry import Registry

RUNTIMES: Registry[Runtime] = Registry("runtime", "quantkit.runtimes", "quantkit.runtimes", also={"hf": "transformers"})
