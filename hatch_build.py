"""What the metadata has that depends on where quantkit is built: links to the repository that ``REPOSITORY_URL`` names.

PyPI shows the README apart from its repository, so that its relative links would lead nowhere. Without the variable
they stay as they are, and the metadata names no repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGE = re.compile(r"(!\[[^\]]*\]\()(?!\w+:|#)([^)\s]+)")
LINK = re.compile(r"((?<!!)\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?!\w+:|#)([^)\s]+)")


class RepositoryHook(MetadataHookInterface):
    """Adds the README and the addresses of the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in ``readme`` and ``urls``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        metadata["urls"] = {}
        if address:
            place = os.environ.get("GITHUB_REF_NAME", "HEAD")
            text = IMAGE.sub(rf"\g<1>{address}/raw/{place}/\g<2>", text)
            text = LINK.sub(rf"\g<1>{address}/blob/{place}/\g<2>", text)
            pages = {"Documentation": "blob/{0}/docs/index.md", "Changes": "blob/{0}/CHANGELOG.md", "Issues": "issues"}
            metadata["urls"] = {"Source": address}
            metadata["urls"] |= {name: f"{address}/{page.format(place)}" for name, page in pages.items()}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
