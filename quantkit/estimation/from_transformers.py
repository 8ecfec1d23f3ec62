"""The anatomy of a model of any family, as transformers builds it on the meta device."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quantkit.engine.layers import linear_modules
from quantkit.engine.skeleton import empty_model, find_blocks
from quantkit.estimation.anatomy import Anatomy, Cache, Kind, Weight
from quantkit.estimation.configs import Config


def built(folder: Path, config: Config) -> Anatomy:
    """The anatomy of the model of a folder's ``config.json``.

    Raises:
        SourceError: transformers cannot build it, or its config lacks what the cache depends on.
    """
    model = empty_model(folder)
    prefix, blocks = find_blocks(model)
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    linears = {f"{name}.weight" for name, _ in linear_modules(model)}
    embedding = names[model.get_input_embeddings()]
    head = names.get(model.get_output_embeddings(), "lm_head")
    weights = []
    for name, parameter in model.named_parameters():
        place = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else None
        kind: Kind = "linear" if name in linears else "embedding" if name == f"{embedding}.weight" else "other"
        weights.append(Weight(name, tuple(parameter.shape), kind, None if place is None else int(place)))
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    heads = config.whole("num_attention_heads")
    shared, dim = config.whole("num_key_value_heads", heads), config.whole("head_dim", hidden // heads)
    words = f"(2 x {shared} heads x {dim})"
    return Anatomy(
        name=config.name,
        family=config.family,
        dtype=config.dtype(),
        hidden=hidden,
        wide=max(linear.in_features for _, linear in linear_modules(blocks)),
        queries=heads * dim,
        keys=shared * dim,
        head_dim=dim,
        vocabulary=vocabulary,
        blocks=len(blocks),
        weights=tuple(weights),
        caches=tuple(Cache(2 * shared * dim, words, window) for window in config.windows()),
        embedding=embedding,
        head=head,
        tied=f"{head}.weight" not in {weight.name for weight in weights},
        context=config.optional("max_position_embeddings"),
        rope_factors=config.rope_factors(),
        notes=(*config.notes, f"{config.family} was built by transformers; its cache is taken as that of plain heads"),
    )
