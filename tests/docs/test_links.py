"""Every relative link and anchor of the documents leads somewhere.

A page that stands in no table of contents is an error of `make docs`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from classer.tests.docs.pages import ROOT, anchors, links, name_of, pages


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_relative_links_and_anchors_exist(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}; there is no such file"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}; there is no such heading"


def test_pages_that_the_code_names_exist() -> None:
    for room in ("data", "model", "train", "serve", "tools", "tests"):
        for file in (ROOT / room).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text(encoding="utf-8")):
                assert (ROOT / page).exists(), f"{file.relative_to(ROOT)} names {page}"


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n\n[one](other.md#part) ![two](two.png)\n\n```text\n[three](three.md)\n```\n")
    assert links(page) == ["other.md#part", "two.png"]
    assert anchors(page) == {"a-title"}
