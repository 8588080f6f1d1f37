"""One name, one sense: a public name of the library is defined in one module only."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "model", "train", "serve", "tools")
OUTSIDE = {"tools/bench", "tools/dev", "serve/proto"}  # not of the library, or generated

# Names that several modules define in the same sense.
SHARED = {
    "load": "`classer.load`, and the `Format` protocol of an export",
    "usage": "the `Format` protocol of an export",
    "write": "the `Format` protocol of an export",
    "MODEL": "the file of an export's program",
    "RECIPE": "the recipe of a preset, which is found by this name",
    "prepare": "one command and its two runners",
    "evaluate": "a command and the function that does its work",
    "focus_report": "a command and the function that does its work",
    "serve": "a command and the function that does its work",
    "teach": "a command and the function that does its work",
    "train": "a command and the function that does its work",
    "main": "the entry point of a script",
    "logger": "the logger of its module",
    "tf": "TensorFlow, imported where it is installed",
    "T": "a type variable",
}


def definitions() -> dict[str, set[str]]:
    """The modules that define each public name."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            module = file.relative_to(ROOT).as_posix()
            if any(module.startswith(folder) for folder in OUTSIDE):
                continue
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    names = [node.name]
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [target.id for target in targets if isinstance(target, ast.Name)]
                else:
                    names = []
                for name in names:
                    if not name.startswith("_"):
                        found[name].add(module)
    return found


def test_each_public_name_is_defined_in_one_module() -> None:
    several = {name: sorted(modules) for name, modules in definitions().items() if len(modules) > 1}
    assert {name: modules for name, modules in several.items() if name not in SHARED} == {}
    assert sorted(SHARED.keys() - several.keys()) == []  # reasons that no longer have a name
