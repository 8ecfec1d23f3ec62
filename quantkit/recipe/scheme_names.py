"""The names that the field gives to schemes, and what each says in quantkit's keys.

``W4A16`` and ``FP8_DYNAMIC`` are llm-compressor's and vLLM's, ``Q8_0`` is GGML's, ``int4wo`` torchao's, ``bnb-4bit`` is
what people call the files of bitsandbytes; ``int4 g64 asym`` is how reports of quantkit call it themselves.
"""

from __future__ import annotations

import re
from typing import Any

from quantkit.errors import SchemeError, did_you_mean
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.schemes import INTEGER_BITS, PER_CHANNEL, SCHEMES
from quantkit.schemes.kinds import all_kinds
from quantkit.system.names import chosen, folded

BLOCK = 32
_PLAIN = ("float16", "bfloat16")
_ROUNDED: dict[str, Any] = {
    "scheme": "int", "bits": 8, "group_size": PER_CHANNEL, "symmetric": True, "activations": "dynamic",
}  # fmt: skip
_FP8_ROUNDED = {"scheme": "fp8", "activations": "dynamic"}
_STATIC: dict[str, Any] = {"activations": "static"}
_W4AFP8: dict[str, Any] = {"scheme": "int", "bits": 4, "group_size": 128, "symmetric": True, "activations": "fp8"}
_BNB: dict[str, Any] = {"format": "bitsandbytes", "method": "rtn"}
_FP8 = {"scheme": "fp8"}
_MEANINGS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    (_FP8, ("float8", "fp8 e4m3", "fp8 e4m3fn", "e4m3", "e4m3fn", "float8 e4m3", "float8 e4m3fn", "fp8 a16")),
    (_FP8, ("fp8 w8a16", "w8a16 fp8", "float8 weight only", "float8wo")),
    (_FP8_ROUNDED, ("fp8 dynamic", "fp8 w8a8", "w8a8 fp8", "float8 dynamic", "float8dq", "fp8 a8")),
    (_FP8_ROUNDED, ("float8 dynamic activation float8 weight",)),
    *(
        ({**_FP8, "granularity": shape}, (f"fp8 {shape}", f"fp8 per {shape}", f"fp8 {shape}wise", f"{shape}wise fp8"))
        for shape in ("tensor", "channel", "block")
    ),
    ({**_FP8, "granularity": "block"}, ("fp8 128x128", "deepseek fp8")),
    *(
        ({**_FP8_ROUNDED, "granularity": shape}, (f"fp8 {shape} a8", f"fp8 {shape} dynamic"))
        for shape in ("tensor", "channel", "block")
    ),
    *(
        ({**_FP8, **_STATIC, "granularity": shape}, (f"fp8 {shape} a8 static", f"fp8 {shape} static"))
        for shape in ("tensor", "channel")
    ),
    ({**_FP8, **_STATIC, "granularity": "tensor"}, ("fp8 static", "float8 static", "fp8 w8a8 static")),
    (_ROUNDED, ("int8 dynamic", "int8dq", "int8 dynamic activation int8 weight")),
    ({**_ROUNDED, **_STATIC}, ("int8 static", "w8a8 static")),
    (_W4AFP8, ("w4afp8", "w4a8 fp8", "fp8 w4a8", "int4 fp8")),
    ({"scheme": "nvfp4"}, ("nvfp4 a16", "w4a16 nvfp4")),
    ({"scheme": "nvfp4", **_STATIC}, ("nvfp4 a4", "nvfp4 w4a4", "w4a4 nvfp4")),
    ({"scheme": "mxfp4"}, ("mxfp4 a16", "w4a16 mxfp4")),
    ({"scheme": "mxfp4", "activations": "dynamic"}, ("mxfp4 a4", "mxfp4 w4a4", "w4a4 mxfp4")),
    ({"scheme": "mxfp4", "activations": "fp8"}, ("mxfp4 a8", "mxfp4 w4a8", "w4a8 mxfp4", "mxfp4xfp8")),
    ({"scheme": "nf4"}, ("normal float 4", "4bit nf4", "nf4 4bit")),
    *(
        ({"scheme": kind, "double_quant": True}, (f"{kind} dq", f"{kind} double quant", f"{kind} nested"))
        for kind in ("nf4", "fp4")
    ),
    ({"scheme": "nf4", **_BNB}, ("bnb 4bit", "bitsandbytes 4bit", "bnb nf4", "load in 4bit", "qlora")),
    ({"scheme": "fp4", **_BNB}, ("bnb fp4",)),
    ({**_ROUNDED, **_BNB}, ("bnb 8bit", "bitsandbytes 8bit", "bnb int8", "llm int8", "load in 8bit")),
    *(
        ({"scheme": "int", "bits": bits, "group_size": BLOCK, "symmetric": True, "format": "gguf"}, (f"q{bits} 0",))
        for bits in (4, 5, 8)
    ),
    *(
        ({"scheme": "int", "bits": bits, "group_size": BLOCK, "symmetric": False, "zeros": "float", "format": "gguf"},
         (f"q{bits} 1",))
        for bits in (4, 5)
    ),
    *(({"scheme": "int", "bits": bits}, (f"i{bits}", f"s{bits}")) for bits in (4, 8)),
    *(({"scheme": "int", "bits": bits, "symmetric": False}, (f"u{bits}",)) for bits in (4, 8)),
)  # fmt: skip
_ACTIVATIONS = {"a8": "dynamic", "a8static": "static", "afp8": "fp8"}
"""What is written behind a scheme of integers, and the key that it stands for."""
NAMED = {folded(name): keys for keys, names in _MEANINGS for name in names}
"""The keys of a variant by a name of the field."""
_INTEGER = re.compile(
    r"(?:w(?P<weights>{width})a(?P<inputs>{width})|a(?P<inputs2>{width})w(?P<weights2>{width})"
    r"|(?P<sign>u?)int(?P<int>{width})|(?P<bits>{width})(?:bits?)?)"
    r"(?P<rest>(?:g\d+|group(?:size)?\d+|perchannel|channelwise|channel|sym|asym|wo|weightonly|int\d|\d+g|a8static|a8|afp8|descact"
    r"|floatzeros|axis0)*)".replace("{width}", r"32|16|\d")
)
_TAIL = re.compile(
    r"int\d|(?:g(?:roup(?:size)?)?(?=\d)|(?=\d+g))(\d+)g?|(perchannel|channelwise|channel)|(asym)|(sym)|(a8static|a8|afp8)|(descact)"
    r"|(floatzeros)|(axis0)"
)
_OWNERS = "gptq|awq|hqq|rtn|gguf"
_OWNED = re.compile(
    rf"(?:mostly)?(?:(?P<before>{_OWNERS})(?=.))?(?P<rest>.+?)(?:config)?(?:(?<=.)(?P<behind>{_OWNERS}))?"
)
"""A method or format before or behind a scheme (``gptq-int4``, ``INT4_AWQ``); what GGUF heads and torchao add."""
PRESETS = {"q2k": "q2_k_mix", "q6k": "q6_k_mix"}
"""llama.cpp's presets of which one type of block has the name too."""
_OTHERS = {
    r"(gptq|awq)?marlin.*": "it is a kernel of vLLM, which it takes for files of the formats gptq and awq by itself",
    r".*kv(cache)?\d*(fp8|int8)?": "in what the KV cache is stored is no scheme: write kv_cache: fp8 beside one",
    r"(i?q\d[a-z0-9]*|tq\d[a-z0-9]*|ud.*)": "llama.cpp has such a type or mixture, and quantkit does not make it",
    r"(mxfp[68].*|mxint.*|fp6.*|float6.*|int16|uint16)": "quantkit has no such numbers",
    r".*e5m2.*": "quantkit's 8-bit floats are E4M3",
    r"(f32|fp32|float32|full)": "quantkit writes floats of 16 bits",
}
"""What is known and cannot be done, each with the reason."""


