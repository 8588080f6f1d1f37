"""The distribution: its name, its extras, and the wheel in new environments (slow)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from classer.data.extras import DISTRIBUTION, install_command

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# `pip install …` of the name that is another product's on the package index; with our suffix it is ours.
FOREIGN = re.compile(r"(?:pip|uv|pipx|poetry)\s+(?:install|add)\s[^\n]*?(?<![\w./-])classer(?![\w-])(?!\.)")
HINT = re.compile(r"classer-turbine\[([\w,]+)\]")

# extra → what a user of it runs first
IMPORTS = {
    "": "import classer; classer.Client; classer.AsyncClient",
    "local": "import classer; classer.load",
    "serve": "import classer.serve.rpc.server",
    "train": "import classer.train.run",
    "prepare": "import classer.data.prepare.on_beam",
    "http": "import classer.serve.gateway.app",
    "otel": "from classer.serve.ops.tracing import Tracing; Tracing('http://localhost:4317').close()",
    "teachers": "from classer.train.teach import import_torch; import_torch('the test')",
    "onnx": "from classer.tools.export.formats import FORMATS; FORMATS['onnx'].load_module()",
    "openvino": "from classer.tools.export.formats import FORMATS; FORMATS['openvino'].load_module()",
    "litert": "from classer.tools.export.formats import FORMATS; FORMATS['litert'].load_module()",
}


def tracked_text() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = [ROOT / name for name in names if name and not name.endswith((".png", ".txtpb"))]
    return [file for file in files if file.is_file() and file != Path(__file__).resolve()]


def test_nothing_says_to_install_the_other_product() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("skipped: not a git checkout")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in tracked_text()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if FOREIGN.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "foreign"),
    [
        ("pip install classer", True),
        ("run `pip install 'classer[serve]'` first", True),
        ("uv pip install --upgrade classer", True),
        ("python -m pip install classer==1.0", True),
        ("pip install classer-turbine", False),
        ("pip install 'classer-turbine[serve,http]'", False),
        ("pip install -e '.[dev]'", False),
        ("pip install optax && python -m classer.tools.cli", False),
        ("/opt/classer/bin/pip install --no-cache-dir .", False),
    ],
)
def test_the_search_for_the_other_product_tells_them_apart(line: str, foreign: bool) -> None:
    assert bool(FOREIGN.search(line)) is foreign


def test_the_distribution_has_a_name_of_its_own() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "classer-turbine"


def test_every_extra_that_a_file_names_exists() -> None:
    for file in tracked_text():
        for names in HINT.findall(file.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= EXTRAS.keys(), file


def test_the_sentence_names_distribution_and_extras() -> None:
    assert install_command("serve", "http") == "pip install 'classer-turbine[serve,http]'"
    assert install_command() == "pip install classer-turbine"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".git", ".venv*", ".pyright", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_no_bench(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("classer_turbine-")
    for room in ("data", "model", "train", "serve", "tools"):
        for file in (ROOT / room).rglob("*.py"):
            name = f"classer/{file.relative_to(ROOT)}"
            inside = not name.startswith(("classer/tools/bench/", "classer/tools/dev/"))
            assert (name in names) is inside, name
    assert not [name for name in names if name.startswith("classer/tests/")]


@pytest.mark.slow
@pytest.mark.parametrize("extra", IMPORTS, ids=lambda extra: extra or "base")
def test_the_wheel_installs_with_each_extra(
    wheel: Path, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints a row of the table in docs/benchmarks/install.md: extra, MB, seconds to install, seconds to import."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    empty = _megabytes(venv)
    target = f"{wheel}[{extra}]" if extra else str(wheel)
    started = time.perf_counter()
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt"), target],
        check=True,
    )
    installed = time.perf_counter() - started
    environment = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    first = subprocess.run([python, "-c", IMPORTS[extra]], **run)  # writes the byte code
    assert first.returncode == 0, first.stderr
    started = time.perf_counter()
    subprocess.run([python, "-c", IMPORTS[extra]], **run)
    imported = time.perf_counter() - started
    shown = subprocess.run([str(venv / "bin" / "classer"), "--help"], **run)
    assert shown.returncode == 0, shown.stderr
    with capsys.disabled():
        size = _megabytes(venv) - empty
        print(f"\n| {f'`{extra}`' if extra else 'none'} | {size:,.0f} | {installed:.0f} | {imported:.1f} |")


@pytest.mark.slow
def test_a_command_without_its_packages_names_the_extra(wheel: Path, tmp_path: Path) -> None:
    """With the base alone: the client's commands run, the others say what to install."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    install = [str(venv / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True)

    def classer(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(venv / "bin" / "classer"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert classer("classify", "--help").returncode == 0
    unreachable = classer("classify", "a text", "--server", "localhost:1", "--timeout", "1")
    assert (unreachable.returncode, "Traceback" in unreachable.stderr) == (2, False), unreachable.stderr
    (tmp_path / "data.csv").write_text("text,label\na,b\n")
    for command, extra in (
        (("train", "--data", "data.csv", "--out", "run"), "train"),
        (("serve", "bundle"), "serve"),
        (("classify", "a text", "--bundle", "bundle"), "local"),
        (("gateway",), "http"),
    ):
        done = classer(*command)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert install_command(extra) in done.stderr
    load = [str(venv / "bin" / "python"), "-c", "import classer; classer.load('bundle')"]
    done = subprocess.run(load, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert install_command("local") in done.stderr.splitlines()[-1]


def _megabytes(folder: Path) -> float:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6
