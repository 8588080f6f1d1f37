"""Who may import whom (WORKSPACE.md). The law is read from the source, so that it also holds for lazy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "model", "train", "serve", "tools")
# Room, or room within a room → the rooms that its files may import beside itself. A name covers what lies below it.
_BELOW_CORE = {"data", "model", "serve/proto", "serve/wire", "serve/ops"}
ALLOWED = {
    "data": set(),
    "model": {"data"},
    "train": {"data", "model"},
    "serve": set(),  # its `__init__.py`
    "serve/proto": set(),
    "serve/wire": {"data", "serve/proto"},
    "serve/ops": {"data", "serve/proto", "serve/wire"},
    "serve/core": _BELOW_CORE,
    "serve/client": {"data", "serve/proto", "serve/wire", "serve/ops"},
    "serve/client/local.py": _BELOW_CORE | {"serve/core", "serve/client"},
    "serve/gateway": {"data", "serve/proto", "serve/wire", "serve/ops"},
    "serve/rpc": _BELOW_CORE | {"serve/core"},
    "tools": {"data", "model", "train", "serve", "tools"},
}
# Rooms that are not in the wheel: nothing outside them may import them.
NOT_IN_THE_WHEEL = ("tools/bench", "tools/dev")
# Heavy or replaceable packages → the places (files, or folders with a slash) that may import them.
_GRPC = (
    "serve/proto/",
    "serve/wire/status.py",
    *(f"serve/ops/{name}.py" for name in ("guard", "listening", "operations", "security")),
    "serve/client/",
    "serve/gateway/",
    "serve/rpc/",
    "tools/bench/serving.py",
)
CONFINED = {
    "tensorflow": ("data/tokenizer.py", "tools/export/"),
    "tensorflow_text": ("data/tokenizer.py", "tools/export/"),
    "aqt": ("model/quantize.py",),
    "grpc": _GRPC,
    "grpc_health": ("serve/client/", "serve/gateway/", "serve/rpc/"),
    "grpc_reflection": ("serve/rpc/",),
    "grpc_status": _GRPC,
    "onnx": ("tools/",),
    "onnxruntime": ("tools/",),
    "openvino": ("tools/",),
    "prometheus_client": ("serve/ops/metrics.py", "serve/gateway/app.py"),
    "opentelemetry": ("serve/ops/tracing.py",),
}


def room_of(path: str) -> str:
    """The entry of `ALLOWED` that a file, or a module written as a path, falls under: the longest one."""
    return max((room for room in ALLOWED if f"{path}/".startswith(f"{room}/")), key=len, default="")


def within(path: str, rooms: set[str]) -> bool:
    return any(f"{path}/".startswith(f"{room}/") for room in rooms)


def violations(path: str, source: str) -> list[str]:
    """The imports of a library file that break the law; `path` is relative to the root, such as "model/encoder.py"."""
    room = room_of(path)
    found = []
    for line, module in imported_modules(path, source):
        package, _, rest = module.partition(".")
        target = rest.replace(".", "/")
        if package == "classer" and target.split("/")[0] in ROOMS:
            own = room_of(target) == room  # not: below it, where another entry holds
            hidden = next((one for one in NOT_IN_THE_WHEEL if within(target, {one}) and not within(path, {one})), None)
            if hidden or not (own or within(target, ALLOWED[room])):
                found.append(f"{path}:{line}: {room} must not import {hidden or room_of(target)} ({module})")
        places = CONFINED.get(package)
        if places and not any(path == place or (place.endswith("/") and path.startswith(place)) for place in places):
            found.append(f"{path}:{line}: only {' and '.join(places)} may import {package}")
    return found


def reached(path: str) -> set[str]:
    """All library files that a file imports, itself and what they import included."""
    seen: set[str] = set()
    left = [path]
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        for _, module in imported_modules(file, (ROOT / file).read_text()):
            parts = module.split(".")[1:] if module.startswith("classer.") else []
            for end in range(1, len(parts) + 1):  # also the packages above it, and a name within a module
                stem = "/".join(parts[:end])
                left += [one for one in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / one).is_file()]
    return seen


def imports_grpc(path: str) -> bool:
    modules = {module.split(".")[0] for _, module in imported_modules(path, (ROOT / path).read_text())}
    return bool(modules & {"grpc", "grpc_health", "grpc_reflection", "grpc_status"})


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
    return sorted(str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", library_files())
def test_file_keeps_the_law(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/readers.py", "from ..model import encoder"),
        ("data/readers.py", "from .. import model"),
        ("data/deep/readers.py", "from ...model.encoder import Encoder"),
        ("data/readers.py", "import classer.train.trainer as trainer"),
        ("model/encoder.py", "from ..train.losses import loss"),
        ("model/encoder.py", "def f():\n    from ..serve import engine"),
        ("model/encoder.py", "import importlib\nimportlib.import_module('classer.train')"),
        ("train/trainer.py", "from ..serve.core.engine import Engine"),
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
        ("serve/proto/generate.py", "from ..wire import errors"),
        ("serve/wire/status.py", "from ..ops.log import logger"),
        ("serve/ops/guard.py", "from ..core.work import Priority"),
        ("serve/ops/guard.py", "from .. import rpc"),
        ("serve/core/models.py", "from ..client.results import Outcome"),
        ("serve/core/models.py", "from ..rpc import server"),
        ("serve/core/models.py", "from ... import serve"),
        ("serve/core/models.py", "import grpc"),
        ("serve/core/models.py", "import classer.serve.gateway.app"),
        ("serve/client/client.py", "from ..core.engine import Engine"),
        ("serve/client/client.py", "def f():\n    from ..gateway import messages"),
        ("serve/client/local.py", "from ..rpc.server import Server"),
        ("serve/gateway/app.py", "from ..client.client import Client"),
        ("serve/gateway/app.py", "from ...model import bundle"),
        ("serve/rpc/service.py", "from ..gateway.messages import answer"),
        ("serve/wire/limits.py", "import grpc"),
        ("serve/ops/keys.py", "import grpc"),
        ("tools/cli/serve.py", "from classer.tools.bench.serving import call"),
        ("tools/cli/serve.py", "from ..dev import quickstart"),
        ("tools/bench/serving.py", "from classer.tools.dev import quickstart"),
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
        ("serve/rpc/server.py", "from ..core import models\nfrom . import frontends\nfrom ..ops.log import logger"),
        ("serve/client/local.py", "from ..core.engine import Engine\nfrom .results import Outcome"),
        ("serve/core/models.py", "from ..ops.log import logger\nfrom ..wire.errors import NotPossible"),
        ("tools/bench/servers.py", "from classer.tools.bench.serving import call\nfrom ..cli import main"),
        ("tools/cli/main.py", "from classer.train import run\nfrom ...serve import client"),
        ("tools/export/to_savedmodel.py", "import tensorflow as tf"),
    ],
)
def test_the_law_lets_pass_what_it_should(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("path", [path for path in library_files() if path.startswith("serve/core/")])
def test_the_core_reaches_no_file_that_imports_grpc(path):
    assert [file for file in sorted(reached(path)) if imports_grpc(file)] == []


def test_the_reach_of_a_file_is_seen():
    """The test above can fail."""
    files = reached("serve/rpc/server.py")
    assert {"serve/core/work.py", "serve/wire/status.py"} <= files  # by way of others
    assert {"serve/rpc/server.py", "serve/wire/status.py"} <= {file for file in files if imports_grpc(file)}


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


def test_importing_the_core_loads_no_grpc():
    loaded = loads("import classer.serve.core.pipeline, classer.serve.core.report")
    assert "jax" in loaded
    assert not loaded & {"grpc", "tensorflow"}
