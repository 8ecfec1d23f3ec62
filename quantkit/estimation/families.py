"""The tensors of the families that are described here, by arithmetic on their configs.

Names and shapes are those of transformers, but for experts: where transformers stacks the matrices of all experts into
one tensor, each is a linear layer here, as in the files that are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quantkit.estimation.anatomy import Anatomy, Cache, Kind, Weight
from quantkit.estimation.configs import Config

GEMMAS = ("gemma2", "gemma3_text")
EXPERTS = {"mixtral": ("w1", "w3", "w2")}
"""What files call the three matrices of an expert, where not gate, up and down."""


@dataclass(slots=True)
class _Block:
    """Collects the parameters of a block."""

    prefix: str
    index: int
    weights: list[Weight] = field(default_factory=list)

    def add(self, name: str, *shape: int, kind: Kind = "other") -> None:
        self.weights.append(Weight(f"{self.prefix}.{self.index}.{name}", shape, kind, self.index))

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        self.add(f"{name}.weight", rows, columns, kind="linear")
        if bias:
            self.add(f"{name}.bias", rows)

    def mlp(self, place: str, hidden: int, wide: int, *, bias: bool = False) -> None:
        for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            self.linear(f"{place}.{name}_proj", rows, columns, bias=bias)


def describe(config: Config) -> Anatomy | None:
    """The anatomy of a model of a family that is described here, else None.

    Raises:
        SourceError: the config lacks what is needed.
    """
    return FAMILIES[config.family](config) if config.family in FAMILIES else None


def _anatomy(config: Config, blocks: list[_Block], caches: list[Cache], wide: int, *, prefix: str = "model") -> Anatomy:
    """A model around its blocks: embedding, last norm and head."""
    hidden, vocabulary, heads = (config.whole(key) for key in ("hidden_size", "vocab_size", "num_attention_heads"))
    neox = prefix == "gpt_neox"
    embedding, norm = f"{prefix}.{'embed_in' if neox else 'embed_tokens'}", "final_layer_norm" if neox else "norm"
    tied = config.flag("tie_word_embeddings")
    inside = [weight for block in blocks for weight in block.weights]
    outside = [Weight(f"{prefix}.{norm}.{leaf}", (hidden,), "other") for leaf in ("weight", "bias")[: 2 if neox else 1]]
    head = [] if tied else [Weight("lm_head.weight", (vocabulary, hidden), "linear")]
    return Anatomy(
        name=config.name,
        family=config.family,
        dtype=config.dtype(),
        hidden=hidden,
        wide=wide,
        queries=heads * config.head_dim(),
        keys=config.whole("num_key_value_heads", heads) * config.head_dim(),
        head_dim=config.head_dim(),
        vocabulary=vocabulary,
        blocks=len(blocks),
        weights=(Weight(f"{embedding}.weight", (vocabulary, hidden), "embedding"), *inside, *outside, *head),
        caches=tuple(caches),
        embedding=embedding,
        head="lm_head",
        tied=tied,
        context=config.optional("max_position_embeddings"),
        rope_factors=config.rope_factors(),
        notes=config.notes,
    )


def _blocks(config: Config, prefix: str = "model") -> Iterator[_Block]:
    for index in range(config.whole("num_hidden_layers")):
        yield _Block(f"{prefix}.layers", index)


def _caches(config: Config) -> list[Cache]:
    heads = config.whole("num_key_value_heads", config.whole("num_attention_heads"))
    dim = config.head_dim()
    words = f"(2 x {heads} heads x {dim})"
    return [Cache(2 * heads * dim, words, window) for window in config.windows()]


def _attention(block: _Block, config: Config) -> None:
    """Queries, keys, values and output, with the biases and norms of the family."""
    hidden, heads, dim = config.whole("hidden_size"), config.whole("num_attention_heads"), config.head_dim()
    shared = config.whole("num_key_value_heads", heads)
    everywhere = config.flag("attention_bias")
    inputs = everywhere or config.family == "qwen2"
    for name, count in (("q", heads), ("k", shared), ("v", shared)):
        block.linear(f"self_attn.{name}_proj", count * dim, hidden, bias=inputs)
    block.linear("self_attn.o_proj", hidden, heads * dim, bias=everywhere)
    if config.family in ("qwen3", "qwen3_moe", "gemma3_text"):
        block.add("self_attn.q_norm.weight", dim)
        block.add("self_attn.k_norm.weight", dim)


def _norms(block: _Block, config: Config) -> None:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.family in GEMMAS:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        block.add(f"{name}.weight", config.whole("hidden_size"))


def _dense(config: Config) -> Anatomy:
    """Llama and all that are built like it."""
    hidden, wide, blocks = config.whole("hidden_size"), config.whole("intermediate_size"), []
    for block in _blocks(config):
        _attention(block, config)
        block.mlp("mlp", hidden, wide, bias=config.flag("mlp_bias"))
        _norms(block, config)
        blocks.append(block)
    return _anatomy(config, blocks, _caches(config), wide)


def _phi3(config: Config) -> Anatomy:
    """Queries, keys and values in one matrix, gate and up in another."""
    hidden, wide, heads = (config.whole(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    dim, shared, blocks = config.head_dim(), config.whole("num_key_value_heads", heads), []
    for block in _blocks(config):
        block.linear("self_attn.o_proj", hidden, heads * dim)
        block.linear("self_attn.qkv_proj", (heads + 2 * shared) * dim, hidden)
        block.linear("mlp.gate_up_proj", 2 * wide, hidden)
        block.linear("mlp.down_proj", hidden, wide)
        _norms(block, config)
        blocks.append(block)
    return _anatomy(config, blocks, _caches(config), wide)


def _gpt_neox(config: Config) -> Anatomy:
    """Layer norms and biases everywhere, and two matrices to an MLP."""
    hidden, wide, blocks = config.whole("hidden_size"), config.whole("intermediate_size"), []
    bias = config.flag("attention_bias", default=True)
    for block in _blocks(config, "gpt_neox"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block.add(f"{norm}.weight", hidden)
            block.add(f"{norm}.bias", hidden)
        block.linear("attention.query_key_value", 3 * hidden, hidden, bias=bias)
        block.linear("attention.dense", hidden, hidden, bias=bias)
        block.linear("mlp.dense_h_to_4h", wide, hidden, bias=True)
        block.linear("mlp.dense_4h_to_h", hidden, wide, bias=True)
        blocks.append(block)
    return _anatomy(config, blocks, _caches(config), wide, prefix="gpt_neox")


def _experts(block: _Block, config: Config, place: str, count: int, wide: int) -> None:
    """A router and its experts."""
    hidden = config.whole("hidden_size")
    gate, up, down = EXPERTS.get(config.family, ("gate_proj", "up_proj", "down_proj"))
    block.add(f"{place}.gate.weight", count, hidden)
    for expert in range(count):
        for name, rows, columns in ((gate, wide, hidden), (up, wide, hidden), (down, hidden, wide)):
            block.linear(f"{place}.experts.{expert}.{name}", rows, columns)


def _mixtral(config: Config) -> Anatomy:
    wide, blocks = config.whole("intermediate_size"), []
    for block in _blocks(config):
        _attention(block, config)
        _experts(block, config, "block_sparse_moe", config.whole("num_local_experts"), wide)
        _norms(block, config)
        blocks.append(block)
    return _anatomy(config, blocks, _caches(config), wide * config.whole("num_experts_per_tok"))


def _qwen3_moe(config: Config) -> Anatomy:
    hidden, wide, blocks = config.whole("hidden_size"), config.whole("moe_intermediate_size"), []
    dense = config.get("mlp_only_layers", ())
    for block in _blocks(config):
        _attention(block, config)
        if block.index in dense or (block.index + 1) % config.whole("decoder_sparse_step"):
            block.mlp("mlp", hidden, config.whole("intermediate_size"))
        else:
            _experts(block, config, "mlp", config.whole("num_local_experts", config.whole("num_experts")), wide)
        _norms(block, config)
        blocks.append(block)
    return _anatomy(config, blocks, _caches(config), wide * config.whole("num_experts_per_tok"))


def _deepseek(config: Config) -> Anatomy:
    """Multi-head latent attention, and experts beside shared ones."""
    hidden, wide, dense = (config.whole(key) for key in ("hidden_size", "moe_intermediate_size", "intermediate_size"))
    shared, blocks = int(config.get("n_shared_experts", 0)), []
    for block in _blocks(config):
        _latent_attention(block, config)
        if block.index < int(config.get("first_k_dense_replace", 0)) or block.index % config.whole("moe_layer_freq"):
            block.mlp("mlp", hidden, dense)
        else:
            _experts(block, config, "mlp", config.whole("n_routed_experts"), wide)
            if config.family == "deepseek_v3":
                block.add("mlp.gate.e_score_correction_bias", config.whole("n_routed_experts"))
            if shared:
                block.mlp("mlp.shared_experts", hidden, shared * wide)
        _norms(block, config)
        blocks.append(block)
    latent, rope = config.whole("kv_lora_rank"), config.whole("qk_rope_head_dim")
    cache = Cache(latent + rope, f"({latent} latent + {rope} rope)")
    active = wide * (config.whole("num_experts_per_tok") + shared)
    return _anatomy(config, blocks, [cache] * len(blocks), max(dense, active))


def _latent_attention(block: _Block, config: Config) -> None:
    hidden, heads, latent = (config.whole(key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    rope, plain, value = (config.whole(key) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    bias, rank = config.flag("attention_bias"), config.optional("q_lora_rank")
    if rank is None:
        block.linear("self_attn.q_proj", heads * (plain + rope), hidden)
    else:
        block.linear("self_attn.q_a_proj", rank, hidden, bias=bias)
        block.add("self_attn.q_a_layernorm.weight", rank)
        block.linear("self_attn.q_b_proj", heads * (plain + rope), rank)
    block.linear("self_attn.kv_a_proj_with_mqa", latent + rope, hidden, bias=bias)
    block.add("self_attn.kv_a_layernorm.weight", latent)
    block.linear("self_attn.kv_b_proj", heads * (plain + value), latent)
    block.linear("self_attn.o_proj", hidden, heads * value, bias=bias)


FAMILIES: dict[str, Callable[[Config], Anatomy]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _dense),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen3_moe": _qwen3_moe,
}
