"""The glossary's words are linked where they first appear, in the order in which the site is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from classer.tests.docs.pages import ROOT, slug

DOCS = ROOT / "docs"
GLOSSARY = DOCS / "glossary.md"
WORDS = re.findall(r"^## (.+)$", GLOSSARY.read_text(encoding="utf-8"), flags=re.M)


def reading_order() -> list[Path]:
    """The pages of the site that are read, not looked up: home, start and guide, as its table of contents has them."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    contents = re.findall(r"^((?:guide/)?[a-z-]+)$", index, flags=re.M)
    return [
        DOCS / "index.md",
        *(path for name in contents if (path := DOCS / f"{name}.md").exists() and path != GLOSSARY),
    ]


def paragraphs(page: Path) -> str:
    """The page's prose and tables: without code, headings, and links to other pages than the glossary."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^#+ .*$|`[^`\n]*`", "", text, flags=re.M)
    return re.sub(r"\[[^\]]*\]\((?!\S*glossary\.md)\S*\)", "", text)


def test_there_are_25_words_in_their_order() -> None:
    assert len(WORDS) == 25
    assert sorted(WORDS, key=str.casefold) == WORDS


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_linked_where_it_first_appears(word: str) -> None:
    spelt = r"\s+".join(map(re.escape, word.split()))
    pattern = re.compile(rf"(?<![\w-]){spelt}(?:s|es)?(?![\w-])", flags=re.I)
    for page in reading_order():
        text = paragraphs(page)
        if first := pattern.search(text):
            linked = [
                link for link in re.finditer(r"\[([^\]]+)\]\((\S*glossary\.md#([\w-]+))\)", text)
                if link.start() < first.start() < link.end() and link[3] == slug(word)
            ]  # fmt: skip
            around = " ".join(text[max(0, first.start() - 40) : first.end() + 40].split())
            assert linked, f"docs/{page.relative_to(DOCS)}: '{word}' first appears here, unlinked: … {around} …"
            return
    pytest.fail(f"'{word}' appears nowhere")
