"""Records with images: how they are read, and how they calibrate a model that sees."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit import records
from quantkit.calibration import CalibrationSet, build
from quantkit.calibration.model import load_tokenizer
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CalibrationError, MissingDependencyError
from quantkit.exports import open_export
from quantkit.recipe import CalibrationSpec
from quantkit.records.formats import parse
from quantkit.records.record import Record, UnusableError
from tests.seeing import IMAGE_TOKENS, draw_image, make_seeing
from tests.tiny import make_model

CPU = torch.device("cpu")
QUESTION, ANSWER = "<image>\nWhat is it?", "A test."
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


@pytest.mark.parametrize(
    ("row", "images", "first"),
    [
        ({"image": "a.png", "conversations": SHAREGPT}, ("a.png",), QUESTION),
        ({"images": ["a.png"], "messages": [{"role": "user", "content": QUESTION}]}, ("a.png",), QUESTION),
        ({"images": ["a.png"], "instruction": "What is it?", "output": ANSWER}, ("a.png",), QUESTION),
        ({"images": [{"bytes": b"x", "path": "a.png"}], "conversations": SHAREGPT}, (b"x",), QUESTION),
        ({"images": [{"bytes": None, "path": "a.png"}], "conversations": SHAREGPT}, ("a.png",), QUESTION),
        ({"messages": PARTS}, ("a.png",), "<image>What is it?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, "Look."]}], "images": ["b.png"]},
            ("b.png",),
            "<image>Look.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            ("data:,",),
            "<image>",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "No."}]}]}, (), "No."),
        ({"conversations": SHAREGPT}, (), QUESTION),
    ],
)
def test_images_of_every_form_are_found(row: dict[str, Any], images: tuple[Any, ...], first: str) -> None:
    record = parse(row)
    assert record.images == images
    assert record.messages[0].content == first


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a", "b", "c"], "text": "<image> and <image>"}, "holds 3 images and 2 times '<image>'"),
        ({"images": [7], "text": "x"}, "an image is a number where a path should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "a part of type 'video', which is no text",
        ),
    ],
)
def test_rows_whose_images_cannot_be_placed_are_skipped_with_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        parse(row)


def test_paths_of_images_start_at_the_folder_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "text": "x"}]))
    assert records.load(str(tmp_path / "rows.json")).records == [
        Record(text="<image>\nx", images=(str(tmp_path / "a.png"),))
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "rows.json").rename(tmp_path / "deep" / "rows.json")
    entry = {"file_name": "deep/rows.json", "columns": {"images": "image", "text": "text"}}
    sharegpt = {"file_name": "deep/chat.json", "formatting": "sharegpt", "columns": {"images": "pictures"}}
    (tmp_path / "deep" / "chat.json").write_text(json.dumps([{"pictures": ["a.png"], "conversations": SHAREGPT}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": entry, "chat": sharegpt}))
    found = records.load(f"llamafactory:{tmp_path}/chat").records
    assert [record.images for record in found] == [(str(tmp_path / "a.png"),)]


def test_a_template_that_wants_parts_is_given_parts(tmp_path: Path) -> None:
    """It lies in a file of the processor, and writes nothing for a content that is a text."""
    tokenizer = load_tokenizer(make_seeing(tmp_path))
    assert records.render(parse({"messages": [{"role": "user", "content": "Hi."}]}), tokenizer) == "user: Hi."
    seen = records.render(parse({"messages": PARTS}), tokenizer)
    assert seen == f"user: <image>\nWhat is it?assistant: {ANSWER}"


def test_texts_and_questions_are_scored_without_records_that_have_images(tmp_path: Path) -> None:
    from quantkit.evaluation.answers import load_questions
    from quantkit.evaluation.texts import load_text
    from quantkit.recipe.evaluation import AnswerSpec, TextSpec

    tokenizer = load_tokenizer(make_model(tmp_path / "model"))
    file = tmp_path / "rows.json"
    plain = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    file.write_text(json.dumps([*plain, {"image": "a.png", "instruction": "What is it?", "output": ANSWER}]))
    found = load_questions(AnswerSpec(file=str(file), samples=4, max_new_tokens=4), tokenizer, set(), 200)
    assert len(found.items) == 3
    assert found.left_out["has images"] == 1
    tokens = load_text(TextSpec(name="held-out", file=str(file)), tokenizer, 1000)
    assert tokens.skipped_records == 1
    assert "What is it" not in tokenizer.decode(tokens.ids)
    file.write_text(json.dumps([{"image": "a.png", "text": "x"}]))
    with pytest.raises(CalibrationError, match="each of its 1 records has images"):
        load_text(TextSpec(name="held-out", file=str(file)), tokenizer, 1000)


# With Pillow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees."""
    return make_seeing(tmp_path_factory.mktemp("model"))


