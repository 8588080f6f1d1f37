"""One root for every error that the library raises for its users."""

import ast
import importlib
from pathlib import Path

from classer.data.errors import ClasserError, InputError
from classer.serve.client import client
from classer.serve.wire import errors as wire
from classer.serve.wire.status import CODES

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "model", "train", "serve", "tools")
# Exceptions that are no error of a user's, and why.
EXEMPT = {
    "Stopped": "ends a run in good order after SIGTERM; the command turns it into an exit code of its own",
    "_Refused": "carries a finished HTTP response past every handler, so it is no Exception either",
}


def exception_classes(root: Path) -> dict[str, list[str]]:
    """Each class in the source whose bases lead to a built-in exception or to the root: its file and its bases."""
    classes = {}
    for file in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
                classes[node.name] = bases
    builtin = {name for name, value in vars(importlib.import_module("builtins")).items() if _is_exception(value)}

    def raised(name: str) -> bool:
        return name in builtin or any(raised(base) for base in classes.get(name, ()))

    return {name: bases for name, bases in classes.items() if raised(name)}


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def outside_the_tree(classes: dict[str, list[str]]) -> set[str]:
    def below(name: str) -> bool:
        return name == "ClasserError" or any(below(base) for base in classes.get(name, ()))

    return {name for name in classes if not below(name)}


def test_every_exception_of_the_library_has_the_one_root() -> None:
    classes = exception_classes(ROOT)
    assert {"ClasserError", "InputError", "ServeError", "Overloaded"} <= set(classes)
    assert outside_the_tree(classes) == set(EXEMPT)


def test_a_class_outside_the_tree_is_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = "class ClasserError(Exception): ...\nclass A(ClasserError): ...\n"
    (tmp_path / "data/errors.py").write_text(source + "class B(OSError): ...\nclass C(B): ...\nclass D: ...\n")
    assert outside_the_tree(exception_classes(tmp_path)) == {"B", "C"}


def test_the_clients_root_catches_files_options_and_requests() -> None:
    assert client.ClasserError is ClasserError
    assert issubclass(InputError, ClasserError)
    assert set(CODES) == set(wire.ServeError.__subclasses__())
    assert all(issubclass(error, client.ClasserError) for error in CODES)
    assert not issubclass(InputError, wire.ServeError)  # so that no server mistakes its own bug for a caller's
