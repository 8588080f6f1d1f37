"""The documents as the tests read them: pages, links, anchors and code blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = tuple(ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md"))
GUIDE = (
    ROOT / "README.md",
    ROOT / "docs" / "install.md",
    ROOT / "docs" / "quickstart.md",
    *sorted((ROOT / "docs" / "guide").glob("*.md")),
)
_FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S)


def pages() -> list[Path]:
    """Every document, but for what a build has left."""
    return [*TOP, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
      language: of the fence.
      text: its lines.
      line: the number of its first one in the page.
      not_run: why the tests do not run it; empty where they do.
    """

    language: str
    text: str
    line: int
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(found["language"], found["text"], line, found["reason"] or "")


def prose(page: Path) -> str:
    """The page without code blocks, comments and code spans."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", text, flags=re.S)


def links(page: Path) -> list[str]:
    """The targets of the page's links and pictures, but for those of code blocks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """What `#…` may name: the headings of the first three levels, as GitHub and MyST write them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#{1,3} (.+)$", text, flags=re.M)}


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands(block: Block) -> list[str]:
    """The lines of a shell block, continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    return [line for line in (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in joined.splitlines()) if line]
