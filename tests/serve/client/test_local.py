"""A bundle in this process: parity with the server, kinds of input, threads, and errors of one sentence."""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import classer
from classer.data.errors import ClasserError, InputError
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.bundle import Bundle, quantize_bundle, save_bundle
from classer.model.classifier import TextClassifier
from classer.model.decode import Calibration
from classer.model.quantize import flatten
from classer.serve.client import local
from classer.serve.client.client import Client
from classer.serve.client.local import LocalModel, load
from classer.serve.client.results import Classification
from classer.serve.core.engine import Engine
from classer.serve.wire.errors import InvalidRequest, NotPossible, UnknownTask
from classer.tests.helpers import FILLERS, TAXONOMY, TREE, VOCAB, with_gates

KINDS = Taxonomy((*TAXONOMY.tasks, Task("sure", TaskKind.BINARY, (Label("yes"), Label("no"))), TREE))
CALIBRATION = {
    "topic": Calibration(1.5),
    "tags": Calibration(0.8, (0.3, 0.5, 0.7)),
    "sure": Calibration(),
    "where": Calibration(1.2),
}
# The times that an answer took differ, and nothing else may.
MEASURED: dict[str, Any] = {"queue_duration": timedelta(), "compute_duration": timedelta()}


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of all lengths, some longer than the model reads, the first two empty and not ASCII."""
    rng = np.random.default_rng(seed)
    words = [word for word in VOCAB if word.isalpha()] + list(FILLERS)
    texts = [" ".join(map(str, rng.choice(words, size=rng.integers(1, 60)))) for _ in range(count)]
    return ["", "Naïve 😀 card\n", *texts][:count]


@pytest.fixture(scope="module")
def kinds_path(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A float32 bundle of a task of each kind, with gates for focus, in the `bundle` of a run's folder."""
    model = TextClassifier(tiny_bundle.encoder, KINDS.num_labels)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))["params"]
    weights = flatten(params)
    weights["head.kernel"] = 20 * weights["head.kernel"]
    bundle = dataclasses.replace(tiny_bundle, taxonomy=KINDS, calibration=CALIBRATION, weights=weights)
    path = tmp_path_factory.mktemp("run") / "kinds" / "bundle"
    save_bundle(with_gates(bundle), path)
    return path


@pytest.fixture(scope="module")
def model(kinds_path: Path):
    with load(kinds_path, precision="float32") as model:
        yield model


@pytest.fixture(scope="module")
def single(bundle_of_one_task: Path):
    with load(bundle_of_one_task, precision="float32") as model:
        yield model


@pytest.fixture(scope="module")
def bundle_of_one_task(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    taxonomy = Taxonomy(TAXONOMY.tasks[:1])
    weights = {
        name: value[..., :7] if name.startswith("head.") else value for name, value in tiny_bundle.weights.items()
    }
    calibration = {"topic": tiny_bundle.calibration["topic"]}
    path = tmp_path_factory.mktemp("single") / "bundle"
    save_bundle(dataclasses.replace(tiny_bundle, taxonomy=taxonomy, weights=weights, calibration=calibration), path)
    return path


def test_answers_are_the_server_s_for_every_kind_and_option(start_server, kinds_path: Path, model: LocalModel) -> None:
    texts = some_texts(30)
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 1},
        {"top_k": 100},
        *({"threshold": threshold} for threshold in (0.0, 0.3, 0.9, 1.0)),
        {"focus": 0.6},
        {"focus": "0.6", "evidence": True, "threshold": 0.4, "top_k": 2},
    ]
    with start_server(kinds_path, focus=("1", "0.6")) as running, Client(running.address) as client:
        assert list(model.tasks) == client.tasks()
        for task in (info.name for info in model.tasks):
            for given in options:
                served = [client.classify(text, task, **given) for text in texts[:6]]
                ours = [model.classify(text, task, **given) for text in texts[:6]]
                assert list(map(untimed, ours)) == list(map(untimed, served)), (task, given)
            given = options[-1]
            served = list(map(untimed, client.classify_batch(texts, task, **given)))
            ours = list(map(untimed, model.classify_batch(texts, task, **given)))
            # Which of the programs runs a text depends on what else is there; they agree in all but the last bits.
            for one, other in zip(ours, served, strict=True):
                assert one.chosen == other.chosen
                assert [label.label for label in one.labels] == [label.label for label in other.labels]
                assert [label.score for label in one.labels] == pytest.approx([label.score for label in other.labels])
                assert [(s.start, s.end) for s in one.evidence] == [(s.start, s.end) for s in other.evidence]


def untimed(outcome: Classification | ClasserError) -> Classification:
    assert isinstance(outcome, Classification), outcome
    return dataclasses.replace(outcome, **MEASURED)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.45, 1.0])
