"""Saving and loading bundles: exact round trips, and an error for every damaged or invalid bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from classer.data.errors import InputError
from classer.data.fetch import sha256_of
from classer.model import bundle as bundle_module
from classer.model.bundle import Bundle, load_bundle, quantize_bundle, save_bundle
from classer.model.decode import Calibration
from classer.model.focus import Focus
from classer.model.manifest import content_hash

TEXTS = ("my card has not arrived", "", "rain , storm and snow where is the money")
FILES = {
    "bundle.json",
    "encoder.json",
    "taxonomy.json",
    "calibration.json",
    "golden.json",
    "weights.safetensors",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer_config.json",
    "README.md",
    "LICENSE",
}
QUERY = "encoder.layer_0.attention.qkv.kernel"


@pytest.fixture(scope="module")
def saved(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The tiny bundle, with a licence, saved in both precisions."""
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "LICENSE").write_text("A licence.\n")
    whole = dataclasses.replace(tiny_bundle, licences=(folder / "LICENSE",), golden_texts=(*TEXTS, "my card"))
    return {
        "float32": save_bundle(whole, folder / "float32"),
        "int8": save_bundle(quantize_bundle(whole), folder / "int8"),
    }


def path_of(bundle: Bundle) -> Path:
    assert bundle.path is not None
    return bundle.path


