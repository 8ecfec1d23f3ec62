"""Calibration: the same tokens every time, and every record and token accounted for."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantkit import calibration, records
from quantkit.calibration import CalibrationSet, audit_lines, build, load, stage
from quantkit.errors import CalibrationError, OutputError, RecipeError
from quantkit.recipe import CalibrationSpec
from quantkit.system.validation import parse_section
from tests.tiny import CHAT_TEMPLATE, VOCABULARY, tiny_config, tiny_tokenizer, tokenizer_with_bos

PACKAGE = Path(stage.__file__).parents[1]
EOS = 2
RECORDS = 40


def write_model(folder: Path, chat_template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """All that calibration reads of a model: its config and its tokenizer."""
    tiny_config(**changes).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 plain texts of 10 to 88 bytes, hence tokens; the text tells the record."""
    rows = [{"text": f"{number:02d}" + "x" * (8 + 2 * number)} for number in range(RECORDS)]
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


def spec_for(dataset: Path | str, **settings: Any) -> CalibrationSpec:
    return CalibrationSpec(dataset=str(dataset), **{"samples": 16, "max_length": 32, **settings})


def texts(built: CalibrationSet) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(row) for row in built.rows]


def check_sums(audit: dict[str, Any]) -> None:
    """The identities that the audit promises."""
    counts = audit["records"]
    dropped = sum(counts["dropped"].values())
    assert counts["read"] == counts["usable"] + counts["skipped"]
    assert counts["usable"] == counts["used"] + dropped + counts["unused"]
    assert audit["encoded_tokens"] == sum(audit[f"{kind}tokens"] for kind in ("", "cropped_", "truncated_", "dropped_"))
    assert len(counts["used_indices"]) == counts["used"]
    assert len(counts["truncated_lengths"]) == counts["truncated"]
    assert sum(bin_["count"] for bin_ in audit["length"]["histogram"]) == counts["used"]
    assert sum(group["count"] for group in counts["skipped_indices"].values()) == counts["skipped"]


def test_rows_are_the_records_in_the_documented_order(tmp_path: Path, model: Path, dataset: Path) -> None:
    built = build(spec_for(dataset, seed=3, max_length=512), model, tmp_path / "out")
    order = random.Random(3).sample(range(RECORDS), RECORDS)[:16]
    assert [int(text[:2]) for text in texts(built)] == order
    assert built.audit["records"]["used_indices"] == order
    assert built.tokens == sum(10 + 2 * number for number in order)


