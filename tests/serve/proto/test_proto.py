"""The generated files are those of the .proto as it stands, and the .proto keeps the rules of its style."""

import shutil
from pathlib import Path

import pytest

from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto import generate
from classer.serve.wire.enums import value_of, word_of

FOLDER = Path(generate.__file__).parent
needs_protoc = pytest.mark.skipif(
    shutil.which("buf", path=Path(generate.sys.executable).parent) is None, reason="grpcio-tools and buf are missing"
)


@needs_protoc
def test_generating_again_gives_the_same_files(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), f"{name} is stale: run `make proto`"


@needs_protoc
def test_the_proto_keeps_buf_s_rules() -> None:
    assert generate.lint() == []


@needs_protoc
def test_lint_finds_names_and_missing_comments(tmp_path: Path) -> None:
    text = (FOLDER / "classifier.proto").read_text()
    for old, new in (
        ("PRIORITY_BULK = 2", "BULK = 2"),
        ("string request_id = 10;", "string requestId = 10;"),
        ("  // The label's text.\n", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "classifier.proto").write_text(text)
    found = "\n".join(generate.lint(tmp_path / "classifier.proto"))
    assert '"BULK" should be prefixed with "PRIORITY_"' in found
    assert '"requestId" should be lower_snake_case' in found
    assert 'Field "label" should have a non-empty comment' in found


def test_enum_values_are_words() -> None:
    assert word_of(pb.Priority, pb.PRIORITY_BULK) == "bulk"
    assert value_of(pb.ModelState, "retiring") == pb.MODEL_STATE_RETIRING
    assert (word_of(pb.Precision, 0), word_of(pb.Precision, 99), value_of(pb.Precision, "")) == ("", "", 0)
    with pytest.raises(KeyError):
        value_of(pb.Precision, "unspecified")
