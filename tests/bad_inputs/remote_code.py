"""Models that bring code, which nobody said may run."""

from __future__ import annotations

from pathlib import Path

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place, edit_json


def model_with_code(place: Place, name: str = "single") -> Path:
    """A model whose config names a class in a file beside it, which would make the canary."""
    folder = place.copy(name)
    (folder / "modeling_evil.py").write_text(f"open({str(place.canary)!r}, 'w').close()\nclass Evil: pass\n")
    mapping = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(folder / "config.json", auto_map=mapping, model_type="evil", architectures=["Evil"])
    return folder


@case("trust_remote_code")
def to_quantize(place: Place) -> list[str]:
    return place.quantize(model_with_code(place))


@case("trust_remote_code")
def to_run(place: Place) -> list[str]:
    folder = model_with_code(place)
    return ["run", place.recipe(lambda data: data["model"].update(source=str(folder)))]


@case("trust_remote_code")
def to_merge(place: Place) -> list[str]:
    return place.merge(place.sound("adapter"), str(model_with_code(place)), "--any-base")


@case("trust_remote_code")
def to_evaluate(place: Place) -> list[str]:
    return ["evaluate", str(model_with_code(place)), "--context-length", "32", "--max-tokens", "64"]


@case("trust_remote_code")
def to_evaluate_an_export(place: Place) -> list[str]:
    return ["evaluate", str(model_with_code(place, "export")), "--context-length", "32", "--max-tokens", "64"]


@case("trust_remote_code")
def to_verify(place: Place) -> list[str]:
    return ["verify", str(model_with_code(place, "export")), "--device", "cpu"]


@case("trust_remote_code")
def to_convert(place: Place) -> list[str]:
    return ["convert", str(model_with_code(place, "export")), "--to", "gptq", "-o", place.out]


@case("trust_remote_code")
def of_a_tokenizer(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "tokenization_evil.py").write_text(f"open({str(place.canary)!r}, 'w').close()\n")
    mapping = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    edit_json(folder / "tokenizer_config.json", auto_map=mapping, tokenizer_class="Evil")
    return place.quantize(folder)


@case("trust_remote_code")
def of_another_repository(place: Place) -> list[str]:
    folder = place.copy("single")
    mapping = {"AutoModelForCausalLM": "org/evil--modeling_evil.Evil"}
    edit_json(folder / "config.json", auto_map=mapping, model_type="evil", architectures=["Evil"])
    return place.quantize(folder)
