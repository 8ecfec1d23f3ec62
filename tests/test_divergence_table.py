"""llama.cpp's table of divergence: its own sums, as ``tools/perplexity/perplexity.cpp`` has them, on known arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.evaluation.divergence_table import QUANTILES, divergence_table
from quantkit.evaluation.reference import TextReader, text_writer, write_index
from quantkit.evaluation.scoring import score
from quantkit.evaluation.texts import Tokens, Windows, cut
from quantkit.runtimes.base import LoadedModel

VOCABULARY, TOKENS = 40, 257


def distributions(seed: int, temperature: float = 1.0) -> torch.Tensor:
    """Float32 ``[TOKENS + 1, VOCABULARY]`` logits, of which those of one seed are near each other."""
    generator = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn(TOKENS + 1, VOCABULARY, generator=generator)
    return logits / temperature + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))


class Fixed(LoadedModel):
    """A model of which the logits are known: row ``i`` after token ``i`` of the text, whatever it is."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.known = logits
        self.vocabulary = logits.shape[1]
        self.dtype, self.device = "float32", "cpu"
        self.read = 0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.known[self.read : self.read + len(ids)]
        self.read += len(ids) - 1
        return found

    def prefill(self, ids: torch.Tensor) -> None:
        raise NotImplementedError

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        raise NotImplementedError

    def weights_bytes(self) -> int:
        raise NotImplementedError


def llama_cpp(base: torch.Tensor, model: torch.Tensor, targets: list[int]) -> dict[str, Any]:
    """The sums of ``kl_divergence`` and what is printed of them, line by line, in Python's floats."""
    nll, nll_base, klds, p_diffs, same = [], [], [], [], 0
    for row, (left, right, token) in enumerate(zip(base.tolist(), model.tolist(), targets, strict=True)):
        log_base = [each - math.log(sum(map(math.exp, left))) for each in left]
        log_model = [each - math.log(sum(map(math.exp, right))) for each in right]
        nll.append(-log_model[token])
        nll_base.append(-log_base[token])
        klds.append(sum(math.exp(b) * (b - m) for b, m in zip(log_base, log_model, strict=True)))
        p_diffs.append(math.exp(-nll[row]) - math.exp(-nll_base[row]))
        same += left.index(max(left)) == right.index(max(right))
    count = len(targets)

    def mean_and_uncertainty(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / count
        return mean, math.sqrt((sum(value * value for value in values) / count - mean * mean) / (count - 1))

    def covariance(left: list[float], right: list[float]) -> float:
        together = sum(a * b for a, b in zip(left, right, strict=True)) / count
        return (together - sum(left) / count * sum(right) / count) / (count - 1)

    def percentile(values: list[float], fraction: float) -> float:
        ordered = sorted(values)
        if fraction in (0.0, 1.0):
            return ordered[-1 if fraction else 0]
        place = fraction * (count - 1)
        index = int(place)
        return (1 - (place - index)) * ordered[index] + (place - index) * ordered[min(index + 1, count - 1)]

    log_ppl, log_ppl_base = mean_and_uncertainty(nll), mean_and_uncertainty(nll_base)
    cov = covariance(nll, nll_base)
    ratio = log_ppl[0] - log_ppl_base[0]
    ratio_unc = math.sqrt(log_ppl[1] ** 2 + log_ppl_base[1] ** 2 - 2 * cov)
    ppl, ppl_base = math.exp(log_ppl[0]), math.exp(log_ppl_base[0])
    difference_unc = math.sqrt((ppl * log_ppl[1]) ** 2 + (ppl_base * log_ppl_base[1]) ** 2 - 2 * ppl * ppl_base * cov)
    mse = mean_and_uncertainty([value * value for value in p_diffs])
    rms, top = math.sqrt(mse[0]), same / count

    def spread(values: list[float]) -> dict[str, float]:
        mean, error = mean_and_uncertainty(values)
        return {"mean": mean, "stderr": error} | {name: percentile(values, at) for name, at in QUANTILES.items()}

    return {
        "tokens": count,
        "perplexity": {"value": ppl, "stderr": ppl * log_ppl[1]},
        "perplexity_reference": {"value": ppl_base, "stderr": ppl_base * log_ppl_base[1]},
        "correlation": cov / (log_ppl[1] * log_ppl_base[1]),
        "ln_perplexity_ratio": {"value": ratio, "stderr": ratio_unc},
        "perplexity_ratio": {"value": math.exp(ratio), "stderr": math.exp(ratio) * ratio_unc},
        "perplexity_difference": {"value": ppl - ppl_base, "stderr": difference_unc},
        "kl_divergence": spread(klds),
        "delta_p": spread(p_diffs),
        "rms_delta_p": {"value": rms, "stderr": 0.5 / rms * mse[1]},
        "same_top": {"value": top, "stderr": math.sqrt(top * (1 - top) / (count - 1))},
    }


def scored(base: torch.Tensor, model: torch.Tensor, ids: list[int], folder: Path) -> dict[str, Any]:
    """The table as an evaluation takes it: the reference written to disk and read again."""
    windows: Windows = cut(Tokens("t", ids, None), len(ids), len(ids))
    with text_writer(folder, windows, VOCABULARY) as writer:
        score(Fixed(base), windows, writer=writer)
    write_index(folder, {"t": windows}, VOCABULARY)
    found = score(Fixed(model), windows, reference=TextReader(folder, windows)).table
    assert found is not None
    return dict(found)


def close(found: Any, expected: Any, rel: float, absolute: float) -> None:
    assert type(found) is type(expected) or not isinstance(expected, dict)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key], rel, absolute)
    else:
        assert found == pytest.approx(expected, rel=rel, abs=absolute)


def test_the_figures_are_llama_cpps(tmp_path: Path) -> None:
    base, model = distributions(1), distributions(2, temperature=1.2)
    ids = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(5)).tolist()
    found = scored(base, model, ids, tmp_path)
    expected = llama_cpp(base[:-1].double(), model[:-1].double(), ids[1:])
    close(found, expected, rel=2e-3, absolute=2e-4)  # the reference's distribution is stored in 16 bits
    exact = ("perplexity", "perplexity_reference", "perplexity_ratio", "perplexity_difference", "delta_p", "same_top")
    for figure in exact:  # and of these nothing was stored in so few
        close(found[figure], expected[figure], rel=1e-5, absolute=1e-7)


def test_a_model_beside_itself_loses_nothing(tmp_path: Path) -> None:
    logits, ids = distributions(3), list(range(VOCABULARY))
    found = scored(logits[: len(ids)], logits[: len(ids)], ids, tmp_path)
    assert found["perplexity_ratio"] == {"value": 1.0, "stderr": 0.0}
    assert found["rms_delta_p"] == {"value": 0.0, "stderr": None}
    assert found["same_top"]["value"] == found["correlation"] == pytest.approx(1.0)
    assert found["delta_p"]["max"] == found["delta_p"]["min"] == 0.0
    assert abs(found["kl_divergence"]["max"]) < 1e-6


def test_errors_are_those_of_windows_where_there_are_some() -> None:
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    nll = 3 + shared + 0.01 * torch.randn(8, 50, generator=generator, dtype=torch.float64)
    zeros = torch.zeros_like(nll)
    table = divergence_table(nll, nll - 0.1, zeros, zeros)
    assert table["perplexity"]["stderr"] == pytest.approx(
        table["perplexity"]["value"] * nll.mean(dim=1).std().item() / math.sqrt(8)
    )
    assert table["ln_perplexity_ratio"] == {"value": pytest.approx(0.1), "stderr": pytest.approx(0.0, abs=1e-9)}
