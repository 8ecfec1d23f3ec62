"""Names of tensors with what training put around them, and the same by the names that the model's class has.

``torch.compile``, data-parallel and sharded training, checkpointing of activations and training frameworks each wrap a
module in another, which is then part of every name below it, at the front or in the middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from quantkit.checkpoint.names import Names
from quantkit.errors import CheckpointError

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module"})
"""Parts of names that wrap: of ``torch.compile``, FSDP, checkpointing, Lightning, DeepSpeed, parallel training."""
SURE = WRAPPERS - {"module"}
"""Those that no model has as a name of its own."""


def without_wrappers(name: str, wrappers: Iterable[str] = WRAPPERS) -> str:
    """A name without the parts that wrap."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def own_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What each tensor of a checkpoint is called by the model's class, of those that are called otherwise.

    Nothing is renamed where the class finds all that it needs; else as few parts are taken off or put before as make it
    find most.

    Args:
        model: as transformers builds it, on meta.
        shapes: of the tensors, by name.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    lacking = _lacking(model, shapes)
    if not lacking and not any(set(name.split(".")) & SURE for name in shapes):
        return {}
    _check_distinct({name: without_wrappers(name, SURE) for name in shapes})
    best: dict[str, str] = {name: name for name in shapes}
    for wrappers in (SURE, WRAPPERS):
        plain = {name: without_wrappers(name, wrappers) for name in shapes}
        for rename in (_same, *_at_the_front(list(plain.values()), lacking, getattr(model, "base_model_prefix", ""))):
            called = {name: rename(each) for name, each in plain.items()}
            if len(set(called.values())) < len(called):
                continue
            left = _lacking(model, {each: shapes[name] for name, each in called.items()})
            if len(left) < len(lacking) or (called != best and len(left) == len(lacking) and wrappers == SURE):
                best, lacking = called, left
            if not lacking:
                return _different(best)
    return _different(best)


def _lacking(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors that the model needs and does not find, but for a head that may be tied."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return [name for name in Names(model, shapes, shapes).unmatched()[0] if name not in tied]


def _same(name: str) -> str:
    return name


def _at_the_front(names: list[str], lacking: Iterable[str], base: str) -> list[Callable[[str], str]]:
    """Ways of changing what names begin with, the commonest first: a part that is too much, or one that is missing.

    What the body of a model is called, ``base``, transformers itself adds and leaves out.
    """
    wanted = {each for name in lacking for each in (name, name.removeprefix(f"{base}."))}
    extra: Counter[str] = Counter()
    short: Counter[str] = Counter()
    ends = {name.split(".", cut)[-1]: name for name in wanted for cut in range(1, name.count("."))}
    for name in names:
        parts = name.split(".")
        cut = next((cut for cut in range(1, len(parts)) if ".".join(parts[cut:]) in wanted), None)
        if cut is not None:
            extra[f"{'.'.join(parts[:cut])}."] += 1
        elif name in ends:
            short[ends[name].removesuffix(name)] += 1
    taken = [_without(prefix) for prefix, _ in extra.most_common(2)]
    return [*taken, *(_with(prefix, ends) for prefix, _ in short.most_common(1))]


def _without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _with(prefix: str, ends: Mapping[str, str]) -> Callable[[str], str]:
    return lambda name: f"{prefix}{name}" if ends.get(name) == f"{prefix}{name}" else name


def _different(called: Mapping[str, str]) -> dict[str, str]:
    """Those of some new names that differ from the old."""
    return {name: own for name, own in called.items() if own != name}


def _check_distinct(called: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, own in called.items():
        if own in seen:
            raise CheckpointError(
                f"the checkpoint holds '{seen[own]}' and '{name}', which are both '{own}'", "keep one of them"
            )
        seen[own] = name