def test_seed_decides_the_draw(tmp_path: Path, model: Path, dataset: Path) -> None:
    first, again, other = (
        build(spec_for(dataset, seed=seed), model, tmp_path / name) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert (tmp_path / "a" / "tokens.safetensors").read_bytes() == (tmp_path / "b" / "tokens.safetensors").read_bytes()
    assert (tmp_path / "a" / "audit.json").read_bytes() == (tmp_path / "b" / "audit.json").read_bytes()
    assert first.sha256 != other.sha256
    assert set(first.audit["records"]["used_indices"]) != set(other.audit["records"]["used_indices"])


def test_sha256_is_as_documented_and_the_same_in_another_process(tmp_path: Path, model: Path, dataset: Path) -> None:
    built = build(spec_for(dataset), model, tmp_path / "here")
    rows = b"".join(struct.pack(f"<{len(row) + 1}i", len(row), *row) for row in built.rows)
    assert built.sha256 == hashlib.sha256(rows).hexdigest() == built.audit["token_ids_sha256"]
    code = (
        "import sys; from pathlib import Path; from quantkit.calibration import build;"
        "from quantkit.recipe import CalibrationSpec;"
        "spec = CalibrationSpec(dataset=sys.argv[1], samples=16, max_length=32);"
        "print(build(spec, Path(sys.argv[2]), Path(sys.argv[3])).sha256)"
    )
    command = [sys.executable, "-c", code, str(dataset), str(model), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == built.sha256


def test_truncation_is_counted_and_listed(tmp_path: Path, model: Path, dataset: Path) -> None:
    audit = build(spec_for(dataset, samples=RECORDS), model, tmp_path / "out").audit
    lengths = {number: 10 + 2 * number for number in range(RECORDS)}
    longer = {str(number): length for number, length in lengths.items() if length > 32}
    assert audit["records"]["truncated"] == len(longer)
    assert audit["records"]["truncated_lengths"] == longer
    assert audit["truncated_tokens"] == sum(length - 32 for length in longer.values())
    assert audit["encoded_tokens"] == sum(lengths.values())
    assert audit["length"]["min"] == 10
    assert audit["length"]["max"] == 88
    assert audit["length"]["mean"] == audit["length"]["median"] == 49
    assert f"records cut to 32 tokens: {len(longer)} of 40" in audit["warnings"]
    check_sums(audit)


def test_half_of_the_rows_that_begin_alike_begin_within_their_records(tmp_path: Path, model: Path) -> None:
    """The first token of a text takes much of the attention, whatever it is, and not that of the template alone."""
    rows = [{"text": "<" + chr(97 + number % 26) * (9 + number)} for number in range(RECORDS)]
    path = write_rows(tmp_path / "alike.jsonl", rows)
    whole = {number: len(row["text"]) for number, row in enumerate(rows)}
    built = build(spec_for(path, samples=RECORDS), model, tmp_path / "out")
    records = built.audit["records"]
    later = [place for place, text in enumerate(texts(built)) if not text.startswith("<")]
    assert 12 <= len(later) == records["cropped"] <= 28
    for place, number in enumerate(records["used_indices"]):
        start = texts(built)[place].lstrip("<")
        assert len(start) >= min(32, whole[number] - whole[number] // 2) - 1
        assert set(start) == {chr(97 + number % 26)}
    assert built.audit["cropped_tokens"] > 0
    check_sums(built.audit)
    assert f"{len(later)} rows begin within their records" in "\n".join(audit_lines(built.audit))
    assert build(spec_for(path, samples=RECORDS), model, tmp_path / "again").sha256 == built.sha256
    none = build(spec_for(path, samples=RECORDS, crop=0), model, tmp_path / "none")
    assert all(text.startswith("<") for text in texts(none))
    every = build(spec_for(path, samples=RECORDS, crop=1), model, tmp_path / "every")
    assert every.audit["records"]["cropped"] == RECORDS
    tokenizer_with_bos().save_pretrained(tmp_path / "bos")
    tiny_config().save_pretrained(tmp_path / "bos")
    assert build(spec_for(path), tmp_path / "bos", tmp_path / "with").audit["cropped_tokens"] == 0
    with pytest.raises(RecipeError, match="crop is of rows of one record, and packing is full"):
        parse_section(CalibrationSpec, {"packing": "full", "crop": 0.5}, "calibration")


def test_histogram_covers_every_length_once(tmp_path: Path, model: Path, dataset: Path) -> None:
    bins = build(spec_for(dataset, samples=RECORDS), model, tmp_path / "out").audit["length"]["histogram"]
    assert bins[0]["from"] == 10
    assert bins[-1]["from"] <= 88 <= bins[-1]["to"]
    assert all(left["to"] + 1 == right["from"] for left, right in itertools.pairwise(bins))
    for part in bins:
        assert part["count"] == sum(part["from"] <= 10 + 2 * number <= part["to"] for number in range(RECORDS))


def test_full_packing_cuts_one_stream(tmp_path: Path, model: Path, dataset: Path) -> None:
    built = build(spec_for(dataset, packing="full", samples=10), model, tmp_path / "out")
    order = random.Random(0).sample(range(RECORDS), RECORDS)[:10]
    tokenizer = tiny_tokenizer()
    stream: list[int] = []
    for number in order:
        stream += ([EOS] if stream else []) + tokenizer.encode(f"{number:02d}" + "x" * (8 + 2 * number))
    assert all(len(row) == 32 for row in built.rows)
    kept = len(stream) - len(stream) % 32
    assert [token for row in built.rows for token in row] == stream[:kept]
    assert built.audit["separator_tokens"] == 9
    assert built.audit["encoded_tokens"] == len(stream)
    assert built.audit["dropped_tokens"] == len(stream) - kept > 0
    assert built.audit["truncated_tokens"] == 0
    check_sums(built.audit)


def test_a_record_wholly_in_the_remainder_is_not_counted_as_used(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": letter * 31} for letter in "xyz"])
    audit = build(spec_for(path, packing="full", seed=1), model, tmp_path / "out").audit
    order = random.Random(1).sample(range(3), 3)
    assert audit["records"]["used_indices"] == order[:2]
    assert audit["records"]["dropped"] == {"in the remainder that fills no row": 1}
    check_sums(audit)


def test_no_separator_after_a_template_that_ends_with_it(tmp_path: Path, dataset: Path) -> None:
    folder = write_model(
        tmp_path / "model", "{% for message in messages %}{{ message.content }}{{ eos_token }}\n{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": "x" * 20}]} for _ in range(8)]
    audit = build(spec_for(write_rows(tmp_path / "a.jsonl", rows), packing="full"), folder, tmp_path / "out").audit
    assert audit["separator_tokens"] == 0
    assert audit["encoded_tokens"] == 8 * 22


def test_too_few_tokens_for_a_row_is_an_error(tmp_path: Path, model: Path, dataset: Path) -> None:
    with pytest.raises(CalibrationError, match=r"gives \d+ tokens, which do not fill one row of 4096"):
        build(spec_for(dataset, packing="full", samples=2, max_length=4096), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_short_and_missing_records_are_told(tmp_path: Path, model: Path) -> None:
    rows = [{"text": "usable text"}, {"title": "x"}, {"text": "y"}, {"text": "more text"}, {"text": 7}, {"title": "z"}]
    audit = build(spec_for(write_rows(tmp_path / "a.jsonl", rows), samples=8), model, tmp_path / "out").audit
    assert sorted(audit["records"]["used_indices"]) == [0, 3]
    assert audit["records"]["dropped"] == {"fewer than 2 tokens": 1}
    assert audit["records"]["dropped_indices"] == {"fewer than 2 tokens": {"count": 1, "first": [2]}}
    assert audit["records"]["skipped"] == 3
    assert audit["records"]["skipped_indices"] == {
        "'text' holds a number where text should be": {"count": 1, "first": [4], "keys": "text"},
        "no known format (keys: title)": {"count": 2, "first": [1, 5], "keys": "title"},
    }
    assert audit["dropped_tokens"] == 1
    assert audit["warnings"] == [
        "fewer records than asked for: 2 of 8",
        "records skipped as unusable: 3 of 6",
        "records dropped: 1 of 3",
    ]
    check_sums(audit)


def test_records_left_over_are_counted(tmp_path: Path, model: Path, dataset: Path) -> None:
    audit = build(spec_for(dataset, samples=5, max_length=512), model, tmp_path / "out").audit
    assert audit["records"]["unused"] == RECORDS - 5
    assert audit["warnings"] == []
    check_sums(audit)


def test_no_usable_record_is_an_error(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CalibrationError, match="each of its 1 records has fewer than 2 tokens"):
        build(spec_for(write_rows(tmp_path / "a.jsonl", [{"text": "x"}])), model, tmp_path / "out")


def test_audit_says_where_the_data_came_from(tmp_path: Path, model: Path, dataset: Path) -> None:
    audit = build(spec_for(dataset), model, tmp_path / "out").audit
    sha256 = hashlib.sha256(dataset.read_bytes()).hexdigest()
    assert audit["dataset"] == {"name": "texts", "kind": "file", "file": "texts.jsonl", "sha256": sha256}
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == audit


def test_chat_template_choices_are_applied_and_told(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "Ask", "output": "Tell"}])
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[1].content }}!")
    told = {"file": "own.jinja", "sha256": hashlib.sha256(own.read_bytes()).hexdigest()}
    bare = write_model(tmp_path / "bare", None)
    chat = "<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\nTell<|im_end|>\n"
    cases = [
        (model, "auto", "model", chat),
        (model, "none", "none", "Ask\n\nTell"),
        (model, str(own), told, "Tell!"),
        (bare, "auto", "none", "Ask\n\nTell"),
    ]
    for place, (folder, choice, kind, text) in enumerate(cases):
        built = build(spec_for(path, chat_template=choice, max_length=512), folder, tmp_path / str(place))
        assert texts(built) == [text]
        assert built.audit["chat_template"] == kind
        assert any("no chat template" in warning for warning in built.audit["warnings"]) == (folder == bare)