def test_labels_and_probabilities_are_those_of_the_answers(model: LocalModel, threshold: float | None) -> None:
    texts = some_texts(40, seed=1)
    for info in model.tasks:
        answers = [model.classify(text, info.name, top_k=100, threshold=threshold) for text in texts]
        labels = model.predict(texts, info.name, threshold=threshold)
        if info.kind == "multilabel":
            assert labels == [list(answer.chosen) for answer in answers]
        else:
            assert labels == [next(iter(answer.chosen), None) for answer in answers]
        probs_NL = model.predict_proba(texts, info.name)
        names = model.labels_of(info.name)
        assert (probs_NL.shape, probs_NL.dtype) == ((40, info.num_labels), np.float32)
        for probs_L, answer in zip(probs_NL, answers, strict=True):
            scores = {label.label: label.score for label in answer.labels}
            assert {name: probs_L[names.index(name)] for name in scores} == pytest.approx(scores, abs=1e-6)
        if info.kind in ("binary", "multiclass"):
            np.testing.assert_allclose(probs_NL.sum(axis=1), 1, rtol=1e-6)


def test_many_texts_come_back_in_their_order_whatever_the_batches(single: LocalModel, monkeypatch) -> None:
    texts = some_texts(120, seed=2)
    one_by_one = np.concatenate([single.predict_proba([text]) for text in texts])
    for chunk_texts, chunk_chars in ((4096, 4_000_000), (50, 4_000_000), (7, 4_000_000), (4096, 300)):
        monkeypatch.setattr(local, "CHUNK_TEXTS", chunk_texts)
        monkeypatch.setattr(local, "CHUNK_CHARS", chunk_chars)
        np.testing.assert_allclose(single.predict_proba(texts), one_by_one, atol=1e-6)


def test_a_generator_is_read_as_its_texts_are_classified(single: LocalModel, monkeypatch) -> None:
    monkeypatch.setattr(local, "CHUNK_TEXTS", 10)
    read, most = 0, 0
    score = LocalModel._score

    def counting(self: LocalModel, texts: list[str], *rest: Any, **options: Any) -> Any:
        nonlocal read, most
        most = max(most, read)
        read -= len(texts)
        return score(self, texts, *rest, **options)

    def texts():
        nonlocal read
        for text in some_texts(95):
            read += 1
            yield text

    monkeypatch.setattr(LocalModel, "_score", counting)
    assert len(single.predict(texts())) == 95
    assert most == 10


def test_every_sequence_of_texts_is_taken(single: LocalModel) -> None:
    texts = some_texts(12, seed=3)
    expected = single.predict(texts)
    pyarrow = pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    datasets = pytest.importorskip("datasets")
    for given in (
        tuple(texts),
        np.array(texts),
        np.array(texts, dtype=object),
        iter(texts),
        dict.fromkeys(texts).keys(),
        pyarrow.array(texts),
        pyarrow.chunked_array([texts[:5], texts[5:]]),
        pandas.Series(texts, index=range(100, 112)),
        pandas.Series(texts, dtype="string"),
        polars.Series(texts),
        datasets.Dataset.from_dict({"text": texts})["text"],
    ):
        assert single.predict(given) == expected, type(given)
    for table in (
        pandas.DataFrame({"text": texts}),
        polars.DataFrame({"text": texts}),
        datasets.Dataset.from_dict({"text": texts}),
    ):
        with pytest.raises(InvalidRequest, match=r"not a table; give one of its columns"):
            single.predict(table)
    with pytest.raises(InvalidRequest, match=r"texts\[1\] is <NA>, a missing value"):
        single.predict(pandas.Series(["a", None], dtype="string"))
    with pytest.raises(InvalidRequest, match=r"texts\[1\] is None, a missing value"):
        single.predict(polars.Series(["a", None]))