def written(folder: Path, *rows: dict[str, Any], **image: Any) -> Path:
    """A data set of rows beside ``a.png``."""
    pytest.importorskip("PIL")
    folder.mkdir(exist_ok=True)
    draw_image(folder / "a.png", **image)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


ROWS = ({"image": "a.png", "conversations": SHAREGPT}, {"text": "A plain text, and more of it."})


def calibrated(model: Path, dataset: Path, out: Path, **changes: Any) -> CalibrationSet:
    return build(CalibrationSpec(dataset=str(dataset), **{"samples": 4, "max_length": 64} | changes), model, out)


@pytest.mark.parametrize("packing", ["none", "full"])
def test_a_record_with_images_is_a_row_with_further_inputs(tmp_path: Path, model: Path, packing: str) -> None:
    dataset = written(tmp_path / "data", *ROWS)
    found = calibrated(model, dataset, tmp_path / "out", packing=packing, max_length=16 if packing == "full" else 64)
    if packing == "full":
        assert found.audit["records"]["dropped"] == {"longer than max_length with its images": 1}
        return
    (place,) = found.inputs
    image_token = json.loads((model / "config.json").read_text())["image_token_index"]
    assert found.rows[place].count(image_token) == IMAGE_TOKENS
    assert found.inputs[place]["pixel_values"].shape == (1, 3, 32, 32)
    assert found.audit["images"] == 1
    records_ = found.audit
    assert records_["encoded_tokens"] == found.tokens + sum(
        records_[f"{kind}_tokens"] for kind in ("cropped", "truncated", "dropped")
    )
    again = calibrated(model, dataset, tmp_path / "out", packing=packing)
    assert again.sha256 == found.sha256
    assert torch.equal(again.inputs[place]["pixel_values"], found.inputs[place]["pixel_values"])


def test_another_image_is_another_calibration_set(tmp_path: Path, model: Path) -> None:
    dataset = written(tmp_path / "data", *ROWS)
    first = calibrated(model, dataset, tmp_path / "out")
    draw_image(tmp_path / "data" / "a.png", seed=1)
    second = calibrated(model, dataset, tmp_path / "out")
    assert first.rows == second.rows
    assert first.sha256 != second.sha256


