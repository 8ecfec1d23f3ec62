"""Orthogonal matrices that spread what lies in a few channels over all: Hadamard's, and random ones.

A Hadamard matrix of 1 and -1 exists for 1, 2 and, as far as anybody knows, for every multiple of 4. Here those of
Sylvester (powers of two) and of Paley (one more than a prime, or twice that) are multiplied, which reaches most widths
of models: 576 is 36 times 16. What has none gets a random one, uniform among all (Stewart 1980).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch

CHUNK = 64
"""Sylvester's matrices are taken apart into factors of this size, each a product of matrices."""


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """An orthogonal matrix ``Q`` as what it is made of.

    Attributes:
        factors: float32 square matrices whose Kronecker product, over the root of its size where they are of 1 and -1,
            is the matrix.
        signs: float32 ``[size]`` of 1 and -1 by which channels are multiplied first; None for none.
        keeps_mean: it is ``H diag(signs) Hᵀ`` with a first sign of 1, so that the vector of ones stays what it is.
    """

    factors: tuple[torch.Tensor, ...]
    signs: torch.Tensor | None = None
    keeps_mean: bool = False

    @property
    def size(self) -> int:
        """Rows, and columns."""
        return prod(factor.shape[0] for factor in self.factors)

    def columns(self, values: torch.Tensor) -> torch.Tensor:
        """``values @ Q`` for float32 ``[..., n * size]``: each piece of that size is turned by itself."""
        pieces = values.reshape(-1, self.size)
        if self.keeps_mean and self.signs is not None:
            turned = self._product(pieces, self.factors) * self.signs.to(pieces.device)
            found = self._product(turned, tuple(factor.T for factor in self.factors))
        else:
            found = self._product(pieces if self.signs is None else pieces * self.signs.to(pieces.device), self.factors)
        return found.reshape(values.shape)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """``Qᵀ @ values`` for float32 ``[n * size, columns]``: what a layer gives is turned."""
        return self.columns(values.T).T.contiguous()

    def _product(self, pieces: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        after = self.size
        for factor in factors:
            width = factor.shape[0]
            after //= width
            scaled = factor.to(pieces) / sqrt(width) if self.signs is not None else factor.to(pieces)
            pieces = scaled.T @ pieces.reshape(-1, width, after) if after > 1 else pieces.reshape(-1, width) @ scaled
        return pieces.reshape(-1, self.size)


def hadamard_rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Orthogonal | None:
    """A Hadamard matrix over the root of its size with random signs; None where none of the size is known here.

    Args:
        size: of the matrix.
        seed: of the signs.
        keeps_mean: the vector of ones is to stay what it is, as before a norm that takes the mean away.
    """
    factors = hadamard_factors(size)
    if factors is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    signs = 1.0 - 2.0 * torch.randint(2, (size,), generator=generator).float()
    if keeps_mean:
        signs[0] = 1.0
    return Orthogonal(factors, signs, keeps_mean)


def sylvester_rotation(size: int) -> Orthogonal:
    """Sylvester's Hadamard matrix over the root of its size, a power of two: symmetric, so that it undoes itself."""
    factors, rest = [], size
    while rest > 1:
        factors.append(_sylvester(min(rest, CHUNK)))
        rest //= len(factors[-1])
    return Orthogonal(tuple(each / sqrt(len(each)) for each in factors) or (torch.ones(1, 1),))


def random_rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Orthogonal:
    """A random orthogonal matrix, see :func:`hadamard_rotation`."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (_basis(size, generator, with_ones=keeps_mean) for _ in range(2))
    return Orthogonal(((first @ second.T if keeps_mean else first).float(),))


def _basis(size: int, generator: torch.Generator, *, with_ones: bool) -> torch.Tensor:
    """An orthogonal matrix, float64; its first column all alike on request."""
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if with_ones:
        drawn[:, 0] = 1.0
    basis: torch.Tensor
    basis, upper = torch.linalg.qr(drawn)
    return basis.mul(upper.diagonal().sign())


def hadamard_factors(size: int) -> tuple[torch.Tensor, ...] | None:
    """Hadamard matrices of 1 and -1 whose Kronecker product has a size, each with a first column of 1.

    Returns:
        None where there is none that the constructions of Sylvester and Paley lead to.
    """
    order = next((order for order in _orders(size) if _paley(order, check=True) is not None), None)
    if order is None:
        return None
    rest, factors = size // order, []
    while rest > 1:
        factors.append(_sylvester(min(rest, CHUNK)))
        rest //= len(factors[-1])
    special = _paley(order)
    found = [*([special] if special is not None and order > 1 else []), *factors]
    return tuple(_with_first_column(each) for each in found) or (torch.ones(1, 1),)


def _orders(size: int) -> list[int]:
    """What may be left when powers of two are divided out of a size, the least first."""
    odd = size & -size
    return [size // odd << shift for shift in range(odd.bit_length())]


def _sylvester(size: int) -> torch.Tensor:
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def _paley(order: int, *, check: bool = False) -> torch.Tensor | None:
    """Paley's matrix of an order that is no power of two; 1 for 1, and None where there is none.

    Args:
        order: of the matrix.
        check: only tell whether there is one.
    """
    if order == 1:
        return torch.ones(1, 1)
    prime = order - 1
    if prime % 4 == 3 and _is_prime(prime):
        return torch.ones(0) if check else _paley_one(prime)
    prime = order // 2 - 1
    if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        return torch.ones(0) if check else _paley_two(prime)
    return None


def _paley_one(prime: int) -> torch.Tensor:
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[0, 1:], bordered[1:, 0] = 1.0, -1.0
    bordered[1:, 1:] = _jacobsthal(prime)
    return torch.eye(prime + 1) + bordered


def _paley_two(prime: int) -> torch.Tensor:
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[0, 1:] = bordered[1:, 0] = 1.0
    bordered[1:, 1:] = _jacobsthal(prime)
    own, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, own) + torch.kron(torch.eye(prime + 1), other)


def _jacobsthal(prime: int) -> torch.Tensor:
    """Whether differences of places are squares: 1, or -1, and 0 on the diagonal."""
    is_square = torch.full((prime,), -1.0)
    is_square[torch.arange(1, prime).square() % prime] = 1.0
    is_square[0] = 0.0
    places = torch.arange(prime)
    return is_square[(places[:, None] - places) % prime]


def _with_first_column(matrix: torch.Tensor) -> torch.Tensor:
    return matrix * matrix[:, :1]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(sqrt(number)) + 1))