def test_a_hostile_template_is_refused_with_the_record(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"title": "x"}, {"instruction": "Ask", "output": "Tell"}])
    own = tmp_path / "own.jinja"
    own.write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(CalibrationError, match=r"fails on record 1: .*unsafe"):
        build(spec_for(path, chat_template=str(own)), model, tmp_path / "out")


def test_tokenizer_and_model_must_agree(tmp_path: Path, dataset: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=VOCABULARY - 200)
    with pytest.raises(CalibrationError, match=rf"gives token \d+ .* but the model's vocabulary is {VOCABULARY - 200}"):
        build(spec_for(dataset), folder, tmp_path / "out")


def test_rows_beyond_the_models_positions_are_told(tmp_path: Path, dataset: Path) -> None:
    folder = write_model(tmp_path / "model", max_position_embeddings=24)
    audit = build(spec_for(dataset), folder, tmp_path / "out").audit
    assert "rows of 32 tokens exceed the model's 24 positions" in audit["warnings"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot read the model's config"),
        (lambda folder: [path.unlink() for path in folder.glob("*token*")], "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load the tokenizer"),
    ],
)
def test_broken_models_are_named(tmp_path: Path, dataset: Path, damage: Any, message: str) -> None:
    folder = write_model(tmp_path / "model", None)
    damage(folder)
    with pytest.raises(CalibrationError, match=message):
        build(spec_for(dataset), folder, tmp_path / "out")


