"""Gates: what they accept, what they refuse, and that nothing missing ever passes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.gates import parse_gate
from quantkit.gates.judge import judge_relative
from quantkit.gates.noise import Spread
from quantkit.gates.record import TextRecord, VariantRecord
from quantkit.gates.results import GateResult
from quantkit.regression.judging import Beside, judge, speed_spreads
from quantkit.report import check_gate_syntax, evaluate_gates
from quantkit.run_history import RunRecord
from tests.history_records import TEXT, run
from tests.history_records import variant as record


def variant(**changes: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "status": "ok",
        "size_bytes": 4 * 2**30,
        "bits_per_weight": 4.25,
        "metrics": {
            "perplexity": {"prose": 8.0, "wiki.v2": 9.5},
            "kl_divergence": {
                "prose": {"mean": 0.02, "stderr": 0.001, "median": 0.01, "p99": 0.3},
                "wiki.v2": {"mean": 0.06, "stderr": 0.002, "median": 0.03, "p99": 0.9},
            },
            "top1_agreement": {"prose": 0.93, "wiki.v2": 0.88},
        },
        "memory": {"weights_bytes": 3_000_000_000, "peak_bytes": 5_000_000_000},
        "speed": {"prefill_tokens_per_second": 900.0, "decode_tokens_per_second": 20.0},
        "seconds": {"quantize": 60.0, "evaluate": 30.0},
        **changes,
    }


def verdict(gate: str, **changes: Any) -> dict[str, Any]:
    (found,) = evaluate_gates([gate], [variant(**changes)])
    return found


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ("perplexity.prose <= 8.1", 8.0, True),
        ("perplexity.prose <= 8", 8.0, True),
        ("perplexity.prose < 8", 8.0, False),
        ("perplexity.wiki.v2 <= 9", 9.5, False),
        ("kl_divergence.prose.mean <= 0.05", 0.02, True),
        ("kl_divergence.wiki.v2.p99 <= 1e0", 0.9, True),
        ("metrics.kl_divergence.prose.median<.02", 0.01, True),
        ("top1_agreement.prose >= 0.93", 0.93, True),
        ("top1_agreement.prose > 93%", 0.93, False),
        ("top1_agreement.prose >= 93 %", 0.93, True),
        ("bits_per_weight <= 5", 4.25, True),
        ("memory.weights_bytes < 3GB", 3e9, False),
        ("memory.weights_bytes < 3GiB", 3e9, True),
        ("memory.peak_bytes <= 5000000KB", 5e9, True),
        ("speed.decode_tokens_per_second >= 20", 20.0, True),
        ("speed.prefill_tokens_per_second > 1000", 900.0, False),
        ("seconds.quantize <= 59", 60.0, False),
        ("size_bytes <= 4GiB", 2.0**32, True),
        ("size_bytes <= 4096 MiB", 2.0**32, True),
        ("size_bytes <= 4GB", 2.0**32, False),
        ("size_bytes <= 4294967296B", 2.0**32, True),
    ],
)
def test_a_gate_compares_the_figure_with_the_bound(gate: str, value: float, passed: bool) -> None:
    found = verdict(gate)
    assert (found["value"], found["passed"]) == (value, passed)
    assert found["variant"] == "a"
    assert ("is not" in found["reason"]) is not passed


@pytest.mark.parametrize(
    ("gate", "value", "passed", "text"),
    [
        ("kl_divergence.mean <= 0.05", 0.06, False, "wiki.v2"),
        ("kl_divergence.mean <= 0.07", 0.06, True, "wiki.v2"),
        ("perplexity <= 9", 9.5, False, "wiki.v2"),
        ("perplexity >= 8.5", 8.0, False, "prose"),
        ("top1_agreement >= 0.9", 0.88, False, "wiki.v2"),
        ("top1_agreement <= 0.9", 0.93, False, "prose"),
    ],
)
def test_without_a_text_the_worst_one_counts(gate: str, value: float, passed: bool, text: str) -> None:
    found = verdict(gate)
    assert (found["value"], found["passed"]) == (value, passed)
    assert text in found["reason"]


def test_a_failed_variant_fails_its_gates_even_with_figures() -> None:
    found = verdict("size_bytes <= 99GiB", status="failed")
    assert found["passed"] is False
    assert found["value"] is None
    assert "failed" in found["reason"]


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        ("perplexity.code <= 99", {}),
        ("kl_divergence.code.mean <= 99", {}),
        ("perplexity <= 99", {"metrics": {"perplexity": {"prose": math.nan, "wiki.v2": 9.5}}}),
        ("perplexity <= 99", {"metrics": {}}),
        ("perplexity <= 99", {"metrics": None}),
        ("kl_divergence.mean <= 99", {"metrics": {"kl_divergence": {"prose": None}}}),
        ("kl_divergence.mean <= 99", {"metrics": {"kl_divergence": {"prose": 0.1}}}),
        ("size_bytes <= 99GiB", {"size_bytes": None}),
        ("size_bytes >= 0", {"size_bytes": True}),
        ("memory.peak_bytes <= 99GiB", {"memory": None}),
        ("speed.decode_tokens_per_second >= 0", {"speed": {}}),
        ("bits_per_weight <= 99", {"bits_per_weight": math.nan}),
        ("bits_per_weight >= 1", {"bits_per_weight": math.inf}),
    ],
)
def test_a_missing_figure_never_passes(gate: str, changes: dict[str, Any]) -> None:
    found = verdict(gate, **changes)
    assert found["passed"] is False
    assert found["value"] is None
    assert "no finite figure" in found["reason"]


def test_a_text_that_one_variant_lacks_fails_its_worst_text_gate() -> None:
    lacking = variant(name="b", metrics={"perplexity": {"prose": 8.0}})
    first, second = evaluate_gates(["perplexity <= 10"], [variant(), lacking])
    assert first["passed"]
    assert not second["passed"]
    assert "wiki.v2" in second["reason"]


def test_every_gate_meets_every_variant() -> None:
    gates = ["bits_per_weight <= 5", "perplexity.prose <= 7"]
    found = evaluate_gates(gates, [variant(name="a"), variant(name="b")])
    assert [(item["gate"], item["variant"], item["passed"]) for item in found] == [
        ("bits_per_weight <= 5", "a", True),
        ("bits_per_weight <= 5", "b", True),
        ("perplexity.prose <= 7", "a", False),
        ("perplexity.prose <= 7", "b", False),
    ]


@pytest.mark.parametrize(
    ("gate", "hint"),
    [
        ("perplexty.prose <= 8", "did you mean 'perplexity'?"),
        ("kl_divergance.mean <= 8", "did you mean 'kl_divergence'?"),
        ("name <= 8", "known: answers, bits_per_weight"),
        ("kl_divergence.prose.men <= 1", "did you mean 'mean'?"),
        ("kl_divergence.prose.maen <= 1", "kl_divergence.prose.mean"),
        ("memory <= 1GiB", "weights_bytes"),
        ("memory.a.peak_bytes <= 1GiB", "peak_bytes"),
        ("size_bytes.prose <= 1GiB", "size_bytes"),
        ("size_bytes <= 4Gibb", "did you mean 'GiB'?"),
        ("size_bytes <= 4%", "known:"),
        ("perplexity <= 4GiB", "write the number alone"),
        ("perplexity == 4", "<="),
        ("perplexity", "<="),
        ("perplexity <= many", "<="),
        ("", "<="),
        ("perplexity <= 1 and size_bytes <= 2", "<="),
        ("perplexity <= 1e999", "too large"),
        ("perplexity <= ٣", "<="),
    ],
)
def test_a_gate_that_cannot_be_read_is_refused_with_what_is_allowed(gate: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_gate_syntax(gate)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError):
        evaluate_gates([gate], [])


def test_a_text_that_will_not_be_scored_is_refused() -> None:
    check_gate_syntax("perplexity.prose <= 8", ["prose", "answers"])
    check_gate_syntax("kl_divergence.mean <= 8", ["prose"])
    with pytest.raises(RecipeError, match="did you mean 'prose'"):
        check_gate_syntax("perplexity.pros <= 8", ["prose", "answers"])
    with pytest.raises(RecipeError, match="no text is called 'code'"):
        check_gate_syntax("kl_divergence.code.mean <= 8", ["prose", "answers"])


def test_gates_import_without_the_renderers() -> None:
    code = (
        "import sys, quantkit.gates; "
        "print(sorted({'torch', 'jinja2', 'matplotlib', 'rich', 'transformers', 'quantkit.recipe'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("gate", "kind", "path", "on", "allowed"),
    [
        ("perplexity +1 %", "accepted", "perplexity", None, 0.01),
        ("perplexity+1%", "accepted", "perplexity", None, 0.01),
        ("perplexity.wiki-v2 +1 %", "accepted", "perplexity", "wiki-v2", 0.01),
        ("perplexity <= accepted +1%", "accepted", "perplexity", None, 0.01),
        ("perplexity <= accepted", "accepted", "perplexity", None, 0.0),
        ("perplexity <= accepted - 2 %", "accepted", "perplexity", None, -0.02),
        ("perplexity.prose <= baseline +1.5%", "baseline", "perplexity", "prose", 0.015),
        ("kl_divergence.mean +10 %", "accepted", "kl_divergence.mean", None, 0.1),
        ("top1_agreement -1 %", "accepted", "top1_agreement", None, 0.01),
        ("top1_agreement >= accepted -1%", "accepted", "top1_agreement", None, 0.01),
        ("decode_tokens_per_second -10 %", "accepted", "speed.decode_tokens_per_second", None, 0.1),
        ("speed.prefill_tokens_per_second >= baseline -50%", "baseline", "speed.prefill_tokens_per_second", None, 0.5),
        ("size_bytes <= baseline -60%", "baseline", "size_bytes", None, -0.6),
        ("weights_bytes +0 %", "accepted", "memory.weights_bytes", None, 0.0),
    ],
)
def test_a_relative_gate_says_how_much_worse_a_figure_may_be(
    gate: str, kind: str, path: str, on: str | None, allowed: float
) -> None:
    read = parse_gate(gate)
    assert (read.kind, read.path, read.on) == (kind, path, on)
    assert read.allowed == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("gate", "hint"),
    [
        ("perplexity -1 %", "better when it is lower"),
        ("decode_tokens_per_second +10 %", "write 'speed.decode_tokens_per_second -10 %'"),
        ("perplexity >= accepted", "write '<='"),
        ("perplexity < accepted +1%", "write '<='"),
        ("kl_divergence.p99 +10 %", "write kl_divergence.mean"),
        ("kl_divergence.mean <= baseline +10%", "relative to the float model already"),
        ("top1_agreement >= baseline -1%", "relative to the float model already"),
        ("seconds.quantize +10 %", "its noise is not known"),
        ("perplexity +1", "is not a condition"),
        ("perplexity-1%", "is not a condition"),
        ("perplexity <= accepted 1%", "is not a condition"),
        ("perplexity <= acepted +1%", "is not a condition"),
        ("perplexty +1 %", "did you mean 'perplexity'?"),
    ],
)
def test_a_relative_gate_that_means_nothing_is_refused(gate: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_gate_syntax(gate)
    assert hint in str(caught.value)


def scaled(by: float, wobble: float = 0.0) -> VariantRecord:
    """A variant whose windows are all ``by`` times those of the accepted one, give or take."""
    shifts = [by + wobble * step for step in (-1, 0, 1)]
    assert TEXT.kl is not None
    kl = tuple(each * shift for each, shift in zip(TEXT.kl, shifts, strict=True))
    text = replace(TEXT, kl=kl, nll=tuple(each * shift for each, shift in zip(TEXT.nll, shifts, strict=True)))
    figures = {**record().figures, ("kl_divergence", "prose", "mean"): sum(kl) / sum(TEXT.kl) * 0.1}
    return record(text=text, figures=figures)


@pytest.mark.parametrize(
    ("now", "outcome", "words"),
    [
        (scaled(1.0), "passed", "is as good as the accepted run's"),
        (scaled(1.08), "passed", "8 % worse than the accepted run's 0.1"),
        (scaled(1.3), "regressed", "30 % worse"),
        (scaled(0.8), "passed", "20 % better"),
        (scaled(1.3, wobble=0.4), "passed", "inside its noise; from"),
        (scaled(1.9, wobble=0.05), "regressed", "10 % is allowed"),
    ],
)
def test_a_difference_inside_its_noise_is_no_regression(now: VariantRecord, outcome: str, words: str) -> None:
    found = judge_relative(parse_gate("kl_divergence.mean +10 %"), now, record(), ["prose"])
    assert (found.outcome, found.worst and found.worst.outcome) == (outcome, outcome)
    assert words in found.reason
    assert found.worst is not None
    assert found.worst.detectable is not None
    assert found.worst.samples == 3


def test_the_worst_text_decides_and_comes_first() -> None:
    def with_two(by: float) -> VariantRecord:
        worse = scaled(by)
        figures = {**worse.figures, ("kl_divergence", "answers", "mean"): 0.1}
        return replace(worse, texts={**worse.texts, "answers": TEXT}, figures=figures)

    found = judge_relative(parse_gate("kl_divergence.mean +10 %"), with_two(1.5), with_two(1.0), ["answers", "prose"])
    assert found.outcome == "regressed"
    assert [(each.text, each.outcome) for each in found.comparisons] == [("prose", "regressed"), ("answers", "passed")]


@pytest.mark.parametrize(
    ("gate", "now", "why"),
    [
        ("perplexity +1 %", record(text=replace(TEXT, token_ids_sha256="bb22")), "other tokens"),
        (
            "perplexity +1 %",
            record(text=replace(TEXT, context_length=128)),
            "context length 128, and in the other at 64",
        ),
        ("perplexity +1 %", record(device="NVIDIA H100"), "scored on NVIDIA H100, and the other on cpu"),
        ("perplexity +1 %", record(dtype="bfloat16"), "computed in bfloat16, and the other in float32"),
        ("perplexity +1 %", record(texts={}), "was not scored in this run"),
        ("decode_tokens_per_second -10 %", record(cpu="Another"), "the processor Another, and the other on Processor"),
        ("decode_tokens_per_second -10 %", record(threads=8), "8 threads, and the other with 2"),
        ("weights_bytes +1 %", record(loaded_by="reference"), "loaded by reference"),
        ("size_bytes +1 %", record(figures={}), "no finite figure"),
        ("size_bytes +1 %", record(status="failed", error="too wide"), "variant failed: too wide"),
    ],
)
def test_what_is_not_comparable_cannot_be_told_and_the_reason_stands_in_place_of_a_number(
    gate: str, now: VariantRecord, why: str
) -> None:
    found = judge_relative(parse_gate(gate), now, record(), ["prose"])
    assert found.outcome == "unknown"
    assert why in found.reason
    assert found.worst is not None
    assert (found.worst.difference, found.worst.low, found.worst.high) == (None, None, None)


def test_sizes_are_compared_exactly_and_whatever_they_were_scored_on() -> None:
    now = record(device="NVIDIA H100", figures={("size_bytes", "", ""): 1001.0})
    assert judge_relative(parse_gate("size_bytes +0 %"), now, record(), []).outcome == "regressed"
    assert judge_relative(parse_gate("size_bytes +1 %"), now, record(), []).outcome == "passed"


def test_one_window_alone_tells_a_better_figure_and_no_worse_one() -> None:
    short = replace(TEXT, nll=TEXT.nll[:1], kl=(6.3,))
    longer = replace(short, nll=(TEXT.nll[0] * 1.1,))
    gate = parse_gate("perplexity +1 %")

    def judged(now: TextRecord, value: float) -> str:
        figures = {**record().figures, ("perplexity", "prose", ""): value}
        return judge_relative(gate, record(text=now, figures=figures), record(text=short), ["prose"]).outcome

    assert judged(replace(short, nll=(TEXT.nll[0] * 0.9,)), 6.0) == "passed"
    assert judged(longer, 9.0) == "unknown"


def test_a_slower_run_is_no_regression_before_it_is_known_how_much_runs_differ() -> None:
    gate = parse_gate("decode_tokens_per_second -10 %")
    slow = record(
        figures={**record().figures, ("speed", "", "decode_tokens_per_second"): 80.0},
        timings={"decode": (0.0125, 0.0124, 0.0126)},
    )

    def judged(spread: float | None) -> GateResult:
        spreads = {} if spread is None else {"decode_tokens_per_second": Spread(spread, 6)}
        return judge_relative(gate, slow, record(), [], spreads=spreads)

    assert judged(None).outcome == "unknown"
    assert "known from 5 earlier runs on" in judged(None).reason
    assert judged(0.01).outcome == "regressed"
    assert judged(0.12).outcome == "passed"


def test_a_run_judges_what_is_relative_to_its_float_model_by_itself() -> None:
    row = variant(texts={"prose": text_row((126.0, 130.0, 120.0))})
    worse = variant(texts={"prose": text_row((130.0, 134.0, 124.0))}, metrics={"perplexity": {"prose": 8.5}})
    gates = ["perplexity.prose <= baseline +10%", "perplexity.prose <= baseline +2%", "perplexity +1 %"]
    found = evaluate_gates(gates, [worse], row)
    assert [(each["gate"], each["passed"]) for each in found] == [(gates[0], True), (gates[1], False)]
    assert found[1]["difference"] == pytest.approx(math.exp(4 / 63) - 1)
    assert found[1]["low"] > 0
    (lacking,) = evaluate_gates(gates[:1], [worse])
    assert (lacking["passed"], lacking["value"]) == (False, None)


def text_row(nll: tuple[float, ...]) -> dict[str, Any]:
    return {
        "token_ids_sha256": "aa11",
        "context_length": 64,
        "nll_count": 63 * len(nll),
        "nll_by_window": list(nll),
    }


@pytest.mark.parametrize("gate", ["perplexity <= 99", "perplexity +1 %", "perplexity <= baseline +1%"])
def test_a_check_tells_that_a_scored_text_has_no_finite_figure(gate: str) -> None:
    lacking = record(figures={("perplexity", "answers", ""): 5.0}, texts={"answers": TEXT, "prose": TEXT})
    now = run(variants=(lacking,))
    (result,) = judge([gate], now, Beside({lacking.name: run()}, ()))
    assert result.outcome == "unknown"
    assert {each.text: each.outcome for each in result.comparisons}["prose"] == "unknown"


def test_how_much_speeds_differ_is_told_by_five_runs_alike() -> None:
    def at(speed: float, verdict: str = "passed", **changes: Any) -> RunRecord:
        figures = {("speed", "", "decode_tokens_per_second"): speed}
        return run(verdict=verdict, variants=(record(figures=figures, **changes),))

    runs = [at(100.0), at(110.0), at(90.0), at(104.0)]
    assert speed_spreads(record(), runs) == {}
    assert speed_spreads(record(), [*runs, at(20.0, cpu="Another")]) == {}
    assert speed_spreads(record(), [*runs, at(20.0, verdict="regressed")]) == {}
    found = speed_spreads(record(), [*runs, at(96.0)])["decode_tokens_per_second"]
    assert found.deviation == pytest.approx(0.0764, abs=1e-4)
    assert found.degrees == 4
