"""What modules of a block are given and give in one run of it, and how these are made of one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.system.host import decide, number, numbers

SAME = 1e-4
"""Relative difference that counts as none, in float32."""
ROUNDING = 1e-5
"""What of the size of a sum rounding may take from a part of it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A module is given or gives hidden states.

    Attributes:
        name: of the module in the model.
        module: it.
        rows: float32 ``[tokens, width]``.
        gives: they are its output.
        args, kwargs: of the call, as they are.
    """

    name: str
    module: nn.Module
    rows: torch.Tensor
    gives: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def again(self, rows: torch.Tensor) -> torch.Tensor:
        """What the module gives for other hidden states, ``[tokens, width]``."""
        given = hidden_states(self.args, self.kwargs, rows.shape[-1])
        args, kwargs = with_hidden(self.args, self.kwargs, given, rows)
        return rows_of(self.module(*args, **kwargs), rows.shape[-1], self.rows)


def rows_of(value: Any, width: int, default: torch.Tensor) -> torch.Tensor:
    """A tensor, or the first of several, as float32 rows of this width; ``default`` where it has another."""
    found = value[0] if isinstance(value, tuple | list) and value else value
    fits = isinstance(found, torch.Tensor) and found.is_floating_point() and found.ndim and found.shape[-1] == width
    return found.detach().float().reshape(-1, width).clone() if fits else default


def hidden_states(args: Sequence[Any], kwargs: dict[str, Any], width: int) -> torch.Tensor | None:
    """The first tensor of a call whose last side is the width."""
    tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.ndim)
    return next((each for each in tensors if each.is_floating_point() and each.shape[-1] == width), None)


def with_hidden(
    args: Sequence[Any], kwargs: dict[str, Any], given: torch.Tensor | None, rows: torch.Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with other hidden states, ``[tokens, width]``, in the place of those that were given."""

    def other(value: Any) -> Any:
        is_given = isinstance(value, torch.Tensor) and value is given
        return rows.reshape(value.shape).to(value.dtype) if is_given else value

    return [other(each) for each in args], {key: other(each) for key, each in kwargs.items()}


@contextmanager
def recorded(modules: Iterable[tuple[str, nn.Module]], width: int) -> Iterator[list[Moment]]:
    """Inside the block, what modules are given and give of this width is put down in the order in which it happens."""
    moments: list[Moment] = []
    nothing = torch.empty(0, width)

    def given(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of(hidden_states(args, kwargs, width), width, nothing)
        if len(rows):
            moments.append(Moment(name, module, rows, False, args, kwargs))

    def gave(name: str, module: nn.Module, output: Any) -> None:
        rows = rows_of(output, width, nothing)
        if len(rows):
            moments.append(Moment(name, module, rows, True))

    with ExitStack() as removal:
        for name, module in modules:
            hook = module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: given(name, m, args, kwargs), with_kwargs=True
            )
            removal.callback(hook.remove)
            after = module.register_forward_hook(lambda m, _, output, name=name: gave(name, m, output))
            removal.callback(after.remove)
        yield moments


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = SAME) -> bool:
    """Whether rows are the same, token by token."""
    if one.shape != other.shape:
        return False
    return decide(((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all())


def are_rows_of(rows: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether each row is one of another tensor's, times a number above 0; not where all are nothing."""
    own = rows[rows.norm(dim=-1) > 0]
    if not len(own):
        return False
    cosines = nn.functional.normalize(own.double(), dim=-1) @ nn.functional.normalize(source.double(), dim=-1).T
    return decide((cosines.amax(1) > 1 - SAME**2).all())


def parts_of(rows: torch.Tensor, stream: torch.Tensor | None, given: Sequence[Moment]) -> list[Moment] | None:
    """The outputs of which rows are a sum, each times a number, and of a stream that is to be in it, if there is one.

    Returns:
        The outputs; None where rows are no such sum.
    """
    unlike: list[Moment] = []
    for each in given:
        if len(each.rows) == len(rows) and (stream is None or not same(each.rows, stream)):
            unlike += [] if any(same(each.rows, other.rows) for other in unlike) else [each]
    columns = [*([] if stream is None else [stream]), *(each.rows for each in unlike)]
    if not columns:
        return None
    weights = 1 / rows.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    matrix = torch.stack([(each.double() * weights).flatten() for each in columns], 1)
    wanted = (rows.double() * weights).flatten()
    shares = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    missing = (wanted - matrix @ shares).view(rows.shape).norm(dim=-1)
    added = rows if stream is None else rows - stream
    allowed = SAME * (added.double() * weights).norm(dim=-1) + ROUNDING
    if not decide((missing <= allowed).all()) or (stream is not None and number(shares[0]) < SAME):
        return None
    own = numbers(shares if stream is None else shares[1:])
    return [each for each, share in zip(unlike, own, strict=True) if abs(share) > 10 * SAME]
