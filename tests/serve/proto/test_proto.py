"""The generated files are those of the .proto as it stands."""

import re
from pathlib import Path

import pytest

from classer.serve.proto import classifier_pb2, generate

FOLDER = Path(generate.__file__).parent


def test_generating_again_gives_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), f"{name} is stale: run `make proto`"


def test_every_message_and_field_is_documented() -> None:
    """A comment stands above each field and method (the wire types of messages speak for themselves)."""
    lines = (FOLDER / "classifier.proto").read_text().splitlines()
    declared = [
        i for i, line in enumerate(lines) if re.match(r"\s+(rpc |((repeated|optional) )?[\w.]+ \w+ = \d+;)", line)
    ]
    fields = sum(len(message.fields) for message in classifier_pb2.DESCRIPTOR.message_types_by_name.values())
    methods = sum(len(service.methods) for service in classifier_pb2.DESCRIPTOR.services_by_name.values())
    assert len(declared) == fields + methods
    for i in declared:
        assert lines[i - 1].strip().startswith("//"), f"no comment above: {lines[i]}"
