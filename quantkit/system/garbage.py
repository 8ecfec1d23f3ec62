"""The garbage collector of Python, which looks for cycles among all that libraries and models made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Inside the block, nothing looks for garbage: for work that makes many objects and no cycles, such as imports."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
