"""Why transformers does not load a model with packed layers: its own faults, found without weights, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from quantkit.engine.initializing import reaches_for_weights, splits_in_vain
from quantkit.engine.skeleton import Skeleton
from quantkit.formats.base import Format

ELSEWHERE = "the reference decoder reads them, and so do servers that call them so"
"""Who reads what transformers does not."""
TAKES_FOR_PACKED = "which it takes for packed ones when it loads the file, and fails: the reference decoder reads it"
READS = "the reference decoder reads the file, and vLLM does where it has such a model"


def loading_faults(skeleton: Skeleton, store: type[Format], packed: Collection[str]) -> tuple[str, ...]:
    """What keeps transformers from loading packed layers where they belong, each with who loads them.

    Args:
        skeleton: the model.
        store: the format in which the layers are packed.
        packed: their names.
    """
    return tuple(_faults(skeleton, store, packed))


def _faults(skeleton: Skeleton, store: type[Format], packed: Collection[str]) -> Iterator[str]:
    names, kind = skeleton.names, f"transformers' {type(skeleton.model).__name__}"
    layers = [layer for layer in skeleton.layers() if layer.name in packed]
    lost = [layer.name for layer in layers if not names.loads_alone(f"{layer.path}.weight")]
    if lost:
        yield f"transformers has no place for packed layers such as {lost[0]}; {ELSEWHERE}"
    paths = [layer.path for layer in layers if layer.name not in lost] if store.packed_as else []
    reached = reaches_for_weights(skeleton.model, paths, replaced=store.packed_as == "replaced")
    if reached is not None:
        yield f"{kind} reaches for the weights of packed layers such as {reached} when it is loaded, and fails: {READS}"
    if not packed or store.packed_as != "emptied":
        return
    made = names.merged().items()
    merged = next((name for name, parts in made if any(w.removesuffix(".weight") not in packed for w in parts)), None)
    if merged is not None:
        yield f"transformers makes {merged} of float tensors, {TAKES_FOR_PACKED}"
    split = splits_in_vain(skeleton.model, [layer.path for layer in layers])
    if split is not None:
        when = "when it loads a model with packed layers, and fails"
        yield f"{kind} does not split tensors such as {split} {when}: {READS}"
