"""Exports: agreement of each runtime with Classer, and errors for unsupported requests and damaged exports."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from classer.data.errors import InputError
from classer.data.fetch import sha256_of
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.bundle import Bundle, quantize_bundle, save_bundle
from classer.model.decode import Calibration, probabilities
from classer.model.encoder import Encoder
from classer.model.manifest import content_hash
from classer.model.precision import Precision
from classer.model.quantize import unflatten
from classer.model.variants import variant_predictor
from classer.tests.helpers import TAXONOMY, make_bundle, with_gates
from classer.tools.cli.main import main
from classer.tools.export import decoding, run
from classer.tools.export.folder import EXPORT_MANIFEST, read_export
from classer.tools.export.formats import FORMATS
from classer.tools.export.run import export_bundle, golden, make_request, verify

TREE = Task(
    "place",
    TaskKind.HIERARCHICAL,
    (
        Label("germany", parent="europe"),
        Label("europe"),
        Label("asia"),
        Label("japan", parent="asia"),
        Label("bonn", parent="germany"),
        Label("ulm", parent="germany"),
        Label("france", parent="europe"),
        Label("moon"),
    ),
)
TEXTS = ("my card has not arrived", "rain , storm and snow where is the money")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"skipped: {', '.join(missing)} is not installed")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A tiny classifier with gates and one task of each kind, in float32 and INT8."""
    bundle = with_gates(make_bundle(tmp_path_factory.mktemp("export")))
    rng = np.random.default_rng(0)
    width = len(TREE.labels)
    kernel = np.concatenate([bundle.weights["head.kernel"], rng.normal(size=(32, width)).astype(np.float32)], axis=1)
    bundle = dataclasses.replace(
        bundle,
        taxonomy=Taxonomy((*TAXONOMY.tasks, TREE)),
        calibration={**bundle.calibration, "place": Calibration(1.2)},
        weights={
            **bundle.weights,
            "head.kernel": kernel,
            "head.bias": rng.normal(size=kernel.shape[1]).astype(np.float32),
        },
        golden_texts=TEXTS,
    )
    return {"float32": bundle, "int8": quantize_bundle(bundle)}


