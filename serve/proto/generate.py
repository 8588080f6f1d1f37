"""Regenerates the Python files of classifier.proto: `python -m classer.serve.proto.generate` (or `make proto`).

Needs grpcio-tools (extra `dev`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Part of the file's name among all protobuf descriptors of a process: a bare "classifier.proto" could meet another.
DESCRIPTOR_FOLDER = "classer/serve/proto"
GENERATED = ("classifier_pb2.py", "classifier_pb2.pyi", "classifier_pb2_grpc.py")


def generate(folder: Path = HERE) -> None:
    """Writes the files of `GENERATED` into `folder`.

    Raises:
      RuntimeError: protoc refused the .proto; what it says stands on stderr.
    """
    import google.rpc.status_pb2
    import grpc_tools

    includes = (
        f"{DESCRIPTOR_FOLDER}={HERE}",
        str(Path(google.rpc.status_pb2.__file__).parents[2]),  # google/rpc/*.proto
        str(Path(grpc_tools.__file__).parent / "_proto"),  # google/protobuf/*.proto
    )
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        # In a process of its own: protoc's native code and TensorFlow's crash in the same one.
        command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in includes), *outputs]
        if subprocess.run([*command, f"{DESCRIPTOR_FOLDER}/classifier.proto"]).returncode != 0:
            raise RuntimeError("protoc refused classifier.proto; its messages stand above.")
        for name in GENERATED:
            shutil.copyfile(Path(scratch, DESCRIPTOR_FOLDER, name), folder / name)
    # The library's own imports are relative, whatever its package is called; protoc writes absolute ones.
    service = folder / "classifier_pb2_grpc.py"
    absolute = f"from {DESCRIPTOR_FOLDER.replace('/', '.')} import classifier_pb2"
    text = service.read_text()
    if text.count(absolute) != 1:
        raise RuntimeError(f"The generated {service.name} no longer holds the line '{absolute} …'; mend generate.py.")
    service.write_text(text.replace(absolute, "from . import classifier_pb2"))


if __name__ == "__main__":
    generate()
