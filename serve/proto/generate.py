"""Generation of the Python files of classifier.proto, and its lint: `python -m classer.serve.proto.generate`.

`make proto` runs it. Needs grpcio-tools and buf (extra `dev`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Protobuf's registry names descriptors by file, one registry a process: a bare "classifier.proto" could clash.
DESCRIPTOR_FOLDER = "classer/serve/proto"
GENERATED = ("classifier_pb2.py", "classifier_pb2.pyi", "classifier_pb2_grpc.py")


def generate(folder: Path = HERE) -> None:
    """Writes the files of `GENERATED` into `folder`.

    Raises:
      RuntimeError: protoc rejected the .proto; its messages stand on stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _protoc(*(f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")))
        for name in GENERATED:
            shutil.copyfile(Path(scratch, DESCRIPTOR_FOLDER, name), folder / name)
    # The library's imports are relative, so that its package can have any name; protoc writes absolute ones.
    service = folder / "classifier_pb2_grpc.py"
    absolute = f"from {DESCRIPTOR_FOLDER.replace('/', '.')} import classifier_pb2"
    text = service.read_text()
    if text.count(absolute) != 1:
        raise RuntimeError(f"The generated {service.name} has no line '{absolute} …'; correct generate.py.")
    service.write_text(text.replace(absolute, "from . import classifier_pb2"))


def lint(proto: Path = HERE / "classifier.proto") -> list[str]:
    """Violations of the rules in buf.yaml, one "file:line:column:sentence" each.

    Args:
      proto: the file to check.

    Raises:
      RuntimeError: protoc rejected the .proto, or buf did not run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={image}", proto=proto)
        command = [str(Path(sys.executable).with_name("buf")), "lint", str(image), "--config", str(HERE / "buf.yaml")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 100):  # 100: there are violations
        raise RuntimeError(f"buf failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


def _protoc(*outputs: str, proto: Path = HERE / "classifier.proto") -> None:
    import google.rpc.status_pb2
    import grpc_tools

    includes = (
        f"{DESCRIPTOR_FOLDER}={proto.parent}",
        str(Path(google.rpc.status_pb2.__file__).parents[2]),  # google/rpc/*.proto
        str(Path(grpc_tools.__file__).parent / "_proto"),  # google/protobuf/*.proto
    )
    # A process of its own: the native code of protoc and that of TensorFlow crash in one process.
    command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in includes), *outputs]
    if subprocess.run([*command, f"{DESCRIPTOR_FOLDER}/{proto.name}"]).returncode != 0:
        raise RuntimeError(f"protoc rejected {proto.name}; its messages stand above.")


if __name__ == "__main__":
    generate()
    if violations := lint():
        sys.exit("\n".join(violations))
