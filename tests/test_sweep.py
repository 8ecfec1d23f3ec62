"""Many variants in one walk: the same bytes as alone, one pass over the calibration set, failures kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.passes import Pass
from quantkit.errors import QuantizationError
from quantkit.methods.gptq import Gptq
from quantkit.methods.hqq import Hqq
from quantkit.quantization import Job, Quantized, Wanted, quantize, quantize_together, walks
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import file_sha256
from quantkit.system.devices import Moment
from tests.runs import load_model
from tests.tiny import make_model, tiny_rows

INT4 = {"group_size": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", **INT4},
    "gptq": {"method": "gptq", **INT4},
    "awq": {"method": "awq", **INT4},
    "awq+gptq": {"method": "awq+gptq", **INT4},
    "hqq": {"method": "hqq", "symmetric": False, **INT4},
    "gptq8": {"method": "gptq", "bits": 8, **INT4},
    "weighted": {"method": "rtn", "range": "weighted", **INT4},
    "nf4": {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes"},
    "gptq-mxfp4": {"method": "gptq", "scheme": "mxfp4"},
    "nvfp4": {"method": "rtn", "scheme": "nvfp4"},
    "fp8": {"method": "rtn", "scheme": "fp8"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2", hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def job(model: Path) -> Job:
    return Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, "float", "cpu")


def variant(name: str) -> VariantSpec:
    return VariantSpec.model_validate({"name": name.replace("+", "-"), **VARIANTS[name]})


def together(job: Job, out: Path, names: list[str]) -> dict[str, Quantized | Exception]:
    wanted = [Wanted(variant(name), out / name) for name in names]
    return dict(zip(names, quantize_together(job, wanted), strict=True))


def loaded(folder: Path) -> Any:
    return load_model(folder, "reference")


@pytest.fixture(scope="module")
def swept(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Quantized | Exception]]:
    out = tmp_path_factory.mktemp("sweep")
    return out, together(job, out, list(VARIANTS))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_of_a_sweep_has_the_bytes_that_it_has_alone(
    job: Job, swept: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    out, found = swept
    assert isinstance(found[name], Quantized), found[name]
    quantize(job, variant(name), tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert file_sha256(out / name / file) == file_sha256(tmp_path / name / file)


def test_every_variant_is_a_model_close_to_the_float_one(model: Path, swept: tuple[Path, dict[str, Any]]) -> None:
    """Factors that went astray, or scales read wrongly, would show as noise."""
    tokens = torch.tensor([tiny_rows()[0]])
    with torch.no_grad():
        before = loaded(model)(tokens).logits.log_softmax(-1)
        for name in VARIANTS:
            after = loaded(swept[0] / name)(tokens).logits.log_softmax(-1)
            divergence = float((before.exp() * (before - after)).sum(-1).mean())
            assert divergence < (0.004 if name in ("gptq8", "fp8") else 0.15), name


def test_the_walk_runs_the_calibration_set_once_whatever_the_number_of_variants(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Pass] = []
    run = Pass.run

    def counted(self: Pass) -> None:
        started.append(self)
        run(self)

    monkeypatch.setattr(Pass, "run", counted)
    together(job, tmp_path / "one", ["gptq"])
    alone = len(started)
    together(job, tmp_path / "many", ["gptq", "awq", "awq+gptq", "gptq8"])
    assert len(started) == 2 * alone


def test_the_factors_of_an_input_are_searched_once_for_all_that_ask_the_same(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.numerics import smoothing as awq

    searches: list[Any] = []
    search = awq.search_factors

    def counted(trial: Any, *rest: Any) -> Any:
        searches.append(trial)
        return search(trial, *rest)

    monkeypatch.setattr(awq, "search_factors", counted)
    options: dict[str, dict[str, Any]] = {
        "once": {},
        "again": {},
        "damped": {"damping": 0.2},
        "rounded": {"method": "awq"},
    }
    wanted = [
        Wanted(VariantSpec.model_validate({"name": name, **VARIANTS["awq+gptq"], **own}), tmp_path / name)
        for name, own in options.items()
    ]
    assert all(isinstance(each, Quantized) for each in quantize_together(job, wanted))
    assert len(searches) == 3 * 2 * 4, "two blocks of four inputs; what the method is and how it is set counts"


def test_a_method_that_fails_takes_no_other_variant_down(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = Gptq.quantize

    def failing(self: Gptq, weight: Any, statistics: Any, scheme: Any, scale_dtype: Any) -> Any:
        if scheme.bits == 8:
            raise QuantizationError("no luck with 8 bits")
        return quantized(self, weight, statistics, scheme, scale_dtype)

    def broken(self: Hqq, *args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Gptq, "quantize", failing)
    monkeypatch.setattr(Hqq, "quantize", broken)
    found = together(job, tmp_path, ["gptq8", "gptq", "hqq", "rtn"])
    assert [type(found[name]) for name in found] == [QuantizationError, Quantized, ZeroDivisionError, Quantized]
    assert "q_proj" in str(found["gptq8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "rtn"], "nothing half-written stays"


def test_where_all_fail_each_has_its_error(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Gptq, *args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Gptq, "quantize", broken)
    found = together(job, tmp_path, ["gptq8", "gptq"])
    assert all(isinstance(error, ZeroDivisionError) for error in found.values())


def test_a_sweep_reuses_what_is_finished(job: Job, tmp_path: Path) -> None:
    together(job, tmp_path, ["rtn", "gptq"])
    found = together(job, tmp_path, ["rtn", "gptq", "awq"])
    assert [each.reused for each in found.values() if isinstance(each, Quantized)] == [True, True, False]


def test_variants_share_a_walk_where_they_can(job: Job) -> None:
    from dataclasses import replace

    variants = [variant(name) for name in ("rtn", "gptq", "hqq", "awq", "nf4")]
    assert walks(job, variants) == [[0, 1, 2, 3, 4]]
    assert walks(replace(job, inputs="quantized"), variants) == [[0, 2, 4], [1], [3]]
    assert walks(job, []) == []


def test_layers_that_servers_fuse_share_the_scale_of_their_tensor(swept: tuple[Path, dict[str, Any]]) -> None:
    reader = CheckpointReader(swept[0] / "nvfp4")
    prefix = "model.layers.1."
    for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        part = "self_attn" if "q_proj" in leaves else "mlp"
        scales = {float(reader.read(f"{prefix}{part}.{leaf}.weight_global_scale")) for leaf in leaves}
        assert len(scales) == 1


def test_a_variant_is_billed_for_its_own_work_alone(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments between which it is timed, those of its device, lie right before and behind that work."""
    events: list[str] = []
    now, quantized = Moment.now, Gptq.quantize

    def moment(device: torch.device) -> Moment:
        events.append("moment")
        return now(device)

    def solved(self: Gptq, *given: Any) -> Any:
        events.append("solve")
        return quantized(self, *given)

    monkeypatch.setattr(Moment, "now", moment)
    monkeypatch.setattr(Gptq, "quantize", solved)
    together(job, tmp_path, ["gptq", "gptq8"])
    places = [place for place, event in enumerate(events) if event == "solve"]
    assert len(places) == 2 * 2 * 4
    for place in places:
        assert events[place - 1 : place + 2] == ["moment", "solve", "moment"]
