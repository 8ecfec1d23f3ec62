"""What a GGUF file's architecture is in transformers, and the other way round.

An architecture (:class:`Architecture`) is one entry of a table: the names on both sides, which key of the metadata is
which key of the config, what its graph in llama.cpp always computes, and how tensors lie. Names of tensors are those of
the package gguf. The entries are in :mod:`quantkit.gguf.dense`, :mod:`quantkit.gguf.mixtures` and
:mod:`quantkit.gguf.recurrent`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.errors import SourceError, did_you_mean
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.layouts import Heads, Layout, Pieces

HEADS, KEY_HEADS = "attention.head_count", "attention.head_count_kv"
COUNTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    HEADS: "num_attention_heads",
    KEY_HEADS: "num_key_value_heads",
}
"""Keys of the metadata that most architectures have, and what most configs call them."""
WINDOW = "attention.sliding_window"
PATTERN = "attention.sliding_window_pattern"
RMS_NORM, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
Rope = Literal["none", "one", "by layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        name: ``general.architecture``, with which its keys begin.
        model_type: what transformers calls it.
        also: further model types that are written as this one.
        borrowed: ``model_type`` is only what files are read as; models of that type are written otherwise.
        when: whether a file of this name is this one, where several architectures share the name.
        keys: of the metadata without the name, to the keys of the config.
        absent: what a file means that lacks the key of a config's value; any other key must be there.
        implied: values of the config that the graph always computes. A function is asked with the config, or with what
            is known of it.
        tells: flags of the config, to the tensor whose presence sets them.
        rope: whether positions are rotated: not, all alike, or by kind of layer.
        partial: whether a part of each head may be rotated alone.
        scalings: kinds of rope beside the default that the graph computes.
        untruncated: yarn's bounds are no whole frequencies in the model, and llama.cpp rounds them.
        pattern: of so many blocks the last one sees all tokens, and the others a window; 0 without windows.
        layouts: by the part of a tensor's name between block and suffix; ``_norm`` is any that ends so.
        renamed: parts of a checkpoint's names, to what the package gguf knows.
        pieces: by the end of a checkpoint's name how the tensor lies in several of the file.
        latent: heads are made of compressed keys and values, and the file does not tell their size as others do.
        needs_head: the graph loads an output head of its own.
        ignores_window: the graph has no sliding window, whatever the file says.
        describe: further metadata of a config.
        infer: further values of a config, from a file and those known so far.
        inferred: the keys of which ``infer`` makes them.
        settled: values of a config that stand for what it leaves open.
        refusal: why llama.cpp cannot compute a model.
        heads: of a config.
    """

    name: str
    model_type: str
    keys: Mapping[str, str]
    also: tuple[str, ...] = ()
    borrowed: bool = False
    when: Callable[[GGUFHead], bool] = lambda head: True
    absent: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    tells: Mapping[str, str] = field(default_factory=dict)
    rope: Rope = "one"
    partial: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    untruncated: bool = False
    pattern: int = 0
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    latent: bool = False
    needs_head: bool = False
    ignores_window: bool = False
    describe: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    infer: Callable[[GGUFHead, Mapping[str, Any]], dict[str, Any]] = lambda head, known: {}
    inferred: tuple[str, ...] = ()
    settled: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    refusal: Callable[[PreTrainedConfig], str | None] = lambda config: None
    heads: Callable[[PreTrainedConfig], Heads] = lambda config: usual_heads(config)

    def key(self, key: str) -> str:
        """What a config of this model type calls a value that most call ``key``."""
        return str(CONFIG_MAPPING[self.model_type].attribute_map.get(key, key))

    @property
    def model_class(self) -> str:
        """The model's class in transformers."""
        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        return found if isinstance(found, str) else found[0]


def usual_heads(config: PreTrainedConfig) -> Heads:
    """The heads that a config tells."""
    queries = config.num_attention_heads
    stated = config.num_key_value_heads if "num_key_value_heads" in declared(type(config)) else None
    return Heads(queries, stated or queries)


def declared(kind: type[PreTrainedConfig]) -> set[str]:
    """The values that a class of configs knows; a file may hold others, which nothing reads."""
    return {each.name for each in dataclasses.fields(kind)}


def head_size(config: PreTrainedConfig) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every architecture; of those that share a name in GGUF files the last one is meant where no other is."""
    from quantkit.gguf.dense import DENSE
    from quantkit.gguf.mixtures import MIXTURES
    from quantkit.gguf.recurrent import RECURRENT

    return (*MIXTURES, *DENSE, *RECURRENT)


@cache
def model_types() -> Mapping[str, Architecture]:
    """What transformers calls the models that can be written, to how they are written."""
    own = {each.model_type: each for each in architectures() if not each.borrowed}
    return {kind: each for each in architectures() for kind in each.also} | own


def architecture_of(head: GGUFHead) -> Architecture:
    """The architecture of a file.

    Raises:
        SourceError: quantkit cannot convert it.
    """
    for each in architectures():
        if each.name == head.architecture and each.when(head):
            return each
    known = sorted({each.name for each in architectures()})
    raise SourceError(
        f"{head.path} has the architecture '{head.architecture}', which quantkit cannot convert from GGUF",
        f"{did_you_mean(head.architecture, known)}; or {GIVE_FLOAT}",
    )


def architecture_for(model_type: str) -> Architecture:
    """The architecture as which a model is written.

    Raises:
        SourceError: quantkit cannot write it.
    """
    if model_type not in model_types():
        raise SourceError(
            f"quantkit cannot write a model of type '{model_type}' as GGUF",
            f"{did_you_mean(model_type, sorted(model_types()))}; or {OTHER_FORMAT}",
        )
    return model_types()[model_type]
