"""What each block of a model is called with, for libraries that call all of them as the first.

Blocks of Gemma 3, gpt-oss and others differ: some see a window of tokens alone, or turn queries and keys otherwise.
Runs in the worker, so it needs torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantkit.libraries._blocks import blocks_of

if TYPE_CHECKING:
    import torch
    from torch import nn

KEYS = ("position_embeddings", "attention_mask")
"""Arguments of a block that the model makes for each kind of block."""
OWN_ATTENTION = (
    "{} blocks see other tokens or positions than the first: each got its own mask and rotary embedding, where the"
    " library has those of the first for all"
)


@contextmanager
def own_arguments(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[int]:
    """Inside the block, each block of the model gets its own mask and rotary embedding, whoever calls it.

    What they are is seen on the longest row, which the model runs once. What a mask says of padding is kept.

    Args:
        model: of transformers, on the device where it will run.
        rows: of token ids, none of which is longer than what the blocks will be given.

    Yields:
        How many blocks are called in another way than the first.
    """
    blocks = blocks_of(model)
    seen = _seen(model, blocks, max(rows, key=len, default=()))
    others = [index for index in range(1, len(seen)) if not _alike(seen[index], seen[0])]
    hooks = [blocks[index].register_forward_pre_hook(_giving(seen[index]), with_kwargs=True) for index in others]
    try:
        yield len(others)
    finally:
        for hook in hooks:
            hook.remove()


def _seen(model: nn.Module, blocks: list[nn.Module], row: Sequence[int]) -> list[dict[str, Any]]:
    """The arguments named :data:`KEYS` of each block on a row."""
    import torch

    seen: list[dict[str, Any]] = []

    def see(_: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        seen.append({key: arguments[key] for key in KEYS if key in arguments})

    if not row:
        return []
    hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            ids = torch.tensor([list(row)], device=next(model.parameters()).device)
            left_out = torch.ones_like(ids)  # of one token, as a model makes no mask at all where none is left out
            left_out[:, -1] = 0
            model(input_ids=ids, attention_mask=left_out, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for arguments in seen:
        mask = arguments.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            mask = arguments["attention_mask"] = mask.clone()
            mask[..., -1, -1] = mask[..., 0, 0]
    return seen if len(seen) == len(blocks) else []


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors, or tuples of them, hold the same."""
    import torch

    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is other


def _giving(own: Mapping[str, Any]) -> Any:
    """A hook that puts a block's own arguments in the place of those that are given."""

    def give(_: nn.Module, given: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = given[0] if given else arguments["hidden_states"]
        length = states.shape[1]
        changed = dict(arguments)
        if "position_embeddings" in own:
            changed["position_embeddings"] = tuple(
                part[:, :length].to(states.device, states.dtype) for part in own["position_embeddings"]
            )
        if "attention_mask" in own:
            mask = own["attention_mask"]
            mine = None if mask is None else mask.to(states.device)
            changed["attention_mask"] = _masked(mine, arguments.get("attention_mask"), length)
        return given, changed

    return give


def _masked(own: torch.Tensor | None, given: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """A block's own mask ``[1, 1, length, length]`` without the tokens that ``given`` leaves out."""
    import torch

    if own is None or own.dim() != 4:
        return given if own is not None and given is not None and given.dim() != 4 else None
    mine = own[..., :length, :length]
    if given is None:
        return mine
    kept = given.bool()[:, None, None, :]
    if given.dim() == 4:
        diagonal = given.diagonal(dim1=-2, dim2=-1)
        kept = (diagonal if given.dtype == torch.bool else diagonal == 0)[..., None, :]
    blocked = False if mine.dtype == torch.bool else torch.finfo(mine.dtype).min
    return torch.where(kept, mine, torch.tensor(blocked, dtype=mine.dtype, device=mine.device))
