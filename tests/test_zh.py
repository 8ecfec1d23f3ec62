"""The Chinese pages keep step with the English: headings, keys, defaults, code and links, section by section.

What an English page says in words alone can change without these tests; a key, an option, a value, a link or a block of
code that comes or goes there must come or go in Chinese too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.page_commands import DOCS, blocks_of

PAGES = sorted(path.name for path in (DOCS / "zh").glob("*.md"))
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


class Section(NamedTuple):
    """What a heading has below it, down to the next one.

    Attributes:
        level: of the heading; 0 is what stands before the first.
        title: of the heading.
        blocks: fenced blocks without comments, by language.
        keys: first cells of table rows, as code.
        fixed: of tables of keys, the code in the cells of type and default.
        code: all code in running text and tables.
        links: targets outside of the page.
    """

    level: int
    title: str
    blocks: list[tuple[str, str]]
    keys: list[list[str]]
    fixed: list[list[str]]
    code: set[str]
    links: set[str]


def sections(path: Path) -> list[Section]:
    text = path.read_text(encoding="utf-8")
    hidden = FENCED.sub(lambda found: found[0].replace("\n#", "\n\0"), text)
    parts = re.split(r"^(#+) (.+)$", hidden, flags=re.MULTILINE)
    heads = zip([0, *map(len, parts[1::3])], ["", *parts[2::3]], [parts[0], *parts[3::3]], strict=True)
    return [section(path, level, title, body.replace("\0", "#")) for level, title, body in heads]


def section(path: Path, level: int, title: str, body: str) -> Section:
    prose = FENCED.sub("", body)
    rows = [line.strip("|").split(" | ") for line in prose.splitlines() if line.startswith("| `")]
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    return Section(
        level,
        title,
        [(language, re.sub(r" *#.*", "", content)) for language, _, content in blocks_of(body)],
        [CODE.findall(row[0]) for row in rows],
        [sorted(CODE.findall(" ".join(row[1:3]))) for row in rows if len(row) == 4],
        {" ".join(found.split()) for found in CODE.findall(prose)},
        {(path.parent / target).resolve().as_posix().replace("/zh/", "/") for target in targets if ":" not in target},
    )


def pairs(name: str) -> list[tuple[Section, Section]]:
    english, chinese = sections(DOCS / name), sections(DOCS / "zh" / name)
    assert [each.level for each in english] == [each.level for each in chinese], (
        f"{name}: a heading is missing or new: {[each.title for each in english]}, {[each.title for each in chinese]}"
    )
    return list(zip(english, chinese, strict=True))


def test_there_are_a_quickstart_and_the_recipe_reference() -> None:
    assert PAGES == ["quickstart.md", "recipe.md"]


@pytest.mark.parametrize("name", PAGES)
def test_tables_have_the_same_keys_with_the_same_values(name: str) -> None:
    for english, chinese in pairs(name):
        assert chinese.keys == english.keys, f"{name}, {english.title}: rows of the table"
        assert chinese.fixed == english.fixed, f"{name}, {english.title}: types and defaults"


@pytest.mark.parametrize("name", PAGES)
def test_code_is_the_same_but_for_comments(name: str) -> None:
    for english, chinese in pairs(name):
        assert chinese.blocks == english.blocks, f"{name}, {english.title}"


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_in_english_is_named_in_chinese(name: str) -> None:
    for english, chinese in pairs(name):
        missing, gone = english.code - chinese.code, chinese.code - english.code
        assert not missing, f"{name}, {english.title}: not in Chinese: {missing}"
        assert not gone, f"{name}, {english.title}: in Chinese alone: {gone}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_the_same_pages(name: str) -> None:
    for english, chinese in pairs(name):
        assert english.links <= chinese.links, f"{name}, {english.title}: {english.links - chinese.links}"


@pytest.mark.parametrize("name", PAGES)
def test_they_are_in_chinese(name: str) -> None:
    text = CODE.sub("", FENCED.sub("", (DOCS / "zh" / name).read_text(encoding="utf-8")))
    letters = len(re.findall(r"[\u4e00-\u9fff]", text))
    assert letters > len(re.findall(r"\b[A-Za-z]{3,}\b", text)) * 4
