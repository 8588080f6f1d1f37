"""Each name in back-ticks, in a docstring or a comment, that begins with a module of ours exists."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("data", "model", "train", "serve", "tools")
REFERENCE = re.compile(r"`((?:classer\.)?[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`")
FILE_ENDINGS = {"csv", "gz", "html", "json", "jsonl", "md", "onnx", "png", "proto", "py", "safetensors", "tsv", "txt"}
PARAMETERS = ("encoder.embeddings.", "encoder.layer", "encoder.final_norm", "encoder.gate_", "head.")  # in weights

# A module's names, and of each class its attributes; None where these are not known.
Names = dict[str, set[str] | None]
Modules = dict[tuple[str, ...], Names]


def names_of(tree: ast.Module) -> Names:
    """What a module defines or imports."""
    names: Names = {}
    for node in ast.walk(ast.Module([n for n in tree.body if not isinstance(n, SCOPES)], [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0]: None for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inherits = any(not isinstance(base, ast.Name) or base.id not in PLAIN_BASES for base in node.bases)
            names[node.name] = None if inherits else attributes_of(node)
        elif isinstance(node, SCOPES):
            names[node.name] = None
    return names


SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PLAIN_BASES = {"NamedTuple", "Protocol", "Exception", "ValueError"}


def attributes_of(node: ast.ClassDef) -> set[str]:
    found = {child.name for child in node.body if isinstance(child, SCOPES)}
    for child in ast.walk(node):
        if isinstance(child, ast.Name | ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.id if isinstance(child, ast.Name) else child.attr)
    return found


def texts(source: str, tree: ast.Module) -> Iterator[str]:
    """The docstrings and comments of a file; the lines of a comment together."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *SCOPES)) and (doc := ast.get_docstring(node)):
            yield doc
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    yield " ".join(comment.lstrip("# ") for comment in comments)


def variables_of(tree: ast.Module) -> set[str]:
    """Arguments, fields and variables of a file: `config.num_layers` then speaks of one of them."""
    found = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return found | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def exists(name: str, modules: Modules) -> bool | None:
    """Whether a dotted name exists; None if it begins with no module or folder of ours."""
    parts = tuple(name.removeprefix("classer.").split("."))
    ours = None
    for length in range(1, len(parts) + 1):
        head, rest = parts[:length], parts[length:]
        for path, names in modules.items():
            if path[-length:] == head:
                ours = ours or False
                if not rest or (rest[0] in names and has_attribute(names[rest[0]], rest[1:])):
                    return True
            elif any(path[i : i + length] == head for i in range(len(path) - length)):  # a folder
                ours = ours or False
                if not rest:
                    return True
    return ours


def has_attribute(attributes: set[str] | None, rest: tuple[str, ...]) -> bool:
    return not rest or attributes is None or rest[0] in attributes


def stale(source: str, modules: Modules) -> list[str]:
    """The names in a file's docstrings and comments that do not exist."""
    tree = ast.parse(source)
    variables = variables_of(tree)
    found = []
    for text in texts(source, tree):
        for name in REFERENCE.findall(text):
            first, last = name.split(".")[0], name.split(".")[-1]
            if last in FILE_ENDINGS or first in variables or name.startswith(PARAMETERS):
                continue
            if exists(name, modules) is False:
                found.append(name)
    return found


def sources() -> dict[tuple[str, ...], str]:
    """The library's files by their dotted paths, such as ("model", "focus")."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in file.name]
    paths = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {
        path[:-1] if path[-1] == "__init__" else path: file.read_text(encoding="utf-8") for file, path in paths.items()
    }


@pytest.fixture(scope="module")
def modules() -> Modules:
    return {path: names_of(ast.parse(source)) for path, source in sources().items()}


def test_each_name_in_a_docstring_or_a_comment_exists(modules: Modules) -> None:
    wrong = {".".join(path): found for path, source in sources().items() if (found := stale(source, modules))}
    assert not wrong


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("focus.UNITS", True),
        ("model.focus.UNITS", True),
        ("classer.model.focus", True),
        ("focus.Focus.parse", True),
        ("focus.Focus.units", True),
        ("serve.core", True),
        ("focus.Focus.percent", False),
        ("focus.SHARES", False),
        ("model.encoder._Tokens", False),
        ("core.work.Nothing", False),
        ("jax.Array", None),
        ("Focus.parse", None),
    ],
)
def test_a_name_that_does_not_exist_is_noticed(modules: Modules, name: str, answer: bool | None) -> None:
    assert exists(name, modules) is answer
    for text in (f'"""See `{name}`."""', f"# See `{name}()`.", f'def f():\n    """See\n    `{name}`."""'):
        assert stale(text, modules) == ([name] if answer is False else [])
