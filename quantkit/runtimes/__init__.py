"""Runtimes: who loads an exported file and computes. One file each."""

from __future__ import annotations

from quantkit.registry import Registry
from quantkit.runtimes.base import Runtime

RUNTIMES: Registry[Runtime] = Registry("runtime", "quantkit.runtimes", "quantkit.runtimes")