def test_missing_template_is_named(tmp_path: Path, model: Path, dataset: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the chat template absent\.jinja"):
        build(spec_for(dataset, chat_template="absent.jinja"), model, tmp_path / "out")


def test_foreign_folder_is_left_alone(tmp_path: Path, model: Path, dataset: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by quantkit"):
        build(spec_for(dataset), model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


class Reads:
    """Counts how often a data set is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._load = records.load
        monkeypatch.setattr(records, "load", self)

    def __call__(self, *given: Any) -> records.RecordSet:
        self.count += 1
        return self._load(*given)


def test_stage_is_reused_for_the_same_inputs_alone(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    folder, out = write_model(tmp_path / "model"), tmp_path / "out"
    data, template = tmp_path / "data.jsonl", tmp_path / "own.jinja"
    data.write_bytes(dataset.read_bytes())
    template.write_text("a")

    def count_after(**settings: Any) -> int:
        built = build(spec_for(data, **settings), folder, out)
        assert load(out) == built
        return reads.count

    assert count_after() == 1
    assert count_after() == count_after(inputs="float") == 1
    assert count_after(seed=5) == 2
    assert count_after(seed=5, packing="full") == 3
    assert count_after(chat_template=str(template)) == 4
    template.write_text("b")
    assert count_after(chat_template=str(template)) == 5
    data.write_text(data.read_text() + '{"text": "one more"}\n')
    assert count_after(chat_template=str(template)) == 6
    (folder / "chat_template.jinja").write_text("c")
    assert count_after(chat_template=str(template)) == 7
    monkeypatch.setattr(stage, "CODE_VERSION", 0)
    assert count_after(chat_template=str(template)) == 8
    assert count_after(chat_template=str(template)) == 8


def test_stored_tokens_have_the_documented_layout(tmp_path: Path, model: Path, dataset: Path) -> None:
    built = build(spec_for(dataset), model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "tokens.safetensors")
    assert tensors["ids"].dtype == np.int32
    assert tensors["lengths"].dtype == np.int64
    assert tensors["lengths"].tolist() == [len(row) for row in built.rows]
    assert tensors["ids"].tolist() == [token for row in built.rows for token in row]
    assert load(tmp_path / "out") == built


def test_damaged_folders_are_refused(tmp_path: Path, model: Path, dataset: Path) -> None:
    out = tmp_path / "out"
    build(spec_for(dataset), model, out)
    tensors = load_file(out / "tokens.safetensors")
    changed = tensors["ids"].copy()
    changed[0] += 1
    save_file({**tensors, "ids": changed}, out / "tokens.safetensors")
    with pytest.raises(CalibrationError, match="not those of its audit"):
        load(out)
    save_file({**tensors, "ids": changed[:-1].copy()}, out / "tokens.safetensors")
    with pytest.raises(CalibrationError, match="do not add up"):
        load(out)
    (out / "tokens.safetensors").write_bytes(b"half")
    with pytest.raises(CalibrationError, match="is not a whole calibration set") as caught:
        load(out)
    assert "remove the folder" in caught.value.remedy
    with pytest.raises(CalibrationError, match="is not a whole calibration set"):
        load(tmp_path / "absent")


def test_public_names() -> None:
    assert sorted(calibration.__all__) == calibration.__all__
    assert all(hasattr(calibration, name) for name in calibration.__all__)


WORDS = re.compile(r"\w+")


def shingles(text: str, size: int = 8) -> set[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def test_bundled_calibration_and_evaluation_data_are_apart() -> None:
    answers = records.read_file(PACKAGE / "eval_data" / "answers.jsonl").records
    prose = (PACKAGE / "eval_data" / "prose.txt").read_text(encoding="utf-8")
    mini = records.load("instructions_mini").records
    requests = {record.messages[0].content for record in mini}
    assert len(mini) >= 160
    assert len(requests) == len(set(mini)) == len(mini)
    assert not requests & {record.messages[0].content for record in answers}
    joined = [" ".join(message.content for message in record.messages) for record in answers]
    scored = shingles(prose).union(*map(shingles, joined))
    seen: set[tuple[str, ...]] = set().union(*(shingles(m.content) for record in mini for m in record.messages))
    assert not scored & seen
    assert len(prose.split()) + sum(len(text.split()) for text in joined) >= 8_000


def test_bundled_set_calibrates_a_model(tmp_path: Path, model: Path) -> None:
    audit = build(spec_for("instructions_mini", samples=128, max_length=512), model, tmp_path / "out").audit
    assert audit["rows"] == audit["records"]["used"] == 128
    assert audit["dataset"]["licence"] == "Apache-2.0"
    check_sums(audit)