def scheme_named(name: str) -> dict[str, Any]:
    """The keys of a variant that a name of a scheme stands for: ``scheme``, and what else the name says.

    Args:
        name: a kind of scheme, or a name of the field, in any case: ``Q4_K_M``, ``w4a16``, ``int8``, ``bnb-4bit``.

    Returns:
        ``scheme``, further keys of it such as ``bits``, and where the name is of one method or format alone, these.

    Raises:
        SchemeError: quantkit does not know it, or knows it and cannot do it.
    """
    elsewhere = _elsewhere(name)
    found = _meaning(name, folded(name))
    owned = _OWNED.fullmatch(folded(name))
    if found is None and owned and not elsewhere:
        owner = owned["before"] or owned["behind"]
        found = _meaning(name, owned["rest"])
        if found is not None and owner:
            found |= {"format" if owner == "gguf" else "method": owner}
    if found is not None:
        return found
    for pattern, why in _OTHERS.items():
        if re.fullmatch(pattern, folded(name)):
            raise SchemeError(f"scheme '{name}': {why}", elsewhere or _near(name))
    raise SchemeError(f"unknown scheme '{name}'", elsewhere or _near(name))


def preset_named(name: str) -> str:
    """What a variant as a whole means by a name that a type of block and a preset of llama.cpp share: the preset."""
    return PRESETS.get(folded(name).removeprefix("gguf").removesuffix("gguf"), name)