CASES = [
    pytest.param("onnx", "float32", "1", marks=needs("onnx", "onnxruntime")),
    pytest.param("onnx", "float32", "0.5", marks=needs("onnx", "onnxruntime")),
    pytest.param("onnx", "float16", "1", marks=needs("onnx", "onnxruntime")),
    pytest.param("onnx", "bfloat16", "1", marks=needs("onnx", "openvino")),
    pytest.param("onnx-int8", "int8", "0.5", marks=needs("onnx", "onnxruntime")),
    pytest.param("openvino", "float32", "0.5", marks=needs("onnx", "openvino")),
    pytest.param("openvino", "int8", "1", marks=needs("onnx", "openvino")),
    pytest.param("litert", "float32", "1", marks=needs("ai_edge_litert")),
    pytest.param("litert", "float32", "0.5", marks=[needs("ai_edge_litert"), pytest.mark.slow]),
    pytest.param("litert", "int8", "1", marks=needs("ai_edge_litert")),
    pytest.param("safetensors", "float32", "1", marks=needs("torch", "transformers")),
    ("stablehlo", "float32", "1"),
    ("stablehlo", "int8", "0.5"),
    ("savedmodel", "float32", "1"),
    pytest.param("savedmodel", "float32", "0.5", marks=pytest.mark.slow),
    pytest.param("savedmodel", "int8", "1", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("target", "precision", "focus"), CASES)
def test_the_runtime_gives_our_own_probabilities(
    bundles: dict[str, Bundle], tmp_path: Path, target: str, precision: Precision, focus: str
) -> None:
    bundle = bundles["int8" if precision == "int8" else "float32"]
    request = make_request(bundle, target, precision=precision, focus=focus)
    checked = export_bundle(request, target, tmp_path / "out")
    limit = {"float32": 2e-6, "int8": 1e-3}.get(precision, 1e-2)
    if target == "litert":
        limit = 2e-6  # with ROW_ENDS, XNNPACK rounds INT8 as Classer does; without them the difference is 9e-5
    assert 0 < checked.difference < limit
    assert (tmp_path / "out" / "README.md").read_text().count("```python") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    # A text that is not among the golden texts of the export.
    text = "the team has a goal not soup ? " * 4
    ids = bundle.tokenizer.encode([text], request.max_length).ids
    logits_NL = bundle.predictor(focus=request.focus).logits(ids, batch_size=1)
    ours_NL = np.concatenate([bundle.probabilities(task.name, logits_NL) for task in bundle.taxonomy.tasks], axis=1)
    runtime = FORMATS[target].load_module().load(read_export(tmp_path / "out"))
    np.testing.assert_allclose(runtime([text], 1), ours_NL, atol=10 * limit)
    if precision == "float32":
        np.testing.assert_allclose(runtime([text, *TEXTS], 3)[:1], ours_NL, atol=2e-6)


def test_int8_is_checked_against_what_the_format_computes(bundles: dict[str, Bundle]) -> None:
    """OpenVINO's golden answers use float activations. The empty text is excluded: its rounding varies too much."""
    bundle = dataclasses.replace(bundles["int8"], golden_texts=(*TEXTS, ""))
    ids = bundle.tokenizer.encode(TEXTS, bundle.max_length).ids
    for target, predictor in (
        ("onnx-int8", bundle.predictor()),
        ("openvino", variant_predictor(bundle, Precision.float32)),
    ):
        checked = golden(make_request(bundle, target, precision=Precision.int8), target)
        assert tuple(one.text for one in checked) == TEXTS
        logits_NL = predictor.logits(ids, batch_size=len(ids))
        expected = np.concatenate([bundle.probabilities(task.name, logits_NL) for task in bundle.taxonomy.tasks], 1)
        np.testing.assert_allclose([one.probabilities for one in checked], expected, atol=1e-6)
    # The two formats' golden answers differ, so that the comparison above can fail.
    requests = {target: make_request(bundle, target, precision=Precision.int8) for target in ("onnx-int8", "openvino")}
    rounded, unrounded = (golden(request, target) for target, request in requests.items())
    assert np.abs(np.subtract(rounded[0].probabilities, unrounded[0].probabilities)).max() > 1e-5


@needs("onnx", "onnxruntime")
@pytest.mark.parametrize("kind", ["bert", "modernbert", "native"])
def test_every_architecture_reaches_onnx(tmp_path: Path, kind: str, bundles: dict[str, Bundle]) -> None:
    bundle = other_architecture(bundles["float32"], kind)
    assert export_bundle(make_request(bundle, "onnx", precision=None), "onnx", tmp_path / "out").difference < 2e-6


@needs("torch", "transformers")
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_transformers_gives_the_same_hidden_states(tmp_path: Path, kind: str, bundles: dict[str, Bundle]) -> None:
    import torch
    import transformers

    bundle = other_architecture(bundles["float32"], kind)
    export_bundle(make_request(bundle, "safetensors", precision=None), "safetensors", tmp_path / "out")
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    model, loading = transformers.AutoModel.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(loading.values())
    ids = np.array(bundle.tokenizer.encode(TEXTS[1:], 48).ids)
    with torch.inference_mode():
        theirs_BSD = model.eval()(torch.tensor(ids)).last_hidden_state.numpy()
    weights = {name.removeprefix("encoder."): w for name, w in bundle.weights.items() if name.startswith("encoder.")}
    lengths = np.full(1, ids.shape[1], np.int32)
    ours: Any = Encoder(bundle.encoder).apply({"params": unflatten(weights)}, ids, lengths)
    np.testing.assert_allclose(ours.hidden_BKD, theirs_BSD, atol=1e-5)


def other_architecture(bundle: Bundle, kind: str) -> Bundle:
    """The bundle with a random encoder of another architecture, without gates."""
    import jax

    from classer.model.classifier import TextClassifier
    from classer.model.quantize import flatten

    changes: dict[str, Any] = {"gated": False}
    if kind != "bert":
        changes |= {"num_segments": 0, "norm_eps": 1e-5, "pre_norm": True, "biases": False, "rope_base": 10_000.0}
    if kind == "modernbert":
        changes |= {"activation": "geglu", "local_window": 3, "global_every": 2, "local_rope_base": 100.0}
        changes |= {"num_layers": 3}
    if kind == "native":
        changes |= {"norm": "rms", "activation": "swiglu"}
    encoder = dataclasses.replace(bundle.encoder, **changes)
    model = TextClassifier(encoder, bundle.taxonomy.num_labels)
    params: Any = model.init(jax.random.key(1), np.zeros((1, 8), np.int32), np.ones(1, np.int32))["params"]
    rng = np.random.default_rng(1)
    weights = {name: np.asarray(w + 0.05 * rng.normal(size=w.shape), np.float32) for name, w in flatten(params).items()}
    return dataclasses.replace(bundle, encoder=encoder, weights=weights)


def test_trees_are_decoded_as_they_are_served() -> None:
    rng = np.random.default_rng(0)
    logits_NL = rng.normal(size=(50, len(TREE.labels))).astype(np.float32) * 8
    taxonomy, calibration = Taxonomy((TREE,)), Calibration(1.7)
    ours_NL = probabilities(TREE, logits_NL, calibration)
    theirs_NL = decoding.traced_probabilities(taxonomy, {"place": calibration}, logits_NL)
    np.testing.assert_allclose(theirs_NL, ours_NL, atol=1e-6)


@pytest.fixture(scope="module")
def exported(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableHLO export, which needs no packages beyond those of Classer."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export_bundle(make_request(bundles["float32"], "stablehlo", precision=None), "stablehlo", out)
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and updates its checksums, as a faulty writer would."""
    manifest = json.loads((path / EXPORT_MANIFEST).read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (path / name).is_file():
            entry |= {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    manifest["version"] = content_hash(manifest)
    (path / EXPORT_MANIFEST).write_text(json.dumps(manifest))


def swap_weights(path: Path) -> None:
    weights = load_file(path / "weights.safetensors")
    weights["head.bias"] = weights["head.bias"][::-1].copy()
    save_file(weights, path / "weights.safetensors")


def test_a_tampered_manifest_is_refused(copy: Path) -> None:
    file = copy / EXPORT_MANIFEST
    file.write_text(file.read_text().replace('"max_length": 48', '"max_length": 47'))
    with pytest.raises(InputError, match=r"damaged or was changed: export\.json is not as it was written"):
        verify(copy)


def test_swapped_weights_are_refused_by_their_checksum(copy: Path) -> None:
    swap_weights(copy)
    with pytest.raises(InputError, match=r"the SHA-256 of weights\.safetensors is not the one in its manifest"):
        verify(copy)


def test_swapped_weights_with_a_true_checksum_are_refused_by_the_golden_texts(copy: Path) -> None:
    swap_weights(copy)
    change_manifest(copy, lambda manifest: None)
    with pytest.raises(InputError, match="computes something else than Classer"):
        verify(copy)


def test_a_missing_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer/vocab.txt").unlink()
    with pytest.raises(InputError, match=r"tokenizer/vocab\.txt is missing"):
        verify(copy)
    change_manifest(copy, lambda manifest: manifest["files"].pop("tokenizer/vocab.txt"))
    with pytest.raises(InputError, match=r"lists no file 'tokenizer/vocab\.txt'"):
        verify(copy)


def test_another_tokenizer_is_refused(copy: Path) -> None:
    lines = (copy / "tokenizer/vocab.txt").read_text().splitlines()
    lines[-1], lines[-2], lines[5], lines[6] = lines[-2], lines[-1], lines[6], lines[5]
    (copy / "tokenizer/vocab.txt").write_text("\n".join(lines) + "\n")
    lines_of_text = {i for i, line in enumerate(lines) if line in " ".join(TEXTS).split()}
    assert lines_of_text & {5, 6}
    change_manifest(copy, lambda manifest: None)
    with pytest.raises(InputError, match="its tokenizer gives other tokens"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format_version=2), "has export format 2; this Classer reads up to 1"),
        (lambda m: m.update(target="coreml"), "of the format 'coreml'; this Classer knows safetensors"),
        (lambda m: m.update(created="2020-01-01"), r"days ago; .* Make it anew"),
        (lambda m: m.pop("precision"), "does not fit together"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "names a file outside"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(copy: Path, change: Callable[..., object], says: str) -> None:
    change_manifest(copy, change)
    with pytest.raises(InputError, match=says):
        verify(copy)


def test_a_file_that_was_slipped_in_is_refused(copy: Path) -> None:
    (copy / "program-32.stablehlo").write_bytes(b"code")
    with pytest.raises(InputError, match=r"holds program-32\.stablehlo, which its manifest does not name"):
        verify(copy)


@pytest.mark.slow
def test_an_export_past_its_guarantee_is_made_anew(copy: Path, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = save_bundle(bundles["float32"], tmp_path / "bundle")
    assert bundle.path is not None
    old = datetime.date(2020, 1, 1).isoformat()
    change_manifest(copy, lambda manifest: manifest.update(created=old, bundle=bundle.version))
    assert main(["verify-export", str(copy), "--bundle", str(bundle.path)]) == 0
    assert read_export(copy).created > datetime.date(2020, 1, 1)
    change_manifest(copy, lambda manifest: manifest.update(created=old, bundle="another"))
    assert main(["verify-export", str(copy), "--bundle", str(bundle.path)]) == 2


def test_a_mismatch_leaves_nothing_behind(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.TOLERANCE, Precision.float32, -1.0)
    with pytest.raises(InputError, match="computes something else than Classer"):
        export_bundle(make_request(bundles["float32"], "stablehlo", precision=None), "stablehlo", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("of", "target", "options", "says"),
    [
        ("int8", "onnx", {}, "onnx holds float32.* not int8. For int8 take stablehlo, .*onnx-int8"),
        ("float32", "onnx-int8", {}, "make it INT8 first"),
        ("int8", "onnx", {"precision": "float16"}, "its floats are gone"),
        ("float32", "safetensors", {"focus": "0.5"}, "cannot express Focused Attention"),
        ("float32", "onnx", {"lengths": (16,)}, "takes any length"),
        ("float32", "stablehlo", {"focus": "0.5", "lengths": (99,)}, "--lengths has 99"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    bundles: dict[str, Bundle], of: str, target: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        make_request(bundles[of], target, **{"precision": None, **options})


def test_a_missing_runtime_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"This format needs onnx and .*: pip install 'classer-turbine\[onnx\]'"):
        FORMATS["onnx"].load_module()