@pytest.fixture
def copy(saved: dict[str, Bundle], tmp_path: Path) -> Path:
    """A copy of the float32 bundle, to be damaged."""
    return Path(shutil.copytree(path_of(saved["float32"]), tmp_path / "bundle"))


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def vouch(path: Path) -> None:
    """Rewrites the manifest with the files' current checksums, as a faulty writer would."""

    def renew(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            entry |= {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
        manifest["version"] = content_hash(manifest)

    change_json(path / "bundle.json", renew)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def all_of_it(manifest: dict[str, Any]) -> None:
        change(manifest)
        manifest["version"] = content_hash(manifest)

    change_json(path / "bundle.json", all_of_it)


def change_weights(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(path / "weights.safetensors")
    change(weights)
    save_file(weights, path / "weights.safetensors")
    vouch(path)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_bundle_comes_back_as_it_was_written(saved: dict[str, Bundle], precision: str) -> None:
    before = saved[precision]
    after = load_bundle(path_of(before))
    for field in ("encoder", "taxonomy", "precision", "calibration", "max_length", "golden_texts", "card", "version"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.weights.keys() == before.weights.keys()
    for name, value in before.weights.items():
        np.testing.assert_array_equal(after.weights[name], value, strict=True)
    assert [file.read_text() for file in after.licences] == ["A licence.\n"]

    logits_NL = [b.predictor().logits(b.tokenizer.encode(TEXTS, 48).ids, batch_size=4) for b in (before, after)]
    np.testing.assert_array_equal(logits_NL[0], logits_NL[1])
    for task in ("topic", "tags"):
        np.testing.assert_array_equal(before.probabilities(task, logits_NL[0]), after.probabilities(task, logits_NL[1]))


def test_a_bundle_is_plain_files_and_nothing_else(saved: dict[str, Bundle]) -> None:
    for bundle in saved.values():
        path = path_of(bundle)
        assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == FILES
        for file in path.rglob("*.json"):
            json.loads(file.read_text())
        # safetensors: a length, then JSON, then raw numbers, without executable content.
        raw = (path / "weights.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert {entry["dtype"] for entry in header.values()} <= {"F32", "I8"}


def test_nothing_of_the_model_room_can_unpickle() -> None:
    for file in Path(bundle_module.__file__).parent.glob("*.py"):
        source = file.read_text()
        assert not any(word in source for word in ("pickle", "joblib", "torch", "marshal", "allow_pickle")), file


def test_the_version_follows_the_content(saved: dict[str, Bundle], tmp_path: Path) -> None:
    first = saved["float32"]
    assert save_bundle(first, tmp_path / "again").version == first.version
    other = dataclasses.replace(first, card="Another card.")
    assert save_bundle(other, tmp_path / "other").version != first.version
    assert saved["int8"].version != first.version


# Saving


def test_an_existing_path_is_refused_and_stays_as_it_is(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(InputError, match=f"{name} exists already; a bundle is written to a new folder"):
            save_bundle(tiny_bundle, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("step", ["bundle._golden_probabilities", "manifest.sha256_of", "manifest.content_hash"])
def test_a_save_that_fails_leaves_nothing(tiny_bundle: Bundle, tmp_path: Path, monkeypatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(f"classer.model.{step}", fail)
    with pytest.raises(InputError, match="/bundle could not be written: no space left on device"):
        save_bundle(tiny_bundle, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


# Loading folders that are no bundles, and damaged bundles


def test_a_path_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is no bundle: it does not exist\. `classer train` writes bundles"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is no bundle: it holds no bundle\.json"):
        load_bundle(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is no bundle: it holds no bundle\.json"):
        load_bundle(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "is not the manifest of a bundle"),
        ('{"format": "another"}', "is not the manifest of a bundle"),
        ('{"format": "classer-bundle"}', "'format_version' must be a whole number"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(InputError, match=rf"bundle\.json.*{says}"):
        load_bundle(tmp_path)


def test_a_newer_format_is_refused(copy: Path) -> None:
    change_manifest(copy, lambda manifest: manifest.update(format_version=3))
    with pytest.raises(InputError, match=r"has bundle format 3; this Classer reads up to 2\. Upgrade Classer"):
        load_bundle(copy)


def test_the_first_format_is_read_without_its_gates(copy: Path, saved: dict[str, Bundle]) -> None:
    """Those gates selected tokens before a layer; in the middle of a layer they would be silently wrong."""

    def with_earlier_gates(weights: dict[str, np.ndarray]) -> None:
        for i in range(saved["float32"].encoder.num_layers):
            weights[f"encoder.gate_{i}.direction"] = np.ones(saved["float32"].encoder.d_model, np.float32)

    change_json(copy / "encoder.json", lambda encoder: encoder.update(gated=True))
    change_weights(copy, with_earlier_gates)
    change_manifest(copy, lambda manifest: manifest.update(format_version=1))
    bundle = load_bundle(copy)
    assert bundle.encoder == saved["float32"].encoder
    assert bundle.weights.keys() == saved["float32"].weights.keys()
    with pytest.raises(InputError, match="not trained for focus"):
        bundle.predictor(focus=Focus.pyramid(0.5, bundle.encoder.num_layers))


@pytest.mark.parametrize("name", sorted(FILES - {"bundle.json"}))
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"is damaged: {name} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("name", sorted(FILES - {"bundle.json"}))
def test_a_truncated_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    says = f"is damaged: {name} has {len(content) - 1} bytes where its manifest says {len(content)}"
    with pytest.raises(InputError, match=says):
        load_bundle(copy)


@pytest.mark.parametrize("name", sorted(FILES - {"bundle.json"}))
def test_a_flipped_bit_is_noticed(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=f"is damaged or was changed: the SHA-256 of {name} is not the one"):
        load_bundle(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(max_length=40),
        lambda m: m["files"].pop("LICENSE"),
        lambda m: m.update(version=m["version"][::-1]),
        lambda m: m.pop("version"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(copy: Path, change) -> None:
    change_json(copy / "bundle.json", change)
    with pytest.raises(InputError, match=r"is damaged or was changed: bundle\.json is not as it was written"):
        load_bundle(copy)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_in_the_manifest_is_refused(copy: Path, data: st.DataObject) -> None:
    file = copy / "bundle.json"
    whole = file.read_bytes()
    position = data.draw(st.integers(0, 8 * len(whole) - 1))
    content = bytearray(whole)
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)
    try:
        with pytest.raises(InputError):
            load_bundle(copy)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("max_length"), r"the field 'max_length' is missing or is not a int"),
        (lambda m: m.update(files=[]), r"lists no files"),
        (lambda m: m.update(precision="int4"), r"precision 'int4' is none of those known \(float32, int8\)"),
        (lambda m: m["files"].pop("taxonomy.json"), r"lists no file 'taxonomy.json'; the bundle is incomplete"),
        (lambda m: m["files"].update({"../secret": {}}), r"names a file outside the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": {}}), r"names a file outside the bundle"),
        (lambda m: m["files"]["README.md"].pop("bytes"), r"no size and SHA-256 of README\.md"),
        (lambda m: m["files"].update({"README.md": None}), r"no size and SHA-256 of README\.md"),
        (lambda m: m.update(max_length=4096), r"max_length is 4096, but the encoder has only 48 positions"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copy: Path, change, says: str) -> None:
    change_manifest(copy, change)
    with pytest.raises(InputError, match=says):
        load_bundle(copy)


# Invalid bundles with valid checksums, as a faulty writer would leave them


def test_weights_that_compute_something_else_are_refused(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({"head.kernel": weights["head.kernel"] * 1.5}))
    says = r"computes something else here: a probability of golden text 1 \(task 'topic'\) differs by 0\.\d+, more than"
    with pytest.raises(InputError, match=says):
        load_bundle(copy)


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    change_weights(copy, lambda weights: weights["head.bias"].fill(np.nan))
    with pytest.raises(InputError, match="differs by nan"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.update({QUERY: w[QUERY][:-1].copy()}), rf"'{QUERY}' has shape \(31, 96\); the config says"),
        (lambda w: w.pop("head.bias"), "has no tensor 'head.bias'"),
        (lambda w: w.update({QUERY: w[QUERY].astype(np.float16)}), rf"'{QUERY}' is float16; .* float32 it is float32"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "has a tensor 'extra', which a model"),
    ],
)
def test_weights_other_than_the_configs_describe_are_named(copy: Path, change, says: str) -> None:
    change_weights(copy, change)
    with pytest.raises(InputError, match=says):
        load_bundle(copy)


@pytest.mark.parametrize(("precision", "claim"), [("int8", "float32"), ("float32", "int8")])
def test_one_precision_that_claims_to_be_the_other_is_refused(saved, tmp_path: Path, precision, claim) -> None:
    path = Path(shutil.copytree(path_of(saved[precision]), tmp_path / "bundle"))
    change_manifest(path, lambda manifest: manifest.update(precision=claim))
    with pytest.raises(InputError, match=rf"is {precision}; in a bundle of precision {claim} it is {claim}"):
        load_bundle(path)


def test_truncated_weights_with_a_true_checksum_are_refused(copy: Path) -> None:
    file = copy / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    vouch(copy)
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("encoder.json", lambda d: d.pop("d_ff"), r"encoder\.json: the encoder's config is incomplete"),
        ("encoder.json", lambda d: d.update(rope=1), r"encoder\.json: unknown encoder field 'rope'"),
        ("taxonomy.json", lambda d: d.pop("tasks"), r"taxonomy\.json: the taxonomy has no list 'tasks'"),
        ("taxonomy.json", lambda d: d["tasks"][0].update(kind="x"), r"taxonomy\.json: kind 'x' is none of those"),
        ("calibration.json", lambda d: d["tags"].pop("temperature"), r"calibration\.json: .* no field 'temperature'"),
        ("calibration.json", lambda d: d.pop("tags"), r"calibration\.json has no calibration of the task 'tags'"),
        ("calibration.json", lambda d: d["tags"]["thresholds"].pop(), r"calibration\.json.* 3 labels.* 2 thresholds"),
        ("golden.json", lambda d: d[0].pop("text"), r"golden\.json must hold texts"),
        ("golden.json", lambda d: d[0]["probabilities"]["topic"].pop(), r"golden\.json must hold texts"),
        ("golden.json", lambda d: d[0]["probabilities"].pop("topic"), r"golden\.json must hold texts"),
    ],
)
def test_json_files_that_do_not_fit_are_named(copy: Path, name: str, change, says: str) -> None:
    change_json(copy / name, change)
    vouch(copy)
    with pytest.raises(InputError, match=says):
        load_bundle(copy)


def test_a_multilabel_task_without_thresholds_is_warned_of(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_bundle(copy)
    assert not caplog.messages
    change_json(copy / "calibration.json", lambda d: d["tags"].pop("thresholds"))
    vouch(copy)
    assert load_bundle(copy).calibration["tags"] == Calibration(0.8, (0.5, 0.5, 0.5))
    assert caplog.messages == [
        f"{copy / 'calibration.json'} has no thresholds of the multilabel task 'tags'; 0.5 is used for all."
    ]