def _meaning(name: str, wanted: str) -> dict[str, Any] | None:
    """What a folded name says by itself; None where it says nothing that quantkit knows."""
    if (kind := chosen(wanted, SCHEMES.names())) is not None or (kind := chosen(wanted, _PLAIN)) is not None:
        return {"scheme": kind}
    if wanted in NAMED:
        return dict(NAMED[wanted])
    found = _INTEGER.fullmatch(wanted)
    return None if found is None else _integers(name, found)


def _integers(name: str, found: re.Match[str]) -> dict[str, Any]:
    parts = found.groupdict()
    bits = int(parts["weights"] or parts["weights2"] or parts["int"] or parts["bits"])
    inputs = int(parts["inputs"] or parts["inputs2"] or 16)
    if parts["bits"] == "16":
        raise SchemeError(f"scheme '{name}' may be either of two", "write float16 or bfloat16")
    if bits not in INTEGER_BITS:
        raise SchemeError(f"scheme '{name}': quantkit has no integers of {bits} bits", "it has 1 to 8")
    keys: dict[str, Any] = {"scheme": "int", "bits": bits, **({"symmetric": False} if parts["sign"] else {})}
    for group, channel, asym, sym, rounded, ordered, zeros, axis in _TAIL.findall(parts["rest"] or ""):
        keys |= {"group_size": int(group)} if group else {}
        keys |= {"group_size": PER_CHANNEL} if channel else {}
        keys |= {"symmetric": False} if asym else {}
        keys |= {"symmetric": True} if sym else {}
        keys |= {"desc_act": True} if ordered else {}
        keys |= {"zeros": "float"} if zeros else {}
        keys |= {"axis": 0} if axis else {}
        inputs = 8 if rounded else inputs
        keys |= {"activations": _ACTIVATIONS[rounded]} if rounded else {}
    if inputs >= 16:
        return keys
    if inputs != 8 or keys.get("symmetric") is False:
        raise SchemeError(
            f"scheme '{name}': quantkit has no {inputs}-bit activations beside such {bits}-bit weights",
            f"write W{bits}A16 for weights alone, W8A8, W4A8 or FP8_DYNAMIC for both, or nvfp4_a4 for 4 bits of both",
        )
    whole = {"group_size": PER_CHANNEL} if bits == 8 else {}
    return {**whole, "symmetric": True, "activations": "dynamic", **keys}


def _near(name: str) -> str:
    return f"{did_you_mean(name, all_kinds())}; or names such as W4A16, W8A8, FP8_DYNAMIC, int8, Q8_0 and bnb-4bit"


def _elsewhere(name: str) -> str:
    """That a name is one of another part of a variant; empty where it is none."""
    there = [registry.kind for registry in (METHODS, FORMATS) if name in registry]
    return f"it is a {' and a '.join(there)}: write {there[0]}: {name}" if there else ""
