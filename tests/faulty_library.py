"""A library plugin that goes wrong in every way there is, and one that does its work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.libraries.base import CODES, Library, Offer, Request, Used

FOLDER = "compressed-tensors"
FAULTS: dict[str, tuple[str, Callable[[Request], Used]]] = {}
"""By the name of a method, what it says that it writes, and what it does."""
CALIBRATED = ("works", "drops_rows")
CHILD = "child.pid"
"""Beside the model: the number of a process that a worker left."""


def fault(writes: str = CODES) -> Callable[[Callable[[Request], Used]], Callable[[Request], Used]]:
    def kept(work: Callable[[Request], Used]) -> Callable[[Request], Used]:
        FAULTS[work.__name__] = (writes, work)
        return work

    return kept


@fault()
def works(request: Request) -> Used:
    """Round to nearest on the grid of the largest magnitude."""
    return rounded(request, projections(request.model))


@fault()
def quantizes_the_head(request: Request) -> Used:
    """Of a model whose head is its embedding."""
    from safetensors.numpy import load_file

    embedding = load_file(request.model / "model.safetensors")["model.embed_tokens.weight"]
    return rounded(replace(request, ignore=()), {**projections(request.model), "lm_head": embedding})


def rounded(request: Request, weights: dict[str, Any], widened: float = 1) -> Used:
    layers, half = {}, 1 << (request.bits - 1)
    for done, (name, weight) in enumerate(weights.items(), start=1):
        groups = weight.reshape(weight.shape[0], -1, request.group_size)
        scales = abs(groups).max(-1) / (half - 0.5) * widened
        codes = (groups / scales[..., None]).round().clip(-half, half - 1) + half
        layers[name] = {"codes": codes.reshape(weight.shape).astype("uint8"), "scales": scales}
        request.progress("layer", done, len(weights))
    save_codes(request, layers)
    return Used(len(request.tokens), sum(map(len, request.tokens)), ("a note of the library",))


@fault()
def rounds_badly(request: Request) -> Used:
    """On steps four times too wide."""
    return rounded(request, projections(request.model), widened=4)


@fault()
def litters(request: Request) -> Used:
    """Writes beside itself, as libraries do that keep a log."""
    Path("logs").mkdir()
    return works(request)


@fault()
def drops_rows(request: Request) -> Used:
    works(request)
    return Used(len(request.tokens) - 1, sum(map(len, request.tokens[1:])))


@fault()
def tells(request: Request) -> Used:
    """What a worker sees, in the message of an error."""
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    told = {"env": dict(os.environ), "path": sys.path, "modules": packages, "sid": os.getsid(0)}
    raise RuntimeError(json.dumps(told))


@fault()
def raises(request: Request) -> Used:
    raise ValueError("layer 3 has\na shape that nobody expected")


@fault()
def has_no_memory(request: Request) -> Used:
    raise MemoryError("you tried to allocate 99 GiB")


@fault()
def is_killed(request: Request) -> Used:
    print("about to go", flush=True)  # noqa: T201 - it is in the log that this is looked for
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@fault()
def crashes(request: Request) -> Used:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


@fault()
def leaves(request: Request) -> Used:
    os._exit(0)


@fault()
def allocates(request: Request) -> Used:
    held = []
    while True:
        held.append(b"x" * (32 << 20))
        time.sleep(0.01)


@fault()
def lets_children_allocate(request: Request) -> Used:
    code = "import time; held = b'x' * (300 << 20); time.sleep(600)"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    for child in children:
        child.wait()
    raise AssertionError


@fault()
def sleeps(request: Request) -> Used:
    time.sleep(3600)
    raise AssertionError


@fault()
def ignores_signals(request: Request) -> Used:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)
    raise AssertionError


@fault()
def leaves_a_child(request: Request) -> Used:
    """Of another session, with the worker's output open."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    (request.model / CHILD).write_text(str(child.pid))
    raise ValueError("and went")


@fault()
def prints(request: Request) -> Used:
    for number in range(400_000):
        sys.stdout.write(f"line {number} of what nobody wants to read, and so on and so forth, and more of it\n")
    raise ValueError("that was all")


