"""Transforms: what changes the weights of a variant before they are solved. One file each."""

from __future__ import annotations

from quantkit.system.registry import Registry
from quantkit.transforms.base import Transform

TRANSFORMS = Registry[Transform]("transform", "quantkit.transforms", "quantkit.transforms")
