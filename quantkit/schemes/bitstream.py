"""Codes as a dense stream of bits: least significant bit first, in int32 words, each row ending on a whole word."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[rows, columns]`` to int32 words ``[rows, ceil(columns * bits / 32)]`` on the CPU."""
    import numpy as np
    import torch

    rows, columns = codes.shape
    octets = np.pad(codes.cpu().numpy(), ((0, 0), (0, -columns % 32))).reshape(rows, -1, 8)
    # Eight codes fill ``bits`` whole bytes, the low ones of a 64-bit word.
    wide = octets[:, :, 0].astype("<u8", order="C")
    for place in range(1, 8):
        wide |= octets[:, :, place].astype("<u8") << np.uint64(bits * place)
    stream = wide.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    words = np.ascontiguousarray(stream).view("<i4")[:, : -(-columns * bits // 32)]
    return torch.from_numpy(words.astype(np.int32, order="C"))


def unpack_bits(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: uint8 ``[rows, columns]`` on the CPU."""
    import numpy as np
    import torch

    rows = words.shape[0]
    whole = words.cpu().numpy().astype("<i4", order="C").view(np.uint8)
    groups = -(-columns // 8)
    stream = np.pad(whole, ((0, 0), (0, max(0, groups * bits - whole.shape[1]))))[:, : groups * bits]
    wide = np.pad(stream.reshape(rows, groups, bits), ((0, 0), (0, 0), (0, 8 - bits))).view("<u8")[:, :, 0]
    codes = np.empty((rows, groups, 8), dtype=np.uint8)
    for place in range(8):
        codes[:, :, place] = (wide >> np.uint64(bits * place)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns]))
