"""How to load an exported checkpoint in transformers, vLLM and llama.cpp, or that they do not."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass

from quantkit.formats.base import Format
from quantkit.publishing.markdown import code, fenced, quoted
from quantkit.schemes import IntScheme, Scheme

VLLM_GROUPS = (-1, 32, 64, 128)
CONVERT = "`quantkit convert` writes it as GGUF with the same codes, where a type of GGML has their grid."


@dataclass(frozen=True, slots=True)
class Subject:
    """What is loaded.

    Attributes:
        name: repository or folder.
        store: its format.
        schemes: of its layers.
        dtype: of its float tensors.
        embedding: whether its input embedding is quantized.
        gguf: name of the file, if it is one.
    """

    name: str
    store: type[Format]
    schemes: Collection[Scheme]
    dtype: str
    embedding: bool
    gguf: str | None


def usage(subject: Subject) -> str:
    """A section for each of the three."""
    sections = {"transformers": _transformers, "vLLM": _vllm, "llama.cpp": _llama_cpp}
    return "\n\n".join(f"### {name}\n\n{write(subject)}" for name, write in sections.items())


def _transformers(subject: Subject) -> str:
    runtime = next((name for name in subject.store.runtimes if name.startswith("transformers")), None)
    if runtime is None:
        return f"transformers does not compute from {subject.store.name} files."
    if not subject.store.computes_in(subject.schemes):
        return f"transformers does not load {subject.store.name} files with these schemes."
    packages = [f"transformers<{int(old) + 1}" if (old := runtime.partition(" ")[2]) else "transformers"]
    packages += [_pinned(name, subject.schemes) for name in subject.store.requires]
    install = f"pip install {' '.join(shlex.quote(name) for name in packages)}"
    dtype = _dtype(subject)
    lines = [
        *(["import torch"] if dtype.startswith("torch.") else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {quoted(subject.name)}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = AutoModelForCausalLM.from_pretrained(name, dtype={dtype})",
        'ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))",
    ]
    return f"{fenced(install, 'sh')}\n\n{fenced(chr(10).join(lines), 'python')}"


def _pinned(package: str, schemes: Collection[Scheme]) -> str:
    """compressed-tensors 0.18 to 0.20 fails on the zero points of asymmetric layers."""
    if package == "compressed-tensors" and not all(scheme.symmetric for scheme in schemes):
        return "compressed-tensors<0.18"
    return package


def _dtype(subject: Subject) -> str:
    """What ``from_pretrained`` must be told to compute in."""
    if subject.store.name == "hqq":
        return "torch.float32"
    able = subject.store.computes_in(subject.schemes)
    return '"auto"' if subject.dtype in able else f"torch.{able[-1]}"


def _vllm(subject: Subject) -> str:
    refusal = _vllm_refusal(subject)
    if refusal is not None:
        return refusal
    needs = " bitsandbytes" if subject.store.name == "bitsandbytes" else ""
    commands = f"pip install vllm{needs}\nvllm serve {shlex.quote(subject.name)}"
    note = "\n\nvLLM loads bitsandbytes on CUDA only; quantkit has not tested it." if needs else ""
    return fenced(commands, "sh") + note


def _vllm_refusal(subject: Subject) -> str | None:
    """Why vLLM does not load it; None where it does."""
    form, integers = subject.store.name, [scheme for scheme in subject.schemes if isinstance(scheme, IntScheme)]
    if "vllm" not in subject.store.runtimes:
        return f"vLLM does not load {form} files, or not so that quantkit would vouch for it."
    if subject.embedding:
        return "vLLM does not load a quantized input embedding."
    if any(scheme.bits not in (4, 8) for scheme in integers):
        return f"vLLM loads integers of 4 and 8 bits from {form} files, and this one has others."
    if form in ("gptq", "awq") and any(scheme.group_size not in VLLM_GROUPS for scheme in integers):
        return f"vLLM loads {form} files with groups of 32, 64 and 128 or one scale per channel, and this has others."
    if form == "gptq" and any(not scheme.symmetric or scheme.desc_act for scheme in integers):
        return "vLLM loads gptq files that are symmetric and without `desc_act`, and this one is not."
    return None


def _llama_cpp(subject: Subject) -> str:
    if subject.gguf is None:
        return f"llama.cpp does not load {subject.store.name} files. {CONVERT}"
    file = shlex.quote(subject.gguf)
    commands = f"llama-server -m {file}\nollama create my-model -f Modelfile"
    return f"In the folder of {code(subject.gguf)}:\n\n{fenced(commands, 'sh')}"
