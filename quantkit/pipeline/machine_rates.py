"""What this machine does in a second, measured in a moment: products of matrices, bytes moved, and weights solved.

Rates are measured in the dtype and at the widths of the model itself, because processors differ by what they do well:
one with AMX multiplies bfloat16 several times faster than float32, one with AVX2 does not, and a GPU is idle with
narrow matrices. All are of the first moment: caches, clocks and other work of the machine make a run slower or faster.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from quantkit.methods.base import InputStatistics, Statistic
from quantkit.recipe import VariantSpec
from quantkit.schemes.base import PER_CHANNEL
from quantkit.schemes.plain import PlainScheme
from quantkit.system.products import product

MOMENT, LONGEST, MOST_CALLS = 0.1, 1.0, 20
"""Seconds that a rate is measured for, until a call was longer than the shortest; seconds and calls at most."""
ROWS = {"cpu": 256, "cuda": 4096}
"""Tokens of a product, as many as passes take about at a time."""
WIDEST = 4096
COPIED = 32 << 20
"""Bytes that are copied back and forth."""
FILED = 32 << 20
"""Bytes of a file that is written and read."""
USUAL_DISK = 5e8
"""Bytes that a disk gives in a second, where nothing may be written."""
SOLVED = (256, 512)
"""Rows and columns of a weight that a method is tried on, at most."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second.

    Attributes:
        device, dtype: of the products, in words.
        products: multiplications and additions in that dtype.
        nbytes: bytes read and written.
    """

    device: str
    dtype: str
    products: float
    nbytes: float


@lru_cache(maxsize=32)
def rates(device: str, dtype: torch.dtype, hidden: int, wide: int) -> Rates:
    """The rates of a device for a model of some widths.

    Args:
        device: as torch names it.
        dtype: of products.
        hidden: width of the residual stream.
        wide: width inside the MLP.
    """
    place = torch.device(device)
    rows, inner, outer = ROWS.get(place.type, 256), min(hidden, WIDEST), min(wide, WIDEST)
    with torch.no_grad():
        left = torch.ones(rows, inner, dtype=dtype, device=place)
        right = torch.ones(outer, inner, dtype=dtype, device=place)
        multiplied = _seconds(lambda: product(left, right.T), place)
        source = torch.zeros(COPIED // 4, dtype=torch.float32, device=place)
        target = torch.empty_like(source)
        copied = _seconds(lambda: target.copy_(source), place)
    name = str(dtype).removeprefix("torch.")
    return Rates(device, name, 2 * rows * inner * outer / multiplied, 2 * COPIED / copied)


@lru_cache(maxsize=8)
def disk_rate(folder: Path) -> float:
    """Bytes that a disk takes and gives in a second: of a file without a name that is written through and read back.

    Args:
        folder: on the disk; where it does not exist yet, the nearest one above it that does.
    """
    there = next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), Path())
    content = os.urandom(FILED)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            begun = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            file.read()
            return 2 * FILED / (time.perf_counter() - begun)
    except OSError:  # nothing may be written there, as the run itself will say
        return USUAL_DISK


def solving_seconds(variant: VariantSpec, shapes: list[tuple[int, int]], device: str) -> float | None:
    """Seconds in which a variant's method solves layers, told from one small weight.

    Args:
        variant: whose method and scheme.
        shapes: ``(out_features, in_features)`` of each layer.
        device: as torch names it.

    Returns:
        The seconds, or None where the method cannot be tried on a weight by itself.
    """
    scheme, method = variant.base_scheme(), variant.build_method()
    if isinstance(scheme, PlainScheme):
        return 0.0  # its layers stay as they are
    group = 1 if scheme.group_size == PER_CHANNEL else scheme.group_size
    rows, columns = min(SOLVED[0], shapes[0][0]), max(group, min(SOLVED[1], shapes[0][1]) // group * group)
    found = _tried(variant.model_dump_json(exclude={"name", "title"}), variant, rows, columns, device)
    if found is None:
        return None
    whole = sum(height * width * (width if method.factorizes else 1) for height, width in shapes)
    return found * whole / (rows * columns * (columns if method.factorizes else 1))


_TRIED: dict[tuple[str, int, int, str], float | None] = {}


def _tried(key: str, variant: VariantSpec, rows: int, columns: int, device: str) -> float | None:
    """Seconds in which a variant solves one weight; None if it refuses. What was measured once is remembered."""
    place = (key, rows, columns, device)
    if place not in _TRIED:
        try:
            _TRIED[place] = _solved(variant, rows, columns, torch.device(device))
        except Exception:  # methods are plugins, which may raise anything; the run tells of it where it matters
            _TRIED[place] = None  # such as a program of its own, or a shape that the method does not take
    return _TRIED[place]


def _solved(variant: VariantSpec, rows: int, columns: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    inputs = torch.randn(2 * columns, columns, generator=generator).to(device)
    known = InputStatistics(
        tokens=len(inputs),
        abs_mean=inputs.abs().mean(0),
        square_mean=inputs.square().mean(0),
        gram=inputs.T @ inputs,
    )
    method, scheme = variant.build_method(), variant.base_scheme().for_layer("", None, 1, (rows, columns))
    needs: frozenset[Statistic] = method.needs
    with torch.no_grad():
        return _seconds(lambda: method.quantize(weight, known.only(needs), scheme, torch.float16), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the shortest of some, for what else the machine does only makes it longer."""
    best, spent = math.inf, 0.0
    for _ in range(MOST_CALLS):
        begun = _now(device)
        work()
        last = _now(device) - begun
        best, spent = min(best, last), spent + last
        if spent > MOMENT and (best < last or spent > LONGEST):
            break
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
