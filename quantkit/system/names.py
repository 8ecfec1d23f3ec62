"""Names as people type them: without regard to case, spaces, and of what joins words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_JOINTS = re.compile(r"[\s_.:\-]+")
WORDS = {
    "float16": ("fp16", "f16", "half", "torch.float16"),
    "bfloat16": ("bf16", "torch.bfloat16"),
    "float32": ("fp32", "f32", "full", "torch.float32"),
    "perplexity": ("ppl",),
    "kl_divergence": ("kl", "kld", "kl_div"),
    "top1_agreement": ("top1", "top_1", "agreement"),
    "memory": ("mem", "ram", "vram"),
    "speed": ("throughput", "tokens_per_second"),
    "size_bytes": ("size", "bytes", "file_size"),
    "bits_per_weight": ("bpw",),
    "exact_match": ("em",),
    "md": ("markdown",),
}
"""What else the field calls a choice that quantkit calls by one word."""


def folded(name: str) -> str:
    """A name without case and joints, by which names are compared."""
    return _JOINTS.sub("", name).casefold()


_MEANT = {folded(word): name for name, words in WORDS.items() for word in words}


def chosen(given: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that is meant, by its own name or another word for it; None where none is."""
    by_name = {folded(name): name for name in known}
    wanted = folded(given)
    return by_name.get(wanted) or by_name.get(folded(_MEANT.get(wanted, "")))


def spelled_device(name: str) -> str:
    """A device as torch calls it: ``GPU``, ``cuda0`` and ``gpu:0`` are CUDA's; what is none of these stays."""
    found = re.fullmatch(r"(auto|cpu|cuda|gpu)(?:(?<=a|u):?(\d+))?", name.strip().casefold())
    if found is None:
        return name
    kind = found[1].replace("gpu", "cuda")
    return kind if found[2] is None else f"{kind}:{found[2]}"