def test_a_tower_that_is_loaded_sees_what_transformers_sees(tmp_path: Path, model: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    found = calibrated(model, written(tmp_path / "data", *ROWS), tmp_path / "out")
    ((place, inputs),) = found.inputs.items()
    skeleton, reader = Skeleton(model), CheckpointReader(model)
    skeleton.load_frame(reader, CPU, torch.float32, towers=True)
    for segment in [*skeleton.segments, *([skeleton.head] if skeleton.head else [])]:
        skeleton.load(segment, reader, CPU, torch.float32)
    ids = torch.tensor([found.rows[place]])
    whole: Any = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=ids, **inputs).logits
        torch.testing.assert_close(skeleton.text(input_ids=ids, **inputs).logits, expected, rtol=1e-4, atol=1e-4)
        blind = whole(input_ids=ids).logits
    assert not torch.allclose(blind, expected, atol=1e-3)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_layers_are_calibrated_on_what_the_tower_makes_of_images(tmp_path: Path, model: Path, inputs: str) -> None:
    codes = []
    for seed in (0, 1):
        dataset = written(tmp_path / f"data{seed}", *ROWS, seed=seed)
        calibration = {"dataset": str(dataset), "samples": 4, "max_length": 64, "inputs": inputs}
        out = quantkit.quantize(
            model, method="gptq", bits=4, group_size=32, out=tmp_path / f"out{seed}", calibration=calibration,
            device="cpu",
        )  # fmt: skip
        layers = json.loads((out / "stage.json").read_text())["facts"]["layers"]
        assert {layer["tokens"] for layer in layers} == {sum(map(len, calibrated(model, dataset, tmp_path / "c").rows))}
        export = open_export(out)
        codes.append(torch.cat([export.decodable(name).dequantize(torch.float32).flatten() for name in export.schemes]))
    assert not torch.equal(*codes)


def test_what_the_processor_needs_travels_with_the_checkpoint(tmp_path: Path, model: Path) -> None:
    out = quantkit.quantize(model, method="rtn", bits=4, group_size=32, out=tmp_path / "out", device="cpu")
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("b.png", r"record 0: .*b\.png is not there"),
        ("rows.json", r"record 0: .*rows\.json is no image that Pillow reads"),
        ("https://example.org/a.png", r"record 0: https://example\.org/a\.png is on the network"),
        ("data:image/png;base64,%%%", r"record 0: the image is no image that Pillow reads"),
    ],
)
def test_images_that_cannot_be_read_are_one_line(tmp_path: Path, model: Path, image: str, text: str) -> None:
    dataset = written(tmp_path / "data", {"image": image, "text": "x"})
    with pytest.raises(CalibrationError, match=text):
        calibrated(model, dataset, tmp_path / "out")


def test_an_image_may_stand_in_the_record_itself(tmp_path: Path, model: Path) -> None:
    dataset = written(tmp_path / "data", {"image": "a.png", "text": "What is it?"})
    address = "data:image/png;base64," + base64.b64encode((tmp_path / "data" / "a.png").read_bytes()).decode()
    first = calibrated(model, dataset, tmp_path / "first")
    dataset.write_text(json.dumps([{"image": address, "text": "What is it?"}]))
    assert calibrated(model, dataset, tmp_path / "second").sha256 == first.sha256


def test_of_images_for_a_model_that_does_not_see_the_text_is_kept_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, {"image": "a.png", "text": "<image>"}]))
    model = make_model(tmp_path / "model")
    found = calibrated(model, tmp_path / "rows.json", tmp_path / "out")
    texts = [load_tokenizer(model).decode(row) for row in found.rows]
    assert any("What is it?" in text and ANSWER in text for text in texts)
    assert not any("<image>" in text for text in texts)
    told = found.audit["records"]
    assert told["changed"] == {"its images left out: the model does not see": {"count": 1, "first": [0]}}
    assert told["dropped"] == {"nothing but images in a turn, and the model does not see": 1}


def test_a_model_that_sees_without_its_processor_is_named(tmp_path: Path, model: Path) -> None:
    dataset = written(tmp_path / "data", *ROWS)
    blind = shutil.copytree(model, tmp_path / "blind", ignore=shutil.ignore_patterns("*processor_config.json"))
    with pytest.raises(CalibrationError, match=r"record 0 has images, and .* has no processor of images"):
        calibrated(blind, dataset, tmp_path / "out")


def test_one_image_that_cannot_be_read_loses_its_record_alone(tmp_path: Path, model: Path) -> None:
    dataset = written(tmp_path / "data", {"image": "b.png", "text": "x"}, *ROWS)
    found = calibrated(model, dataset, tmp_path / "out")
    assert found.audit["records"]["dropped_indices"] == {"its image is not there": {"count": 1, "first": [0]}}
    assert found.audit["records"]["used"] == 2


