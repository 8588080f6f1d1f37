"""What the documents tell people to type exists: commands, options, targets of make, names of the package."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest

import classer
from classer.tests.docs.pages import GUIDE, ROOT, blocks, commands, name_of, pages
from classer.tools.dev import make_reference as reference

NEWCOMER = 8


@functools.cache
def options_of(*command: str) -> frozenset[str]:
    """The long options of a command, and of its subcommands."""
    text = reference.help_of(*command)
    names = frozenset(re.findall(r"(--[a-z][\w-]*)", text))
    return names.union(*(options_of(*command, sub) for sub in reference.subcommands(text)))


def lines(page: Path) -> list[str]:
    return [line for block in blocks(page) if block.language == "bash" for line in commands(block)]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    presets = frozenset({"--preset", "--help"})
    for line in lines(page):
        words = shlex.split(line.rpartition(" | ")[2])
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words and words[0] in ("classer", ".venv/bin/classer", ".venv-aot/bin/classer"):
            command, *rest = words[1:]
            assert command in reference.commands(), f"{name_of(page)}: {line}"
            given = {word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)}
            unknown = given - options_of(command) - presets
            assert not unknown, f"{name_of(page)}: classer {command} has no {unknown}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_targets_of_make_and_scripts_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    |```bash\n)make ([a-z][a-z-]*)", text, flags=re.M):
        assert target in targets, f"{name_of(page)}: make {target}"
    for script in re.findall(r"(?<!/)\b((?:tools|tests|deploy|train|serve|model|data)/[\w/.-]+\.\w+)", text):
        assert (ROOT / script).exists(), f"{name_of(page)}: {script}"


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_python_blocks_compile_and_use_public_names(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{name_of(page)}:{block.line}", "exec")
            for name in re.findall(r"\bclasser\.(\w+)", block.text):
                assert name in vars(classer)["__all__"], f"{name_of(page)}:{block.line}: classer.{name}"


def test_the_readme_is_short_and_has_a_newcomers_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 500
    named = re.findall(r"^\| `classer ([a-z-]+)` \|", text, flags=re.M)
    assert len(named) == NEWCOMER
    assert set(named) <= set(reference.commands())


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_every_shell_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "json", "text"), f"{name_of(page)}:{block.line}"
        if block.language == "bash" and not block.not_run:
            assert "…" not in block.text, f"{name_of(page)}:{block.line}: cannot be run as it stands"
