"""LoRA on a parameter itself, such as a stack of experts (PEFT's ``target_parameters``), one expert at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.errors import SourceError


@dataclass(frozen=True, slots=True)
class Stack:
    """What an adapter adds to one parameter.

    PEFT keeps the factors of all experts in two matrices: ``lora_A`` ``[experts * rank, in]``, expert after expert, and
    ``lora_B`` ``[out, rank * experts]``, in which the expert runs fastest (``peft.tuners.lora.layer.ParamWrapper``).

    Attributes:
        first: key of ``lora_A`` in the adapter.
        second: key of ``lora_B``.
        module: what the adapter calls the module whose parameter it is.
        shape: of the parameter, ``[experts, rows, columns]`` or ``[rows, columns]``.
        rank: of an expert's change.
        scaling: that PEFT multiplies it with.
        transposed: whether the change lies in the parameter as ``[in, out]``.
    """

    first: str
    second: str
    module: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    transposed: bool

    @property
    def experts(self) -> int:
        """How many matrices the parameter holds."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def change(self, first: torch.Tensor, second: torch.Tensor, expert: int) -> torch.Tensor:
        """What is added to one expert, ``[rows, columns]`` of the parameter.

        Args:
            first: ``lora_A``, float32.
            second: ``lora_B``, float32.
            expert: index.
        """
        inner = first.reshape(self.experts, -1, first.shape[1])[expert]
        outer = second.reshape(second.shape[0], -1, self.experts)[:, :, expert]
        found = (outer @ inner) * self.scaling
        return found.T if self.transposed else found


def lies_transposed(shape: Sequence[int], first: Sequence[int], second: Sequence[int], said: bool) -> bool | None:
    """Whether a change lies in its parameter as ``[in, out]``; None if its factors do not fit the parameter.

    Args:
        shape: of the parameter.
        first: of ``lora_A``.
        second: of ``lora_B``.
        said: what the module's class says, which decides where both would fit.
    """
    rows, columns = shape[-2:]
    plain, turned = (rows, columns) == (second[0], first[1]), (columns, rows) == (second[0], first[1])
    if plain and turned:
        return said
    return turned if plain or turned else None


def stack_of(
    keys: tuple[str, str],
    shapes: tuple[Sequence[int], Sequence[int]],
    shape: tuple[int, ...],
    *,
    module: str,
    rank: int,
    scaling: float,
    transposed: bool,
    origin: str,
) -> Stack:
    """The change of a parameter, checked.

    Args:
        keys: of ``lora_A`` and ``lora_B``.
        shapes: of these.
        shape: of the parameter.
        module: as the adapter calls it.
        rank: that the adapter's configuration says.
        scaling: likewise.
        transposed: what the module's class says of its parameters.
        origin: what messages call the adapter.

    Raises:
        SourceError: the factors do not fit the parameter or the rank.
    """
    first, second = shapes
    experts = shape[0] if len(shape) == 3 else 1
    turned = lies_transposed(shape, first, second, transposed and len(shape) == 3)
    if turned is None or first[0] != rank * experts or second[1] != rank * experts:
        raise SourceError(
            f"adapter {origin}: tensors '{keys[0]}' {list(first)} and '{keys[1]}' {list(second)} do not fit the base's "
            f"{list(shape)} at rank {rank}",
            "give the base that it was trained on",
        )
    return Stack(*keys, module, shape, rank, scaling, turned)
