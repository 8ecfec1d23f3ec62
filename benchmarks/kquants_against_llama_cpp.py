"""K-quants by GPTQ beside llama.cpp's quantizer with an importance matrix of the same tokens, scored in llama.cpp.

    python benchmarks/kquants_against_llama_cpp.py --records alpaca.json --text wikitext.txt --models narrow=FOLDER \
        --kinds q4_k_m,q3_k_m,q2_k_mix --methods gptq,awq+gptq --samples 32

Both methods of a kind give each layer the same type, so that the files are equally large, which is checked. llama.cpp
rounds activations to 8 bits, and its divergence from the float model counts that for both. Results go to the file of
``benchmarks/quality.py``, of which this takes the other options, and what is there is not run again. The table has for
each kind the divergence by both, and the mean of their difference on the same rows with its standard error; the last
line is JSON.

256 does not divide the width of SmolLM2-135M, where most layers then fall back to Q4_0 and Q5_0;
``benchmarks/narrow_model.py`` makes a model in which none does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import quality
from scoring import machine

from quantkit.errors import QuantkitError

BASE = "llama.cpp"


def taken(option: str, otherwise: str) -> list[str]:
    """The values of an option of this benchmark, which is taken from the command line."""
    if option not in sys.argv:
        return otherwise.split(",")
    place = sys.argv.index(option)
    values = sys.argv[place + 1].split(",")
    del sys.argv[place : place + 2]
    return values


def pairs(results: list[dict[str, Any]], kinds: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """A line for each kind, method and text, with what it is of llama.cpp's.

    Raises:
        QuantkitError: the files are not equally large.
    """
    by_place = {quality.place_of(each): each for each in results}
    lines = []
    for each in results:
        method, _, kind = each["case"].partition("-")
        base = by_place.get(quality.place_of({**each, "case": f"{BASE}-{kind.partition(':')[0]}"}))
        if base is None or method not in methods or kind.partition(":")[0] not in kinds:
            continue
        if base["bits_per_weight"] != each["bits_per_weight"]:
            raise QuantkitError(f"{each['case']} and {base['case']} are not equally large")
        theirs = {text: sum(rows) / len(rows) for text, rows in base["kl"].items()}
        lines += [{**line, "theirs": theirs[line["text"]]} for line in quality.compared(each, base)]
    return lines


def main() -> None:
    kinds, methods = taken("--kinds", "q4_k_m,q3_k_m,q2_k_mix"), taken("--methods", "gptq")
    cases = [f"{method}-{kind}" for kind in kinds for method in (BASE, *methods)]
    sys.argv += ["--cases", ",".join(cases), "--llama-cpp"]
    given = quality.parse()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    stored = given.results.read_text(encoding="utf-8").splitlines() if given.results.exists() else []
    results = [json.loads(line) for line in stored]
    failed = quality.run(given, results)
    lines = pairs([each for each in results if each["label"] == given.label], kinds, methods)
    print("model    samples case                    text    bits  llama.cpp    ours  ratio   shift   error")
    for line in lines:
        told = (
            f"{line['model']:8} {line['samples']:7} {line['case']:23} {line['text']:6} {line['bits_per_weight']:5.2f}"
        )
        told += f" {line['theirs']:10.4f} {line['kl']:7.4f} {line['ratio']:6.3f}"
        print(f"{told} {line['shift']:+7.4f} {line['shift_stderr']:7.4f}")
    print(json.dumps({"benchmark": "kquants_against_llama_cpp", "scores": lines, "failed": failed, **machine()}))


if __name__ == "__main__":
    main()