def test_what_a_processor_needs_is_said(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is asked for: a processor of videos beside that of images has none but torchvision's."""
    from transformers import AutoProcessor

    def load(*_: Any, **options: Any) -> None:
        assert "backend" not in options
        raise ImportError("\nVideoProcessor requires the Torchvision library but it was not found.\nInstall it.")

    dataset = written(tmp_path / "data", *ROWS)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    with pytest.raises(CalibrationError, match="loaded: ImportError: VideoProcessor requires the Torchvision"):
        calibrated(model, dataset, tmp_path / "out")


def test_without_pillow_the_way_to_get_it_is_said(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:1]))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"record 0, which has images, needs .* 'pillow'") as caught:
        calibrated(model, tmp_path / "rows.json", tmp_path / "out")
    assert caught.value.remedy == "pip install 'quantkit-ptq[vision]'"


# The tower itself


def with_tower(model: Path, dataset: Path, out: Path, method: str, inputs: str = "quantized") -> Path:
    return quantkit.quantize(
        model, method=method, bits=4, group_size=32, out=out, device="cpu", overrides={"vision_tower": {"bits": 8}},
        calibration={"dataset": str(dataset), "samples": 4, "max_length": 64, "inputs": inputs},
    )  # fmt: skip


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_tower_is_quantized_on_request_and_calibrated_by_images(
    tmp_path: Path, model: Path, method: str, inputs: str
) -> None:
    from transformers import LlavaForConditionalGeneration

    out = with_tower(model, written(tmp_path / "data", *ROWS), tmp_path / "out", method, inputs)
    facts = json.loads((out / "stage.json").read_text())["facts"]
    tower = [layer for layer in facts["layers"] if layer["name"].startswith("vision_tower.")]
    skeleton = Skeleton(model)
    assert len(tower) == sum(len(segment.layers) for segment in skeleton.towers) > 0
    # what the last of them makes is not read, as LLaVA takes the states before it
    assert {layer["tokens"] for layer in tower} == {IMAGE_TOKENS + 1}
    assert any(note.startswith("float: the rest of vision_tower (") for note in facts["notes"])
    ((place, images),) = calibrated(model, tmp_path / "data" / "rows.json", tmp_path / "c").inputs.items()
    rows = calibrated(model, tmp_path / "data" / "rows.json", tmp_path / "c").rows
    plain, packed = (LlavaForConditionalGeneration.from_pretrained(each, dtype=torch.float32) for each in (model, out))
    with torch.no_grad():
        expected, found = (each(input_ids=torch.tensor([rows[place]]), **images).logits for each in (plain, packed))
    assert not torch.equal(found, expected)
    divergence = (expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert divergence < 0.1


def test_without_images_a_tower_is_solved_from_its_weights_and_that_is_said(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[1:]))
    out = with_tower(model, tmp_path / "rows.json", tmp_path / "out", "gptq")
    layers = json.loads((out / "stage.json").read_text())["facts"]["layers"]
    tower = [layer for layer in layers if layer["name"].startswith("vision_tower.")]
    assert tower
    assert all("no calibration token reached" in layer["notes"][0] for layer in tower)


def test_a_tower_that_stays_float_is_told(tmp_path: Path, model: Path) -> None:
    asked: dict[str, Any] = {"bits": 4, "group_size": 32, "overrides": {"[qkv]_proj": {"bits": 8}}}
    out = quantkit.quantize(model, method="rtn", out=tmp_path / "out", device="cpu", **asked)
    assert not any(name.startswith("vision_tower") for name in open_export(out).schemes)
    notes = json.loads((out / "stage.json").read_text())["facts"]["notes"]
    assert any(note.startswith("float: vision_tower (") and "text passes it by" in note for note in notes)
