"""Codes as a dense stream of bits: least significant bit first, in int32 words, each row ending on a whole word.

Eight codes become as many bytes as a code has bits. That is done for many at once by shifts of whole words: bytes that
hold a code each are taken as words of two, the upper code is moved down to the lower, and so on with words of four and
of eight. The tensors stay on their device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOGETHER = 8
"""Codes that fill whole bytes."""
AT_ONCE = 1 << 19
"""Codes that are packed at once on a CPU: enough that calls cost nothing, few enough for its cache."""


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[rows, columns]`` to int32 words ``[rows, ceil(columns * bits / 32)]`` on the same device."""
    import torch

    rows, columns = codes.shape
    flat = _flat(_padded(codes, -columns % 32))
    octets = torch.empty(flat.numel() // TOGETHER, bits, dtype=torch.uint8, device=codes.device)
    for start, stop in _parts(flat):
        together = _joined(flat[start:stop], bits).view(torch.uint8).view(-1, TOGETHER)
        octets[start // TOGETHER : stop // TOGETHER] = together[:, :bits]
    words = octets.view(-1).view(torch.int32).view(rows, -1)
    return words[:, : -(-columns * bits // 32)].contiguous()


def unpack_bits(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: uint8 ``[rows, columns]`` on the same device."""
    import torch

    rows, groups = words.shape[0], -(-columns // TOGETHER)
    octets = _flat(words).view(torch.uint8).view(rows, -1)
    octets = _padded(octets, max(0, groups * bits - octets.shape[1]))[:, : groups * bits]
    packed = octets.reshape(-1, bits)
    codes = torch.empty(packed.shape[0] * TOGETHER, dtype=torch.uint8, device=words.device)
    parts = _parts(codes)
    wide = torch.zeros(parts[0][1] // TOGETHER if parts else 0, TOGETHER, dtype=torch.uint8, device=words.device)
    for start, stop in parts:
        part = packed[start // TOGETHER : stop // TOGETHER]
        wide[: part.shape[0], :bits] = part
        codes[start:stop] = _split(wide[: part.shape[0]].view(torch.int64).view(-1), bits)
    return codes.view(rows, -1)[:, :columns].contiguous()


def _flat(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix as a vector of neighbours in memory; that of a single column may say to be contiguous and not be."""
    return matrix.contiguous().as_strided((matrix.numel(),), (1,))


def _padded(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """A matrix with so many columns of zeros behind it."""
    import torch

    return torch.nn.functional.pad(matrix, (0, columns)) if columns else matrix


def _parts(flat: torch.Tensor) -> list[tuple[int, int]]:
    """Where to cut a stream of codes; on a GPU it is done whole."""
    count = flat.numel()
    step = AT_ONCE if flat.device.type == "cpu" else max(1, count)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _joined(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[8 * n]`` to int64 ``[n]``, each with eight codes in its low bits."""
    import torch

    found, width = codes, 8
    for dtype in (torch.int16, torch.int32, torch.int64):
        found, low = found.view(dtype), (1 << bits) - 1
        if bits < width:
            upper = (found >> (width - bits)).bitwise_and_(low << bits)
            found = (found & low).bitwise_or_(upper)
        width, bits = 2 * width, 2 * bits
    return found


def _split(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`_joined`."""
    import torch

    found, width, bits = words, 64, bits * TOGETHER
    for dtype in (torch.int64, torch.int32, torch.int16):
        found, width, bits = found.view(dtype), width // 2, bits // 2
        if bits < width:
            low = (1 << bits) - 1
            upper = (found & (low << bits)) << (width - bits)
            found = (found & low).bitwise_or_(upper)
    return found.view(torch.uint8)
