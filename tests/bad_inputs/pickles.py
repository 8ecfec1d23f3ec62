"""Pickles, which run code when they are read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place


class _Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def model_of(place: Place, name: str) -> Path:
    """A model whose weights are a pickle that would make the canary."""
    folder = place.copy("single")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Touch(place.canary)))
    return folder


@case("convert them to safetensors")
def bin_to_quantize(place: Place) -> list[str]:
    return place.quantize(model_of(place, "pytorch_model.bin"))


@case("convert them to safetensors")
def pt_to_inspect(place: Place) -> list[str]:
    return ["inspect", str(model_of(place, "model.pt"))]


@case("convert them to safetensors")
def pth_to_quantize(place: Place) -> list[str]:
    return place.quantize(model_of(place, "consolidated.00.pth"))


@case("convert them to safetensors")
def ckpt_to_merge(place: Place) -> list[str]:
    return place.merge(place.sound("adapter"), str(model_of(place, "model.ckpt")), "--any-base")


@case("convert them to safetensors")
def bin_to_evaluate(place: Place) -> list[str]:
    return ["evaluate", str(model_of(place, "pytorch_model.bin")), "--context-length", "32", "--max-tokens", "64"]


@case("convert them to safetensors")
def bin_to_verify(place: Place) -> list[str]:
    return ["verify", str(model_of(place, "pytorch_model.bin")), "--device", "cpu"]


@case("which can run code when they are read")
def a_pickle_itself(place: Place) -> list[str]:
    return place.quantize(place.write("model.pt", pickle.dumps(_Touch(place.canary))))


@case("save_pretrained, which writes safetensors")
def an_adapter(place: Place) -> list[str]:
    folder = place.copy("adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Touch(place.canary)))
    return place.merge(folder)


@case("no valid safetensors")
def a_pickle_called_safetensors(place: Place) -> list[str]:
    folder = place.copy("single")
    content = pickle.dumps(_Touch(place.canary))
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    return place.quantize(folder)
