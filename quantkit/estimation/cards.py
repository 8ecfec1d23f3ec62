"""Cards that people have, and ways of quantizing a model in the order of the quality to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card.

    Attributes:
        name: of the card.
        mebibytes: of memory, about what its driver reports.
    """

    name: str
    mebibytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.mebibytes * 2**20


CARDS = (
    Card("RTX 4060 8 GB", 8188),
    Card("RTX 3060 12 GB", 12288),
    Card("RTX 4070 12 GB", 12282),
    Card("RTX 4060 Ti 16 GB", 16380),
    Card("RTX 3090 24 GB", 24576),
    Card("RTX 4090 24 GB", 24564),
    Card("A100 40 GB", 40960),
    Card("L40S 48 GB", 46068),
    Card("A100 80 GB", 81920),
    Card("H100 80 GB", 81559),
)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of quantizing.

    Attributes:
        method: name of the method.
        format: name of the format.
        keys: of the scheme.
    """

    method: str
    format: str
    keys: Mapping[str, Any]


def _int(bits: int, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


WAYS = (
    Way("none", "float", {"scheme": "bfloat16"}),
    Way("gptq", "compressed-tensors", _int(8, -1)),
    Way("llama.cpp", "gguf", {"scheme": "q6_k_mix"}),
    Way("llama.cpp", "gguf", {"scheme": "q5_k_m"}),
    Way("llama.cpp", "gguf", {"scheme": "q4_k_m"}),
    Way("gptq", "compressed-tensors", _int(4, 32)),
    Way("gptq", "compressed-tensors", _int(4, 128)),
    Way("awq", "awq", _int(4, 128, symmetric=False)),
    Way("rtn", "bitsandbytes", {"scheme": "nf4"}),
    Way("llama.cpp", "gguf", {"scheme": "q3_k_m"}),
    Way("gptq", "gptq", _int(3, 128)),
    Way("llama.cpp", "gguf", {"scheme": "q2_k_mix"}),
    Way("gptq", "gptq", _int(2, 32)),
)
"""By expected quality, the best first: more bits lose less, and of equal bits smaller groups and methods that look at
calibration texts do. What a model really loses is in its report, not here."""
GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The families that quantkit writes as GGUF."""