@fault()
def writes_nothing(request: Request) -> Used:
    return Used()


@fault()
def gives_scales_of_another_shape(request: Request) -> Used:
    return spoiled(request, lambda parts: parts | {"scales": parts["scales"][:, :1].copy()})


@fault()
def gives_other_shapes(request: Request) -> Used:
    return spoiled(request, lambda parts: {name: part[:-1].copy() for name, part in parts.items()})


@fault()
def gives_nan(request: Request) -> Used:
    return spoiled(request, lambda parts: parts | {"scales": parts["scales"] * float("nan")})


@fault(FOLDER)
def writes_float(request: Request) -> Used:
    shutil.copytree(request.model, request.out, dirs_exist_ok=True)
    return Used()


@fault(FOLDER)
def writes_half(request: Request) -> Used:
    write_packed(request)
    whole = (request.out / "model.safetensors").read_bytes()
    (request.out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return Used()


@fault("gptq")
def writes_another_format(request: Request) -> Used:
    write_packed(request)
    return Used()


@fault(FOLDER)
def writes_packed(request: Request) -> Used:
    write_packed(request)
    return Used()


@fault(FOLDER)
def lacks_a_norm(request: Request) -> Used:
    write_packed(request, without="model.norm.weight")
    return Used()


class Faulty(Library):
    name = "faulty"
    summary = "goes wrong as it is asked to"
    distribution = "torch"
    requirements = ()
    offers = (
        *(
            Offer(method, (4, 8), writes, calibrated=method in CALIBRATED, options={"speed": 1.5, "fast": True})
            for method, (writes, _) in FAULTS.items()
        ),
        Offer("needs_cuda", (4,), CODES, devices=("cuda",)),
        Offer("only_scored", (2,), CODES, scores_only="its kernels need a compiler for CUDA"),
    )

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        return {"FAULTY_CORES": str(cores)}

    def quantize(self, request: Request) -> Used:
        return FAULTS[request.method][1](request)


def projections(model: Path) -> dict[str, Any]:
    """The weights of the linear layers, without the head, by layer."""
    from safetensors.numpy import load_file

    tensors = load_file(model / "model.safetensors")
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}


def save_codes(request: Request, layers: dict[str, dict[str, Any]]) -> None:
    """What ``write_codes`` does, without torch, whose import is most of a worker's time here."""
    from safetensors.numpy import save_file

    from quantkit.libraries._codes import CODES_FILE, SCHEMES_FILE

    kept = {name: parts for name, parts in layers.items() if not any(re.search(each, name) for each in request.ignore)}
    save_file(
        {f"{name}.{part}": array for name, parts in kept.items() for part, array in parts.items()},
        request.out / CODES_FILE,
    )
    scheme = {"scheme": "int", "bits": request.bits, "group_size": request.group_size, "symmetric": True}
    (request.out / SCHEMES_FILE).write_text(json.dumps(dict.fromkeys(kept, scheme)))


def spoiled(request: Request, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Used:
    """The codes of :func:`works`, those of the last layer changed."""
    from safetensors.numpy import load_file

    from quantkit.libraries._codes import CODES_FILE

    works(request)
    tensors = load_file(request.out / CODES_FILE)
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    last = sorted(layers)[-1]
    save_codes(request, layers | {last: change(layers[last])})
    return Used()


def write_packed(request: Request, without: str = "") -> None:
    """A checkpoint of compressed-tensors with 8-bit layers, as a library would write it."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(request.model, request.out, dirs_exist_ok=True)
    tensors = load_file(request.model / "model.safetensors")
    for layer, weight in projections(request.model).items():
        scales = abs(weight).max(1, keepdims=True) / 127
        tensors[f"{layer}.weight"] = (weight / scales).round().clip(-128, 127).astype("int8")
        tensors[f"{layer}.weight_scale"] = scales
    tensors.pop(without, None)
    save_file(tensors, request.out / "model.safetensors", metadata={"format": "pt"})
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"weights": arguments, "targets": ["Linear"], "input_activations": None, "output_activations": None}
    config = json.loads((request.out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "version": "0.20.0",
    }
    (request.out / "config.json").write_text(json.dumps(config))
