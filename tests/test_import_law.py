"""Who may import whom (WORKSPACE.md). The law is read from the source, so that it also holds for lazy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED_ROOMS = {
    "data": {"data"},
    "model": {"data", "model"},
    "train": {"data", "model", "train"},
    "serve": {"data", "model", "serve"},
    "tools": {"data", "model", "train", "serve", "tools"},
}
# Heavy or replaceable packages → the places (files, or folders with a slash) that may import them.
CONFINED = {
    "tensorflow": ("data/tokenizer.py", "tools/export/"),
    "tensorflow_text": ("data/tokenizer.py", "tools/export/"),
    "aqt": ("model/quantize.py",),
    "grpc": ("serve/", "tools/bench/serving.py"),
    "grpc_health": ("serve/",),
    "grpc_reflection": ("serve/",),
    "grpc_status": ("serve/",),
    "onnx": ("tools/",),
    "onnxruntime": ("tools/",),
    "openvino": ("tools/",),
    "prometheus_client": ("serve/",),
    "opentelemetry": ("serve/ops/tracing.py",),
}


def violations(path: str, source: str) -> list[str]:
    """What in a file of the library breaks the law; `path` is relative to the root, such as "model/encoder.py"."""
    room = path.split("/")[0]
    found = []
    for line, module in imported_modules(path, source):
        package, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if package == "classer" and target in ALLOWED_ROOMS and target not in ALLOWED_ROOMS[room]:
            found.append(f"{path}:{line}: {room} must not import {target} ({module})")
        places = CONFINED.get(package)
        if places and not any(path == place or (place.endswith("/") and path.startswith(place)) for place in places):
            found.append(f"{path}:{line}: only {' and '.join(places)} may import {package}")
    return found


def imported_modules(path: str, source: str) -> list[tuple[int, str]]:
    """(line, absolute module name) of all imports, wherever in the file they stand."""
    package = ["classer", *Path(path).parent.parts]
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            # `from .. import train` names a room only in its list of names.
            modules += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                modules.append((node.lineno, name.value))
    return modules


def library_files() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for room in ALLOWED_ROOMS for file in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", library_files())
def test_file_keeps_the_law(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/readers.py", "from ..model import encoder"),
        ("data/readers.py", "from .. import model"),
        ("data/deep/readers.py", "from ...model.encoder import Encoder"),
        ("data/readers.py", "import classer.train.loop as loop"),
        ("model/encoder.py", "from ..train.losses import loss"),
        ("model/encoder.py", "def f():\n    from ..serve import engine"),
        ("model/encoder.py", "import importlib\nimportlib.import_module('classer.train')"),
        ("train/trainer.py", "from ..serve.engine import Engine"),
        ("train/trainer.py", "from classer.tools import cli"),
        ("serve/core/engine.py", "from ...train.metrics import evaluate"),
        ("serve/core/engine.py", "from ...tools import cli"),
        ("data/readers.py", "import tensorflow as tf"),
        ("model/export.py", "def f():\n    import tensorflow_text"),
        ("model/encoder.py", "from aqt.jax.v2 import config"),
        ("tools/cli/main.py", "import grpc"),
        ("tools/cli/main.py", "import tensorflow"),
        ("model/export.py", "import onnx"),
        ("model/predict.py", "from grpc_health.v1 import health"),
    ],
)
def test_the_law_can_be_broken(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/tokenizer.py", "def f():\n    import tensorflow as tf, tensorflow_text"),
        ("model/quantize.py", "from aqt.jax.v2.flax import aqt_flax"),
        (
            "model/encoder.py",
            "from ..data.taxonomy import Task\nfrom .config import EncoderConfig\nfrom . import heads",
        ),
        ("train/trainer.py", "from ..model import encoder\nfrom ..data import taxonomy\nimport data"),
        ("serve/rpc/server.py", "import grpc\nfrom ...model.bundle import load_bundle\nfrom ..proto import x_pb2"),
        ("serve/proto/x_pb2_grpc.py", "import grpc\nfrom . import x_pb2"),
        ("tools/cli/main.py", "from classer.train import run\nfrom ...serve import client"),
        ("tools/export/to_savedmodel.py", "import tensorflow as tf"),
    ],
)
def test_the_law_lets_pass_what_it_should(path, source):
    assert violations(path, source) == []


LOADED = "import sys; print(*({'jax', 'tensorflow', 'aqt', 'grpc'} & sys.modules.keys()))"


def loads(statement: str) -> set[str]:
    """Which of the heavy packages are loaded once a new process has run `statement`."""
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{LOADED}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_model_loads_no_tensorflow():
    modules = [path.removesuffix(".py").replace("/", ".") for path in library_files() if path.startswith("model/")]
    assert "tensorflow" not in loads("import classer.model")
    assert "tensorflow" not in loads("\n".join(f"import classer.{m.removesuffix('.__init__')}" for m in modules))


def test_importing_the_tokenizer_loads_no_tensorflow():
    assert "tensorflow" not in loads("import classer.data.tokenizer")


def test_importing_the_client_loads_neither_tensorflow_nor_jax():
    loaded = loads("import classer.serve.client.client")
    assert "grpc" in loaded  # the probe can see what is loaded
    assert not loaded & {"tensorflow", "jax", "aqt"}
