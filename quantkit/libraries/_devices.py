"""One device for libraries that take the first they see, or all of them."""

from __future__ import annotations

import os


def visible(device: str) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a process that shall see ``device`` alone, of those that this one sees."""
    if device == "cpu":
        return ""
    index = int(device.partition(":")[2] or 0)
    seen = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return seen[index] if index < len(seen) else str(index)
