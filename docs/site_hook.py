"""What MkDocs does besides when it builds the site: pages from outside of docs/, links to them, and what is refused."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LOG = logging.getLogger("mkdocs.hooks.site")
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE",
    "notebooks/first_report.ipynb": "first_report.ipynb",
    **{f"calib_data/{path.name}": f"data/{path.name}" for path in sorted((ROOT / "calib_data").iterdir())},
    "calib_data/README.md": "data.md",
    "reports/sample/report.html": "sample/report.html",
    "reports/sample/divergence.svg": "sample/divergence.svg",
}
"""Files of the repository that lie outside of docs/, and what each is called in the site."""
RECIPES = "recipes.md"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)|<link\b[^>]*?\bhref=[\"']?([^\"'\s>]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Leave out what git does not track, and add the pages from outside."""
    from mkdocs.structure.files import File

    tracked = tracked_files()
    for file in list(files):
        inside = file.abs_src_path and Path(config.docs_dir) in Path(file.abs_src_path).parents
        if inside and f"docs/{file.src_uri}" not in tracked:
            LOG.info("left out, as git does not track it: docs/%s", file.src_uri)
            files.remove(file)
    for source, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, RECIPES, content=recipes_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside of docs/ into links to their pages."""
    return relinked(markdown, page.file.src_uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load something from elsewhere."""
    for found in LOADED.finditer(output):
        address = found[1] or found[2]
        if urlsplit(address).netloc and not address.startswith(config.site_url or "//"):
            LOG.warning("%s loads %s from elsewhere", page.file.src_uri, address)
    return output


def tracked_files() -> set[str]:
    """What git tracks under docs/, from the root of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z", "docs"], cwd=ROOT, capture_output=True, check=True).stdout
    return set(listed.decode().split("\0"))


def relinked(markdown: str, uri: str) -> str:
    """A page's text with links as they are in the site.

    Args:
        markdown: the text, with links as they are in the repository.
        uri: what the page is called in the site.
    """
    homes = {name: source for source, name in OUTSIDE.items()}
    folder = PurePosixPath(homes.get(uri, f"docs/{uri}")).parent
    up = "../" * uri.count("/")

    def link(match: re.Match[str]) -> str:
        target = _joined(folder, match[1])
        if target in OUTSIDE:
            return up + OUTSIDE[target]
        if re.fullmatch(r"recipes/[\w-]+\.yaml", target):
            return f"{up}{RECIPES}#{PurePosixPath(target).stem}"
        if target == "README.md":
            return f"{up}index.md"
        return up + target.removeprefix("docs/") if uri in homes and target.startswith("docs/") else match[1]

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(link, markdown[end:])])


def recipes_page() -> str:
    """The recipes of the repository, each with its comment as text."""
    head = "# Recipes to begin with\n\nThey lie in the folder `recipes/` of the repository.\n"
    recipes = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    shown = (f'## {path.stem}\n\n```yaml title="recipes/{path.name}"\n{text}```\n' for path, text in recipes.items())
    return "\n".join([head, *shown])


def _joined(folder: PurePosixPath, target: str) -> str:
    """A relative link from a folder, as a path from the root of the repository."""
    parts: list[str] = []
    for part in (folder / target).parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
