"""The generated pages say what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from classer.tests.docs.pages import ROOT
from classer.tools.dev import make_reference as reference

WRITERS: dict[str, Callable[[], str]] = {
    "reference/command-line.md": reference.command_line,
    "reference/configuration.md": reference.configuration,
    "reference/grpc.md": reference.grpc,
    "reference/http.md": reference.http,
    "reference/metrics.md": reference.metrics,
    "internals/properties.md": reference.properties,
}


def test_the_pages_are_these() -> None:
    assert {str(path) for path in reference.pages()} == set(WRITERS)


@pytest.mark.parametrize("page", WRITERS)
def test_a_page_is_what_the_code_says(page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == WRITERS[page](), f"docs/{page} is stale: make reference"


def test_every_option_of_every_help_is_on_the_page() -> None:
    """Read from the help without the generator's own parser."""
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", page, flags=re.M)}
    seen: set[str] = set()
    for command in reference.commands():
        text = reference.help_of(command)
        texts = [text, *(reference.help_of(command, sub) for sub in reference.subcommands(text))]
        options = {option for one in texts for option in re.findall(r"^│ (--[a-z][\w-]*)", one, flags=re.M)}
        seen |= options
        missing = {option for option in options if f"`{option}" not in sections[f"classer {command}"]}
        assert not missing, f"classer {command}: {missing}"
    assert len(seen) > 100


def test_a_change_of_a_help_is_seen() -> None:
    box = (
        "usage: x\n\nWhat it does.\n\n╭─ arguments ───╮\n"
        "│ INPUT …  files (required) │\n╰──╯\n╭─ options ───╮\n│ -h, --help  show this │\n"
        "│ --data {None}|PATH │\n│     a file,  │\n│     or none. (default: None) │\n"
        "│ --n INT  how many. (default: 3) │\n╰──╯\n"
    )
    assert list(reference.options(box)) == [
        reference.Option("arguments", "INPUT …", "required", "files"),
        reference.Option("options", "-h, --help", "", "show this"),
        reference.Option("options", "--data PATH", "", "a file, or none."),
        reference.Option("options", "--n INT", "3", "how many."),
    ]
    assert reference.summary(box) == "What it does."


def test_attributes_of_a_docstring() -> None:
    doc = "Title.\n\nAttributes:\n  one, two: both\n    of them.\n  three: alone.\n\nRaises:\n  InputError: no.\n"
    assert reference.attributes_of(doc) == {"one": "both of them.", "two": "both of them.", "three": "alone."}


def test_every_field_of_the_configuration_is_explained() -> None:
    page = Path(ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert not re.findall(r"^\| `(\w+)` .*\|  \|$", page, flags=re.M)
