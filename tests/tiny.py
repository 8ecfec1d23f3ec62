"""Tiny real models on disk, so that tests run the real pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import LayerResult, Tuned, VariantTask
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.methods import METHODS
from quantkit.methods.base import Method
from quantkit.recipe.steps import steps_of
from quantkit.schemes import PER_CHANNEL, IntScheme, Scheme
from quantkit.transforms.base import Transform

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = len(SPECIAL) + 256
BITS = (2, 3, 4, 8)
"""The widths of integer codes that servers load."""
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gpt_neox": GPTNeoXConfig,
}


def int_schemes(group_size: int) -> list[IntScheme]:
    """Every width that servers load, grouped and per channel, symmetric and not."""
    return [
        IntScheme(bits, size, symmetric)
        for bits in BITS
        for size in (group_size, PER_CHANNEL)
        for symmetric in (True, False)
    ]


def spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, groups]`` to ``[columns, rows]``: the value of each weight, transposed."""
    return values.T.repeat_interleave(columns // values.shape[1], dim=0)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text, one token a byte, five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat_template is not None:
        wrapped.chat_template = chat_template
    return wrapped


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """The same, which begins every text with BOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def tiny_config(family: str = "llama", **changes: Any) -> PreTrainedConfig:
    """A config of ``family`` with hidden size 64, two blocks, four heads."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt_neox":
        shape |= {"num_key_value_heads": 2, "head_dim": 16}
    return FAMILIES[family](**(shape | changes))


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a random model of ``family`` with its tokenizer to ``folder``, in ``shards`` or more files."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    model = model.to(dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=f"{max(1, size // shards // 1000)}KB" if shards > 1 else "5GB")
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def tiny_rows(count: int = 6, shortest: int = 24, longest: int = 48, seed: int = 0) -> list[list[int]]:
    """Rows of random tokens, the first as long as any may be."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [
        torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=draw).tolist()
        for length in [longest, *lengths[1:]]
    ]


class Forgetful:
    """A sink that keeps nothing, as one that writes to disk."""

    def take(self, result: LayerResult) -> None:
        pass

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        pass

    def tuned(self, prefix: str, done: Tuned) -> None:
        pass

    def segment_done(self, prefix: str) -> None:
        pass


@dataclass
class Collected:
    """A sink that keeps all that it is given."""

    results: dict[str, LayerResult] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    segments: list[str] = field(default_factory=list)
    tunings: dict[str, Tuned] = field(default_factory=dict)

    def take(self, result: LayerResult) -> None:
        assert result.name not in self.results
        self.results[result.name] = result

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        self.replaced[name] = tensor

    def tuned(self, prefix: str, done: Tuned) -> None:
        assert prefix not in self.segments
        self.tunings[prefix] = done

    def segment_done(self, prefix: str) -> None:
        self.segments.append(prefix)


def tiny_method(name: str = "gptq", **options: Any) -> Method:
    """A method by name, with options."""
    chosen = METHODS.get(name)
    return chosen(chosen.Options(**options))


class TinySteps(NamedTuple):
    """A method, and the transforms that come before it."""

    method: Method
    transforms: tuple[Transform, ...]


def tiny_steps(name: str = "gptq", **options: Any) -> TinySteps:
    """What the name of a method stands for in a recipe, with options; its short form too."""
    steps = steps_of(name)
    given = steps.Options(**options)
    return TinySteps(steps.build_method(given), steps.build_transforms(given))


def tiny_task(
    skeleton: Skeleton,
    method: Method | TinySteps,
    scheme: Scheme | None = None,
    *,
    head: bool = False,
    name: str = "variant",
) -> tuple[VariantTask, Collected]:
    """A task for all Linear layers, the head only if asked for, and what will hold its results."""
    blocks = [linear for segment in skeleton.segments for linear in segment.linears]
    wanted = [*blocks, *(skeleton.head.linears if head and skeleton.head else [])]
    sink = Collected()
    schemes = dict.fromkeys(wanted, scheme or IntScheme(4, 32, True))
    steps = method if isinstance(method, TinySteps) else TinySteps(method, ())
    return VariantTask(name, steps.method, schemes, torch.float16, sink, transforms=steps.transforms), sink


def walk(
    folder: Path, rows: Sequence[Sequence[int]], method: Method | TinySteps, *, head: bool = False, **settings: Any
) -> Collected:
    """Solve one variant of a model on the CPU."""
    skeleton = Skeleton(folder)
    task, sink = tiny_task(skeleton, method, head=head)
    cpu = torch.device("cpu")
    batches = make_batches(rows, cpu, may_pad=True)
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(cpu, **settings)).run()
    return sink
