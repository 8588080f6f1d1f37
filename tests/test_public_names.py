"""The package's public names: what importing and using them loads, and the warning of the other product's package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import classer
from classer.tests.test_import_law import loads

HEAVY = {"jax", "tensorflow", "aqt", "grpc"}


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """A new process, with folders in front of the module search path."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": ""},
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loads("import classer; dir(classer)") & HEAVY
    done = run(
        "import sys; before = set(sys.modules); import classer\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names))"
    )
    assert done.stdout.split() == ["classer"]
    assert done.stderr == ""


def test_each_name_loads_only_what_it_needs() -> None:
    assert not loads("import classer; classer.InputError, classer.ClasserError") & HEAVY
    assert loads("import classer; classer.Client, classer.AsyncClient") & HEAVY == {"grpc"}
    assert loads("import classer; classer.load, classer.LocalModel") & HEAVY == {"jax"}


def test_every_public_name_is_there_and_listed() -> None:
    assert sorted(classer._PUBLIC) == sorted(classer.__all__)
    for name in classer.__all__:
        assert getattr(classer, name).__name__ == name
        assert name in dir(classer)
    with pytest.raises(AttributeError, match="module 'classer' has no attribute 'Clasifier'"):
        _ = classer.Clasifier  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from classer import Clasifier  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize(("name", "missing", "extra"), [("load", "safetensors", "[local]")])
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(
    name: str, missing: str, extra: str
) -> None:
    done = run(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import classer\n"
        f"try: classer.{name}\n"
        "except classer.InputError as e: print(e)"
    )
    sentence = f"classer.{name} needs {missing}, not installed here: pip install 'classer-turbine{extra}'"
    assert done.stdout.strip() == sentence, done.stderr


@pytest.mark.parametrize(
    ("folder", "warned"),
    [
        ("classer-2.3.1.dist-info", True),
        ("classer-2.3.1-py3.11.egg-info", True),
        ("classer-2.3.1.egg-info", True),
        ("classer_turbine-0.1.0.dist-info", False),
        ("classer-turbine-0.1.0.dist-info", False),
        ("classerly-1.0.dist-info", False),
    ],
)
def test_the_other_distribution_of_this_name_is_warned_of_once(tmp_path: Path, folder: str, warned: bool) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "METADATA").write_text("Metadata-Version: 2.1\nName: classer\nVersion: 2.3.1\n")
    done = run("import classer, importlib; import classer.data.errors", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Another product") == int(warned)
    assert (str(tmp_path) in done.stderr) is warned


def test_looking_for_it_takes_no_time() -> None:
    code = "import classer, time; t = time.perf_counter(); classer._warn_of_the_other_classer()\n"
    done = run(code + "print(time.perf_counter() - t)")
    assert float(done.stdout) < 0.1
