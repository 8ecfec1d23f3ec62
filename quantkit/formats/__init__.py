"""Formats: how codes lie on disk. One file each."""

from __future__ import annotations

from quantkit.formats.base import Format
from quantkit.system.registry import Registry

FORMATS: Registry[Format] = Registry("format", "quantkit.formats", "quantkit.formats")