def test_nothing_to_classify_is_an_empty_answer(single: LocalModel) -> None:
    assert single.predict([]) == [] == single.classify_batch([])
    assert single.predict_proba(iter([])).shape == (0, 7)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda m: m.predict("a text"), InvalidRequest, "for one text use classify, or give a list of one"),
        (lambda m: m.predict(3), InvalidRequest, "predict takes a list, array, Series or other iterable .* not an int"),
        (lambda m: m.predict(None), InvalidRequest, "not None, a missing value"),
        (lambda m: m.predict(b"text"), InvalidRequest, "not bytes, which must be decoded first"),
        (lambda m: m.predict({"a": 1}), InvalidRequest, "not a dict"),
        (lambda m: m.predict({"a"}), InvalidRequest, "not a set"),
        (lambda m: m.predict(np.array([["a"], ["b"]])), InvalidRequest, r"the shape \(2, 1\) instead of \(N,\)"),
        (lambda m: m.predict_proba(["a", None]), InvalidRequest, r"texts\[1\] is None, a missing value; predict_proba"),
        (lambda m: m.predict(["a", "b", float("nan")]), InvalidRequest, r"texts\[2\] is NaN, a missing value"),
        (lambda m: m.predict(["a", b"b"]), InvalidRequest, r"texts\[1\] is bytes, which must be decoded"),
        (lambda m: m.predict([["a"]]), InvalidRequest, r"texts\[0\] is a list; predict takes texts, each a str"),
        (lambda m: m.predict(["a", "x" * 10_000_000]), InvalidRequest, r"texts\[1\]: .* 10000000 characters; at most"),
        (lambda m: m.predict(["a", "\udc80"]), InvalidRequest, r"texts\[1\] holds a lone surrogate"),
        (lambda m: m.classify("x" * 10_000_000), InvalidRequest, "The text has 10000000 characters; at most 1000000"),
        (
            lambda m: m.classify(["a"]),
            InvalidRequest,
            "one text, a str, not a list; for several texts use classify_bat",
        ),
        (lambda m: m.classify(None), InvalidRequest, r"one text, a str, not None, a missing value\."),
        (lambda m: m.classify(3.5), InvalidRequest, r"not a float\."),
        (lambda m: m.classify("a", "secret"), UnknownTask, r"no task of the name given; it has: topic\."),
        (lambda m: m.classify("a", 3), InvalidRequest, r"task is an int; it is the name of a task: topic\."),
        (lambda m: m.classify("a", threshold=1.5), InvalidRequest, "`threshold` must lie between 0 and 1"),
        (lambda m: m.predict([], threshold=float("nan")), InvalidRequest, "`threshold` must lie between 0 and 1"),
        (lambda m: m.predict([], threshold="0.5"), InvalidRequest, "threshold must be a number from 0 to 1, not '0.5'"),
        (lambda m: m.classify("a", top_k=-1), InvalidRequest, "top_k must be a whole number from 0; it is -1"),
        (lambda m: m.classify("a", top_k=2.0), InvalidRequest, "top_k must be a whole number from 0; it is 2.0"),
        (lambda m: m.classify("a", focus=0.5), InputError, "was not trained for focus"),
        (lambda m: m.classify("a", focus="most"), InputError, "it is 'most'"),
        (lambda m: m.classify("a", focus=[0.5]), InputError, "focus is a list"),
        (lambda m: m.classify("a", evidence=True), InvalidRequest, "this model was not trained for focus"),
    ],
)
def test_bad_input_is_one_sentence(
    single: LocalModel, call: Callable[[LocalModel], Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as raised:
        call(single)
    said = str(raised.value)
    assert said.endswith(".")
    assert len(said) < 300
    assert "\n" not in said


def test_a_text_that_is_too_long_fails_alone_in_classify_batch(single: LocalModel) -> None:
    first, second, third = single.classify_batch(["a card", "x" * 1_000_001, "money"])
    assert isinstance(second, InvalidRequest)
    assert [untimed(first), untimed(third)] == [untimed(single.classify(text)) for text in ("a card", "money")]


def test_several_tasks_must_be_named(model: LocalModel) -> None:
    for call in (lambda: model.labels, lambda: model.predict(["a"]), lambda: model.classify("a")):
        with pytest.raises(InvalidRequest, match="several; name one of: topic, tags, sure, where"):
            call()
    with pytest.raises(InvalidRequest, match=r"needs a focus that leaves tokens out; give a focus below 1"):
        model.classify("a", "topic", evidence=True)


def test_scores_that_are_not_finite_name_their_text(single: LocalModel, monkeypatch) -> None:
    run = Engine.run

    def broken(self: Engine, ids: Any, bucket: int) -> Any:
        pairs = zip(run(self, ids, bucket), ids, strict=True)
        return [one._replace(logits_L=one.logits_L * (np.nan if len(row) > 8 else 1)) for one, row in pairs]

    monkeypatch.setattr(Engine, "run", broken)
    texts = ["card", "money", "the card has not arrived where is my money"]
    with pytest.raises(ClasserError, match=r"texts\[2\]: The model's scores for this text are not finite"):
        single.predict(texts)
    good, _, bad = single.classify_batch(texts)
    assert isinstance(good, Classification)
    assert isinstance(bad, ClasserError)


def test_threads_get_the_answers_of_one(bundle_of_one_task: Path) -> None:
    """On a model of their own, whose programs they compile at the same time."""
    texts = some_texts(40, seed=4)
    with load(bundle_of_one_task, precision="float32") as model:
        found: dict[int, Any] = {}

        def work(number: int) -> None:
            if number % 2:
                found[number] = [model.classify(text).chosen[0] for text in texts[number:][:10]]
            else:
                found[number] = model.predict(texts)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        expected = model.predict(texts)
    assert found == {n: expected[n:][:10] if n % 2 else expected for n in range(8)}


def test_only_what_is_needed_is_compiled(bundle_of_one_task: Path) -> None:
    with load(bundle_of_one_task, precision="float32") as model:
        (engine,) = model._engines.values()
        assert engine.programs == []
        model.classify("card")
        assert [(one.length, one.batch_size) for one in engine.programs] == [(16, 1)]
        model.predict(["card"] * 20)
        assert [(one.length, one.batch_size) for one in engine.programs] == [(16, 1), (16, 32)]
        model.predict(["card"] * 9)  # what is ready does
        assert [(one.length, one.batch_size) for one in engine.programs] == [(16, 1), (16, 32)]


def test_the_precision_of_a_length_is_measured_once_and_stays(bundle_of_one_task: Path) -> None:
    with load(bundle_of_one_task) as model:
        (engine,) = model._engines.values()
        model.classify("card")
        assert {one.precision for one in engine.measured} == {"float32", "bfloat16", "int8"}
        (chosen,) = engine.plan.values()
        model.predict(["card"] * 20)
        assert {one.precision for one in engine.programs} == {chosen}


def test_close_frees_it_and_later_calls_say_so(bundle_of_one_task: Path) -> None:
    model = load(str(bundle_of_one_task), precision="float32")
    assert model.predict(["card"])
    model.close()
    model.close()
    with pytest.raises(NotPossible, match="is closed; load it again"):
        model.predict(["card"])


def test_a_pickled_model_loads_its_bundle_again(single: LocalModel) -> None:
    other = pickle.loads(pickle.dumps(single))
    assert (other.version, other._settings) == (single.version, single._settings)
    assert other.predict(["card"]) == single.predict(["card"])
    assert (
        repr(other)
        == repr(single)
        == (f"<classer model '{single.name}', version {single.version}: topic (multiclass, 7 labels)>")
    )


def test_int8_bundles_and_run_folders_load(tmp_path: Path, tiny_bundle: Bundle) -> None:
    save_bundle(tiny_bundle, tmp_path / "run" / "bundle-float32")
    save_bundle(quantize_bundle(tiny_bundle), tmp_path / "run" / "bundle")
    for given in (tmp_path / "run", tmp_path / "run" / "bundle", str(tmp_path / "run") + "/"):
        with load(given, precision="int8") as model:
            assert (model.name, model.path) == ("run", tmp_path / "run" / "bundle")
            assert len(model.predict(["card"], "topic")) == 1


def test_what_is_no_bundle_is_one_sentence(tmp_path: Path, bundle_of_one_task: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for folder, file in (("run", "job.json"), ("export", "export.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    shutil.copytree(bundle_of_one_task, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    paths: list[tuple[Any, str]] = [
        (None, "load takes the path of a bundle, a str or a Path, not None"),
        (3, "a str or a Path, not an int"),
        (tmp_path / "missing", "is no bundle: it does not exist"),
        (tmp_path / "empty", r"is no bundle: it holds no bundle\.json"),
        (tmp_path / "file", "is a file; load takes a bundle's folder"),
        (tmp_path / "run", "is a training run that has no bundle yet; finish it"),
        (tmp_path / "export", "is an export; load takes the bundle that it was made from"),
        (tmp_path / "damaged", r"the SHA-256 of weights\.safetensors is not the one in its manifest"),
    ]
    for given, sentence in paths:
        with pytest.raises(InputError, match=sentence) as raised:
            load(given)
        assert "\n" not in str(raised.value)
    settings: list[tuple[dict[str, Any], str]] = [
        ({"precision": "int4"}, "precision is 'int4'; it is one of auto, float32, bfloat16, int8"),
        ({"focus": 0}, "A focus"),
        ({"focus": 0.5}, "was not trained for focus"),
    ]
    for options, sentence in settings:
        with pytest.raises(InputError, match=re.escape(sentence)):
            load(bundle_of_one_task, **options)


def test_a_model_in_this_process_loads_no_grpc(bundle_of_one_task: Path) -> None:
    code = (
        "import sys, classer\n"
        f"model = classer.load({str(bundle_of_one_task)!r}, precision='float32')\n"
        "print(model.classify('card').best.label, model.predict(['card'])[0])\n"
        "assert 'grpc' not in sys.modules, 'gRPC was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with load(bundle_of_one_task, precision="float32") as model:
        assert done.stdout.strip() == f"{model.classify('card').best.label} {model.predict(['card'])[0]}"


def test_the_public_name_is_this(bundle_of_one_task: Path) -> None:
    assert classer.load is load
    assert classer.LocalModel is LocalModel
