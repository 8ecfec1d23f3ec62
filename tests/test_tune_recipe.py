"""How block polish is asked for: the short and the long form, what is refused, and what depends on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.estimation import estimate
from quantkit.methods.tuning import TuneOptions
from quantkit.pipeline.plan import forecast
from quantkit.recipe import Recipe, VariantSpec
from quantkit.system.validation import parse_section
from tests.runs import write_records
from tests.tiny import make_model


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "a", **keys}, "recipe")


def first(variants: list[dict[str, Any]], **defaults: Any) -> list[VariantSpec]:
    given = {"name": "r", "model": "m", "defaults": defaults, "variants": variants}
    return list(Recipe.of(given).own_variants)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "rtn", "hqq", "awq"])
def test_a_short_form_means_what_the_long_one_does(method: str) -> None:
    short, long = variant(method=f"{method}+tune"), variant(method=method, tune=True)
    assert short == long
    assert (short.tune, short.chain) == (TuneOptions(), f"{method}+tune")
    assert variant(method=f"{method.upper()} + Tune") == short, "names are written in any case"
    assert variant(method=f"{method}+tune", tune={"steps": 3}).tune == TuneOptions(steps=3)
    assert variant(method=method, tune={"steps": 3}) == variant(method=f"{method}+tune", tune={"steps": 3})
    assert variant(method=method, tune=False) == variant(method=method) != short


def test_a_tuned_variant_is_calibrated_whatever_its_method_asks_for() -> None:
    assert not variant(method="rtn").calibrated
    assert variant(method="rtn+tune").calibrated
    assert not variant(method="rtn+tune").needs(), "rows are wanted and no statistics"


def test_what_a_variant_is_made_from_has_every_option_of_its_tuning() -> None:
    assert variant(method="gptq+tune").resolved()["tune"] == TuneOptions().model_dump(mode="json")
    assert "tune" not in variant(method="gptq").resolved(), "what is not tuned is what it was before"


def test_a_recipe_that_is_written_again_tunes_as_before() -> None:
    asked = {"steps": 5, "train": ["scales", "norms"]}
    given = {"name": "r", "model": "m", "variants": [{"name": "a", "method": "rtn+tune", "tune": asked}]}
    recipe = Recipe.of({**given, "variants": [*given["variants"], {"name": "b", "method": "gptq+tune"}]})
    again = Recipe.parse(recipe.to_yaml())
    assert again.own_variants == recipe.own_variants
    assert again.own_variants[1].tune == TuneOptions()


@pytest.mark.parametrize(
    ("defaults", "own", "expected"),
    [
        ({"method": "gptq+tune"}, {}, "gptq+tune"),
        ({"method": "gptq+tune"}, {"scheme": "nf4", "double_quant": False}, "gptq+tune"),
        ({"method": "gptq+tune"}, {"method": "rtn"}, "rtn"),
        ({"method": "gptq+tune"}, {"tune": False}, "gptq"),
        ({"tune": True}, {"method": "rtn"}, "rtn+tune"),
        ({"tune": True}, {"method": "none"}, "none"),
        ({"tune": True}, {"tune": None}, "gptq"),
    ],
)
def test_defaults_tune_the_variants_that_do_not_say_otherwise(
    defaults: dict[str, Any], own: dict[str, Any], expected: str
) -> None:
    found, _ = first([{"name": "a", **own}, {"name": "b"}], **defaults)
    assert found.chain == expected


def test_a_variant_that_tunes_takes_the_options_of_the_defaults() -> None:
    found, other = first(
        [{"name": "a", "method": "rtn+tune"}, {"name": "b", "tune": {"rounding": True}}], tune={"steps": 9}
    )
    assert found.tune == TuneOptions(steps=9)
    assert other.tune == TuneOptions(rounding=True), "a mapping stands for itself, as any key does"


@pytest.mark.parametrize(
    ("keys", "problem", "remedy"),
    [
        ({"method": "tune"}, "unknown method 'tune'", "it comes behind a method: write gptq\\+tune"),
        ({"method": "tune+gptq"}, "tune comes once, when the codes are there", "put it at the end: gptq\\+tune"),
        ({"method": "gptq+tune+tune"}, "tune comes once", "put it at the end: gptq\\+tune"),
        ({"method": "gptq+tun"}, "'tun' cannot come behind gptq", "did you mean 'tune'"),
        ({"method": "gptq+tune", "tune": False}, "tune: false stands beside it", "write method: gptq"),
        ({"method": "none+tune"}, "tune: .* has no scales or zeros that can be trained", "leave out tune"),
        ({"method": "gptq+tune", "scheme": "mxfp4"}, "tune: mxfp4 has no scales or zeros", "such as int"),
        ({"method": "gptq", "tune": {"train": "zeros"}}, "int4 g64 sym has no zeros", "leave out tune"),
        ({"method": "gptq", "tune": {"train": []}}, "nothing is trained", ""),
        ({"method": "gptq", "tune": {"step": 3}}, "unknown key 'variants.0..tune.step'", "did you mean 'steps'"),
        ({"method": "gptq", "tune": {"train": ["scale"]}}, "'scale' is not allowed", "did you mean 'scales'"),
        ({"method": "gptq", "tune": {"steps": 0}}, "tune.steps: must be greater than or equal to 1", ""),
        ({"method": "gptq", "tune": 3}, "tune", ""),
        ({"library": "autoround", "method": "autoround+tune"}, "autoround\\+tune", ""),
        ({"library": "autoround", "tune": True}, "unknown key", ""),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(keys: dict[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=problem) as refused:
        Recipe.of({"name": "r", "model": "m", "variants": [{"name": "a", **keys}]})
    assert refused.match(remedy)
    assert "\n" not in str(refused.value)


def test_norms_can_be_trained_beside_scales_that_cannot() -> None:
    assert variant(method="gptq", scheme="mxfp4", tune={"train": "norms"}).tune == TuneOptions(train=("norms",))
    assert variant(format="hqq", zeros="float", symmetric=False, tune={"train": "zeros"}).tune is not None


def test_a_recipe_that_tunes_is_checked_without_torch() -> None:
    code = (
        "import sys; from quantkit.recipe import VariantSpec; "
        "VariantSpec.model_validate({'name': 'a', 'method': 'gptq+tune'}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_of_tuning_is_that_of_a_step_whatever_the_depth(tmp_path: Path) -> None:
    shallow = str(make_model(tmp_path / "shallow", num_hidden_layers=3))
    deep = str(make_model(tmp_path / "deep", num_hidden_layers=6))

    def peak(model: str, tokens: int = 8192, **tune: Any) -> dict[str, int]:
        keys: dict[str, Any] = {"group_size": 32, "tune": tune, "calibration_tokens": tokens, "device": "cpu"}
        found = estimate(model, method="rtn+tune", **keys).part("quantizing")
        assert found.title == "while quantizing, when a block is tuned"
        return {line.name: line.nbytes for line in found.lines}

    batch, small = peak(shallow), peak(shallow, batch_tokens=512)
    assert peak(deep) == batch
    step, waiting = "activations of a step", "inputs and targets of the block"
    assert peak(shallow, 16384)[waiting] == 2 * batch[waiting]
    assert batch.pop(step) == 2 * small.pop(step)
    assert batch == small
    assert small["weights and their gradients"] == small["trained parameters"] // 16 * 32 * 9


def test_a_tuned_variant_takes_longer_by_its_steps(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    given = {"name": "r", "model": str(model), "report": {"folder": str(tmp_path / "run")}}
    calibration = {"dataset": str(write_records(tmp_path / "records.json")), "samples": 8, "max_length": 64}

    def seconds(**keys: Any) -> float:
        variants = [{"name": "a", "method": "rtn", "group_size": 32, **keys}]
        told = forecast(Recipe.of({**given, "calibration": calibration, "variants": variants}))
        (variant,) = told["variants"]
        assert variant["method"] == ("rtn+tune" if keys else "rtn")
        assert variant["strategy"] == ("recompute" if keys else "weights only")
        assert (told["calibration"] is None) == (not keys)
        return float(sum(each["seconds"] for each in told["time"]["stages"] if each["stage"].startswith("quantize")))

    plain, one, many = seconds(), seconds(tune={"steps": 1}), seconds(tune={"steps": 5000})
    assert plain < one < many
