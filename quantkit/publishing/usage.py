"""How to load an exported checkpoint in transformers, vLLM and llama.cpp, or that they do not."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass

from quantkit.formats.base import Format
from quantkit.publishing.markdown import code, fenced, quoted
from quantkit.runtimes.vllm import Vllm
from quantkit.schemes import Scheme

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
        loads: the class of transformers that loads it.
        split: the tensor-parallel sizes at which its groups divide, in words; None where nobody splits it.
        newer: what releases before transformers 5 misread of its files.
        turned: whether runtimes have to turn the inputs of layers.
        remote_code: whether it was made with Python code of its own, which loaders must be told to trust.
    """

    name: str
    store: type[Format]
    schemes: Collection[Scheme]
    dtype: str
    embedding: bool
    gguf: str | None
    loads: str = "AutoModelForCausalLM"
    split: str | None = None
    newer: tuple[str, ...] = ()
    remote_code: bool = False
    turned: bool = False


def usage(subject: Subject) -> str:
    """A section for each of the three."""
    sections = {"transformers": _transformers, "vLLM": _vllm, "llama.cpp": _llama_cpp}
    return "\n\n".join(f"### {name}\n\n{write(subject)}" for name, write in sections.items())


def _transformers(subject: Subject) -> str:
    runtime = next((name for name in subject.store.runtimes if name.startswith("transformers")), None)
    if runtime is None:
        return f"transformers does not compute from {subject.store.name} files."
    refusal = subject.store.turn_refusal("transformers") if subject.turned else None
    if refusal is not None:
        return refusal
    if not subject.store.computes_in(subject.schemes):
        return f"transformers does not load {subject.store.name} files with these schemes."
    newest = "transformers>=5" if subject.newer else "transformers"
    packages = [f"transformers<{int(old) + 1}" if (old := runtime.partition(" ")[2]) else newest]
    packages += subject.store.packages("transformers", subject.schemes)
    install = f"pip install {' '.join(shlex.quote(name) for name in packages)}"
    dtype = _dtype(subject)
    trusted = ", trust_remote_code=True" if subject.remote_code else ""
    lines = [
        *(["import torch"] if dtype.startswith("torch.") else []),
        f"from transformers import {subject.loads}, AutoTokenizer",
        "",
        f"name = {quoted(subject.name)}",
        f"tokenizer = AutoTokenizer.from_pretrained(name{trusted})",
        f"model = {subject.loads}.from_pretrained(name, dtype={dtype}{trusted})",
        'ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))",
    ]
    return f"{fenced(install, 'sh')}\n\n{fenced(chr(10).join(lines), 'python')}{_newer(subject)}"


def _newer(subject: Subject) -> str:
    """What older releases misread, where older keys do not say it as well."""
    if not subject.newer:
        return ""
    what = "; ".join(subject.newer)
    return f"\n\nTransformers 5 is needed, here and in servers: releases before it misread {what}."


def _dtype(subject: Subject) -> str:
    """What ``from_pretrained`` must be told to compute in."""
    able = subject.store.computes_in(subject.schemes)
    return '"auto"' if subject.dtype in able else f"torch.{able[-1]}"


def _vllm(subject: Subject) -> str:
    refusal = Vllm.refusal(subject.store, subject.schemes, embedding=subject.embedding)
    if refusal is not None:
        return refusal
    packages = " ".join(["vllm", *map(shlex.quote, subject.store.packages(Vllm.name, subject.schemes))])
    commands = f"pip install {packages}\nvllm serve {shlex.quote(subject.name)}"
    commands += " --trust-remote-code" if subject.remote_code else ""
    untested = subject.store.untested.get(Vllm.name)
    split = f"Groups of weights divide at these tensor-parallel sizes: {subject.split}." if subject.split else ""
    return "\n\n".join([fenced(commands, "sh"), *(text for text in (untested, split, _newer(subject).strip()) if text)])


def _llama_cpp(subject: Subject) -> str:
    if subject.gguf is None:
        return f"llama.cpp does not load {subject.store.name} files. {CONVERT}"
    file = shlex.quote(subject.gguf)
    commands = f"llama-server -m {file}\nollama create my-model -f Modelfile"
    return f"In the folder of {code(subject.gguf)}:\n\n{fenced(commands, 'sh')}"
