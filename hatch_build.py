"""A hook of hatchling: the README as package indexes show it, where relative links lead nowhere."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    """Gives the README links into the repository of `[project.urls]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the field `readme`, which pyproject.toml declares dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_index(text, address)}


def for_index(text: str, address: str | None) -> str:
    """Make links and images absolute, for a repository on GitHub; without an address, links become words and images go."""
    image, link = r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
    if address is None:
        without = re.sub(rf"^{image}(?:\n.+)*\n\n", "", text, flags=re.MULTILINE)
        return re.sub(link, r"\1", without)
    address = address.rstrip("/")
    return re.sub(link, rf"[\1]({address}/blob/HEAD/\2)", re.sub(image, rf"![\1]({address}/raw/HEAD/\2)", text))
