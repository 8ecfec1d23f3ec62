"""Calibration records that are no records."""

from __future__ import annotations

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place


def read(place: Place, name: str, content: str | bytes) -> list[str]:
    file = place.write(name, content)
    options = ["--method", "gptq", "--group-size", "32", "--calibration", str(file), "--samples", "4"]
    return ["quantize", place.sound("single"), "-o", place.out, *options]


@case("holds no records")
def nothing(place: Place) -> list[str]:
    return read(place, "data.jsonl", "\n\n")


@case("not UTF-8")
def not_utf8(place: Place) -> list[str]:
    return read(place, "data.jsonl", bytes(range(256)))


@case("line 2")
def a_line_that_is_cut(place: Place) -> list[str]:
    return read(place, "data.jsonl", '\n{"text": \n')


@case("JSON")
def deep(place: Place) -> list[str]:
    return read(place, "data.jsonl", '{"text": ' + "[" * 200_000)


@case("JSON")
def a_number_of_a_million_digits(place: Place) -> list[str]:
    return read(place, "data.json", "[" + "9" * 1_000_000 + "]")


@case("frage")
def unknown_columns(place: Place) -> list[str]:
    return read(place, "data.jsonl", '{"frage": "a", "antwort": "b"}\n')


@case("text")
def texts_that_are_numbers(place: Place) -> list[str]:
    return read(place, "data.jsonl", '{"text": 5}\n' * 5)


@case("Unicode")
def texts_that_are_half_a_letter(place: Place) -> list[str]:
    return read(place, "data.jsonl", '{"text": "\\ud800"}\n' * 5)


@case("role")
def messages_of_no_role(place: Place) -> list[str]:
    return read(place, "data.jsonl", '{"messages": [{"role": "root", "content": "x"}]}\n' * 5)


@case("list of objects")
def an_object_for_a_list(place: Place) -> list[str]:
    return read(place, "data.json", '{"a": 1}')


@case("Parquet")
def parquet_of_no_kind(place: Place) -> list[str]:
    return read(place, "data.parquet", b"PAR1" + b"\0" * 100 + b"PAR1")


@case("Parquet")
def parquet_that_lies_of_its_footer(place: Place) -> list[str]:
    return read(place, "data.parquet", b"PAR1" + b"\x15" * 64 + (1 << 31).to_bytes(4, "little") + b"PAR1")


@case("suffix")
def a_pickle(place: Place) -> list[str]:
    return read(place, "data.pkl", b"\x80\x04.")


@case("dataset_info.json")
def a_registry_that_is_deep(place: Place) -> list[str]:
    place.write("data/dataset_info.json", "[" * 200_000)
    options = ["--method", "gptq", "--group-size", "32", "--calibration", f"llamafactory:{place.inside}/data/x"]
    return ["quantize", place.sound("single"), "-o", place.out, *options]
