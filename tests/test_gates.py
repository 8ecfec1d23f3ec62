"""Gates: what they accept, what they refuse, and that nothing missing ever passes."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.report import check_gate_syntax, evaluate_gates


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
        ("name <= 8", "known: bits_per_weight"),
        ("kl_divergence.prose.men <= 1", "did you mean 'mean'?"),
        ("kl_divergence <= 1", "kl_divergence.mean"),
        ("kl_divergence.prose <= 1", "kl_divergence.prose.mean"),
        ("memory <= 1GiB", "weights_bytes"),
        ("memory.a.peak_bytes <= 1GiB", "peak_bytes"),
        ("size_bytes.prose <= 1GiB", "size_bytes"),
        ("size_bytes <= 4Gib", "did you mean 'GiB'?"),
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
        "import sys, quantkit.report.gates; "
        "print(sorted({'torch', 'jinja2', 'matplotlib', 'rich', 'transformers', 'quantkit.recipe'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
