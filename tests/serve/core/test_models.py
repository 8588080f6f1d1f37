"""Several models in one server: who answers what, streams, and swaps while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from classer.data.errors import InputError
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model import predict
from classer.model.bundle import Bundle, save_bundle
from classer.model.focus import Focus
from classer.model.precision import Precision
from classer.model.variants import variant_predictor
from classer.serve.core.engine import TimedProgram
from classer.serve.core.models import Model, Models, ModelSettings, State, named_folders
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub, ModelAdminStub
from classer.serve.wire.errors import UnknownTask
from classer.tests.helpers import with_gates

TIMEOUT = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """one/ and two/: the tiny model with other weights; three/: other task names, and gates; broken/."""
    folder = tmp_path_factory.mktemp("models")
    save_bundle(tiny_bundle, folder / "one")
    kernel = np.roll(tiny_bundle.weights["head.kernel"], 1, axis=1)
    save_bundle(
        dataclasses.replace(tiny_bundle, weights={**tiny_bundle.weights, "head.kernel": kernel}), folder / "two"
    )
    tasks = (
        Task("colour", TaskKind.MULTICLASS, tuple(Label(f"colour {i}", f"the {i}th") for i in range(7))),
        Task("tags", TaskKind.MULTILABEL, tuple(Label(name) for name in ("x", "y", "z"))),
    )
    other = dataclasses.replace(
        with_gates(tiny_bundle),
        taxonomy=Taxonomy(tasks),
        calibration={"colour": tiny_bundle.calibration["topic"], "tags": tiny_bundle.calibration["tags"]},
    )
    save_bundle(other, folder / "three")
    save_bundle(tiny_bundle, folder / "broken")
    (folder / "broken" / "weights.safetensors").write_bytes(b"no weights")
    return folder


@pytest.fixture(scope="module")
def running(start_server, folder: Path) -> Iterator[Any]:
    with start_server(
        folder / "one",
        folder / "three",
        loadable=(str(folder / "two"), str(folder / "broken")),
        admin_port=0,
        focus=("1", "0.6"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def stub(running) -> Iterator[ClassifierStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield ClassifierStub(channel)


@pytest.fixture(scope="module")
def admin(running) -> Iterator[ModelAdminStub]:
    with grpc.insecure_channel(running.server.admin_address) as channel:
        yield ModelAdminStub(channel)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The code, the sentence and the details, by their type's name, of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    (packed,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    details = {}
    for detail in status.details:
        name = detail.TypeName().removeprefix("google.rpc.")
        details[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(details[name])
    return error.code(), error.details(), details


def test_tasks_and_models_are_listed(stub: ClassifierStub) -> None:
    tasks = stub.ListTasks(pb.ListTasksRequest(), timeout=TIMEOUT).tasks
    assert [(task.model, task.name, task.kind, task.num_labels) for task in tasks] == [
        ("one", "topic", pb.TASK_KIND_MULTICLASS, 7),
        ("one", "tags", pb.TASK_KIND_MULTILABEL, 3),
        ("three", "colour", pb.TASK_KIND_MULTICLASS, 7),
        ("three", "tags", pb.TASK_KIND_MULTILABEL, 3),
    ]
    assert not tasks[0].labels
    assert len(stub.ListTasks(pb.ListTasksRequest(model="three"), timeout=TIMEOUT).tasks) == 2
    model = stub.GetModel(pb.GetModelRequest(name="three"), timeout=TIMEOUT)
    assert (model.is_default, model.state, model.precision, model.max_length) == (
        True,
        pb.MODEL_STATE_READY,
        pb.PRECISION_FLOAT32,
        48,
    )
    assert list(model.focuses) == ["1", "0.6"]
    assert [(label.label, label.description) for label in model.tasks[0].labels][:2] == [
        ("colour 0", "the 0th"),
        ("colour 1", "the 1th"),
    ]
    assert {(program.bucket, program.focus) for program in model.programs} == {
        (bucket, focus) for bucket in (16, 32, 48) for focus in ("1", "0.6")
    }
    assert all(program.run_duration.ToNanoseconds() > 0 for program in model.programs)
    assert {program.precision for program in model.programs} == {pb.PRECISION_FLOAT32}
    assert 0 <= time.time() - model.load_time.ToNanoseconds() / 1e9 < 3600


def test_a_request_goes_to_the_model_that_has_its_task(stub: ClassifierStub) -> None:
    def ask(**fields: Any) -> pb.ClassifyResponse:
        return stub.Classify(pb.ClassifyRequest(text="my card", options=pb.ClassifyOptions(**fields)), timeout=TIMEOUT)

    assert (ask(task="colour").model, ask(task="topic").model) == ("three", "one")
    assert ask(task="tags", model="three", request_id="r-1").request_id == "r-1"
    code, sentence, details = refusal(lambda: ask(task="tags"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "one, three" in sentence
    assert details["BadRequest"].field_violations[0].field == "model"
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("INVALID_REQUEST", "classer")
    for fields, says in (
        ({}, "topic, tags, colour, tags"),
        ({"task": "secret"}, "topic, tags, colour, tags"),
        ({"model": "secret", "task": "tags"}, "one, three"),
        ({"model": "one", "model_version": "secret", "task": "tags"}, "it has: "),
        ({"model": "one", "task": "colour"}, "topic, tags"),
    ):
        code, sentence, _ = refusal(lambda fields=fields: ask(**fields))
        assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        assert says in sentence
        assert "secret" not in sentence


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"focus": "0.7"}, "focus"),
        ({"evidence": True}, "evidence"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"top_k": 0}, "top_k"),
        ({"timeout": timedelta(0)}, "timeout"),
        ({"timeout": timedelta(seconds=-1)}, "timeout"),
        ({"priority": 7}, "priority"),
    ],
)
def test_an_option_out_of_its_limits_is_named(stub: ClassifierStub, fields: dict[str, Any], field: str) -> None:
    request = pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic", **fields))
    code, _, details = refusal(lambda: stub.Classify(request, timeout=TIMEOUT))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [one.field for one in details["BadRequest"].field_violations] == [field]


def test_a_threshold_decides_what_is_chosen(stub: ClassifierStub) -> None:
    def chosen(task: str, threshold: float | None) -> int:
        request = pb.ClassifyRequest(
            text="my card", options=pb.ClassifyOptions(task=task, model="one", threshold=threshold, top_k=1)
        )
        return sum(label.chosen for label in stub.Classify(request, timeout=TIMEOUT).labels)

    assert [chosen("topic", threshold) for threshold in (None, 0.0, 1.0)] == [1, 1, 0]
    assert [chosen("tags", threshold) for threshold in (0.0, 1.0)] == [3, 0]


def test_focus_is_a_request_s_choice(stub: ClassifierStub) -> None:
    request = pb.ClassifyRequest(
        text="my card has not arrived . " * 5, options=pb.ClassifyOptions(task="colour", focus="0.6", evidence=True)
    )
    focused = stub.Classify(request, timeout=TIMEOUT)
    assert 0 < len(focused.evidence) < focused.tokens
    scores = [label.score for label in focused.labels]
    assert (focused.focus, focused.precision) == ("0.6", pb.PRECISION_FLOAT32)
    request.options.focus, request.options.evidence = "1", False
    assert scores != [label.score for label in stub.Classify(request, timeout=TIMEOUT).labels]


def test_a_batch_may_hold_requests_of_several_tasks(stub: ClassifierStub) -> None:
    requests = [
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic", top_k=1, request_id="a")),
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="secret")),
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="colour", top_k=2, priority=pb.PRIORITY_BULK)),
        pb.ClassifyRequest(text="card " * 300_000, options=pb.ClassifyOptions(task="topic")),
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic", timeout=timedelta(microseconds=1))),
    ]
    items = stub.ClassifyBatch(
        pb.ClassifyBatchRequest(request_batch=pb.RequestBatch(requests=requests)), timeout=TIMEOUT
    ).items
    assert [item.error.code for item in items] == [0, 5, 0, 3, 4]
    assert (items[0].response.request_id, len(items[0].response.labels)) == ("a", 1)
    assert (items[2].response.model, len(items[2].response.labels)) == ("three", 2)
    for bad in (
        pb.ClassifyBatchRequest(),
        pb.ClassifyBatchRequest(text_batch=pb.TextBatch()),
        pb.ClassifyBatchRequest(request_batch=pb.RequestBatch()),
    ):
        code, _, details = refusal(lambda bad=bad: stub.ClassifyBatch(bad, timeout=TIMEOUT))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field in (
            "batch",
            "text_batch.texts",
            "request_batch.requests",
        )


def test_a_stream_is_answered_in_order(stub: ClassifierStub) -> None:
    def requests() -> Iterator[pb.ClassifyBatchRequest]:
        for i in range(20):
            yield pb.ClassifyBatchRequest(
                text_batch=pb.TextBatch(
                    texts=["card"] * (i + 1), options=pb.ClassifyOptions(task="topic", top_k=1, request_id=str(i))
                )
            )

    responses = list(stub.ClassifyStream(requests(), timeout=TIMEOUT))
    assert [len(response.items) for response in responses] == list(range(1, 21))
    assert [response.items[0].response.request_id for response in responses] == [str(i) for i in range(20)]


def test_a_bad_message_ends_its_stream_with_the_reason(stub: ClassifierStub) -> None:
    requests = [
        pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["card"], options=pb.ClassifyOptions(task="topic"))),
        pb.ClassifyBatchRequest(text_batch=pb.TextBatch(options=pb.ClassifyOptions(task="topic"))),
    ]
    code, sentence, _ = refusal(lambda: list(stub.ClassifyStream(iter(requests), timeout=TIMEOUT)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "1 to 1024" in sentence


def test_a_stream_answers_one_who_waits_for_each_answer(stub: ClassifierStub) -> None:
    sent: queue.SimpleQueue[pb.ClassifyBatchRequest | None] = queue.SimpleQueue()
    responses = stub.ClassifyStream(iter(sent.get, None), timeout=TIMEOUT)
    try:
        for i in range(5):
            sent.put(
                pb.ClassifyBatchRequest(
                    text_batch=pb.TextBatch(
                        texts=["card"], options=pb.ClassifyOptions(task="topic", top_k=1, request_id=str(i))
                    )
                )
            )
            assert next(responses).items[0].response.request_id == str(i)
        sent.put(
            pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["card"], options=pb.ClassifyOptions(task="secret")))
        )
        code, sentence, _ = refusal(lambda: next(responses))  # although more could be sent
        assert (code, "secret" in sentence) == (grpc.StatusCode.NOT_FOUND, False)
    finally:
        sent.put(None)


def test_a_stream_waits_where_others_are_refused(start_server, folder: Path) -> None:
    with (
        start_server(folder / "one", max_waiting_tokens=640) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        texts = ["card"] * 100  # 3,200 tokens
        batch = pb.ClassifyBatchRequest(
            text_batch=pb.TextBatch(texts=texts, options=pb.ClassifyOptions(task="topic", top_k=1))
        )
        codes = [item.error.code for item in ClassifierStub(channel).ClassifyBatch(batch, timeout=TIMEOUT).items]
        assert set(codes) == {0, 8}
        (response,) = ClassifierStub(channel).ClassifyStream(iter([batch]), timeout=TIMEOUT)
        assert {item.error.code for item in response.items} == {0}


# Swapping


def test_a_swap_under_load_fails_nothing_and_frees_the_old_version(running, stub, admin: ModelAdminStub) -> None:
    models = running.server.models
    before = stub.GetModel(pb.GetModelRequest(name="one"), timeout=TIMEOUT)
    old = weakref.ref(models.find("one"))
    stop, versions, failures = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = stub.Classify(
                    pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic")), timeout=TIMEOUT
                )
                versions.append(answer.model_version)
            except grpc.RpcError as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    loaded = admin.LoadModel(pb.LoadModelRequest(bundle="two", name="one"), timeout=TIMEOUT)
    count = len(versions)
    while len(versions) < count + 50 and not failures:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not failures
    assert loaded.is_default
    assert loaded.version != before.version
    # First the old one answers, then the new one; requests in flight at the swap may cross.
    assert versions[0] == before.version
    assert versions[-1] == loaded.version
    assert set(versions[count + 8 :]) == {loaded.version}
    assert [model.version for model in stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT).models] == [
        loaded.version,
        stub.GetModel(pb.GetModelRequest(name="three"), timeout=TIMEOUT).version,
    ]
    end = time.monotonic() + TIMEOUT
    while old() is not None and time.monotonic() < end:
        time.sleep(0.05)
        gc.collect()
    assert old() is None
    assert gc.get_freeze_count() > 0  # what stays is no garbage collector's business
    admin.LoadModel(pb.LoadModelRequest(bundle="one"), timeout=TIMEOUT)


def test_versions_stand_side_by_side_until_one_is_unloaded(stub, admin: ModelAdminStub) -> None:
    first = stub.GetModel(pb.GetModelRequest(name="one"), timeout=TIMEOUT)
    second = admin.LoadModel(pb.LoadModelRequest(bundle="two", name="one", keep_default=True), timeout=TIMEOUT)
    assert not second.is_default

    def version(**fields: Any) -> str:
        return stub.Classify(
            pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic", **fields)), timeout=TIMEOUT
        ).model_version

    assert version() == first.version
    assert version(model="one", model_version=second.version) == second.version
    code, sentence, _ = refusal(
        lambda: admin.UnloadModel(pb.UnloadModelRequest(name="one", version=first.version), timeout=TIMEOUT)
    )
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "default" in sentence
    assert admin.SetDefaultVersion(
        pb.SetDefaultVersionRequest(name="one", version=second.version), timeout=TIMEOUT
    ).is_default
    assert version() == second.version
    admin.SetDefaultVersion(pb.SetDefaultVersionRequest(name="one", version=first.version), timeout=TIMEOUT)
    admin.UnloadModel(pb.UnloadModelRequest(name="one", version=second.version), timeout=TIMEOUT)
    code, _, _ = refusal(lambda: version(model="one", model_version=second.version))
    assert code is grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> dict[str, Path]:
    """a, b, c: versions of one model with few programs; longer: one that reads more."""
    folder = tmp_path_factory.mktemp("versions")
    for i, name in enumerate("abc"):
        weights = {**tiny_bundle.weights, "head.kernel": np.roll(tiny_bundle.weights["head.kernel"], i, axis=1)}
        save_bundle(dataclasses.replace(tiny_bundle, weights=weights, max_length=16), folder / name)
    save_bundle(dataclasses.replace(tiny_bundle, max_length=24), folder / "longer")
    return {name: folder / name for name in ("a", "b", "c", "longer")}


def meanwhile(change: Callable[[], object]) -> Callable[..., bool]:
    """A load's `progress` that makes one change while programs are compiled."""

    def progress(model: Model, warmed: TimedProgram | None) -> bool:
        if warmed is None:
            change()
        return True

    return progress


@pytest.mark.parametrize("default", [True, False])
def test_a_version_that_is_unloaded_while_the_next_one_loads_leaves_that_the_default(
    versions: dict[str, Path], default: bool
) -> None:
    async def main() -> None:
        models = Models(versions, ModelSettings(precision="float32"))
        first = await models.load("a")
        unload = meanwhile(lambda: models.unload("a", first.version))
        second = await models.load("b", "a", default=default, progress=unload)
        assert first.state is State.RETIRING
        assert models.find("a") is second
        models.unload("a", second.version)
        for ask in (models.find, models.resolve):
            with pytest.raises(UnknownTask, match="No model is loaded"):
                ask("")
        models.close()

    asyncio.run(main())


def test_the_version_that_is_the_default_after_a_load_is_the_one_retired(versions: dict[str, Path]) -> None:
    async def main() -> None:
        models = Models(versions, ModelSettings(precision="float32"))
        first = await models.load("a")
        second = await models.load("b", "a", default=False)
        assert models.find("a") is first
        change = meanwhile(lambda: models.set_default("a", second.version))
        third = await models.load("c", "a", progress=change)
        assert models.find("a") is third
        assert (first.state, second.state) == (State.READY, State.RETIRING)
        assert models.find("a", first.version) is first
        models.close()

    asyncio.run(main())


def test_a_next_version_is_measured_where_its_predecessor_s_plan_does_not_hold(
    versions: dict[str, Path],
) -> None:
    broken: set[str] = set()
    made: list[str] = []

    def make_predictor(bundle: Bundle, variant: Precision, focus: Focus | None = None) -> predict.Predictor:
        made.append(variant)
        if variant in broken:
            kernel = -bundle.weights["head.kernel"]
            bundle = dataclasses.replace(bundle, weights={**bundle.weights, "head.kernel": kernel})
        return variant_predictor(bundle, variant, focus)

    async def main() -> None:
        models = Models(versions, ModelSettings(precision="int8", make_predictor=make_predictor))
        assert (await models.load("a")).engine("").plan == {16: "int8"}
        models._settings = ModelSettings(make_predictor=make_predictor)
        made.clear()
        assert (await models.load("b", "a")).engine("").plan == {16: "int8"}
        assert made == ["float32", "int8"]  # nothing but what is checked by, and what was planned
        broken.add("int8")
        third = (await models.load("c", "a")).engine("")
        assert third.plan.keys() == {16}
        assert [one.precision for one in third.measured] == ["int8", "float32", "bfloat16"]
        assert third.plan[16] != "int8"
        broken.clear()
        other = (await models.load("longer", "a")).engine("")
        assert [one.precision for one in other.measured if one.length == 16] == ["float32", "bfloat16", "int8"]
        models.close()

    asyncio.run(main())


def test_a_predictor_that_is_given_is_used_and_checked_unless_the_check_is_off(versions: dict[str, Path]) -> None:
    def make_predictor(bundle: Bundle, variant: Precision, focus: Focus | None = None) -> predict.Predictor:
        sign = -1.0 if variant == "int8" else 1.0
        weights = {**bundle.weights, "head.kernel": sign * bundle.weights["head.kernel"]}
        return variant_predictor(dataclasses.replace(bundle, weights=weights), variant, focus)

    async def load(golden: bool) -> dict[int, str]:
        models = Models(versions, ModelSettings(precision="int8", make_predictor=make_predictor, golden=golden))
        try:
            return dict((await models.load("a")).engine("").plan)
        finally:
            models.close()

    assert asyncio.run(load(golden=False)) == {16: "int8"}
    with pytest.raises(InputError):
        asyncio.run(load(golden=True))


@pytest.mark.parametrize("bundle", ["../one", "/etc", "secret", "", "one/../two"])
def test_only_bundles_named_at_the_start_are_loaded(admin: ModelAdminStub, bundle: str) -> None:
    code, sentence, _ = refusal(lambda: admin.LoadModel(pb.LoadModelRequest(bundle=bundle), timeout=TIMEOUT))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "there are: broken, one, three, two" in sentence
    assert not bundle or bundle not in sentence
    listed = admin.ListBundles(pb.ListBundlesRequest(), timeout=TIMEOUT)
    assert list(listed.bundles) == ["broken", "one", "three", "two"]


def test_a_broken_bundle_changes_nothing(stub, admin: ModelAdminStub, folder: Path) -> None:
    request = pb.LoadModelRequest(bundle="broken", name="one")
    code, sentence, details = refusal(lambda: admin.LoadModel(request, timeout=TIMEOUT))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details["ErrorInfo"].reason == "NOT_POSSIBLE"
    assert str(folder) not in sentence
    assert stub.Classify(
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic")), timeout=TIMEOUT
    ).labels
    assert len(stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT).models) == 2


def test_a_model_whose_programs_the_system_has_no_room_for_changes_nothing(
    stub, admin: ModelAdminStub, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "max_map_count").write_text("5000")
    monkeypatch.setattr(predict, "_MAX_MAPPINGS", tmp_path / "max_map_count")
    monkeypatch.setattr(predict, "_SHARED", weakref.WeakValueDictionary())  # as if of other shapes
    request = pb.LoadModelRequest(bundle="three", name="one")
    code, sentence, _ = refusal(lambda: admin.LoadModel(request, timeout=TIMEOUT))
    assert (code, "the server's log says why" in sentence) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert stub.Classify(
        pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic")), timeout=TIMEOUT
    ).labels


def test_what_is_loaded_is_not_loaded_again(admin: ModelAdminStub) -> None:
    code, sentence, _ = refusal(lambda: admin.LoadModel(pb.LoadModelRequest(bundle="one"), timeout=TIMEOUT))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "already" in sentence


def test_the_admin_service_answers_on_its_own_port_only(running) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        ModelAdminStub(channel).ListBundles(pb.ListBundlesRequest(), timeout=TIMEOUT)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# Names and settings


def test_folders_have_names(tmp_path: Path) -> None:
    named = named_folders(["runs/imdb/bundle", "runs/clinc/bundle-float32", "x=runs/a/bundle", "models/news"])
    assert {name: str(path) for name, path in named.items()} == {
        "imdb": "runs/imdb/bundle",
        "clinc": "runs/clinc/bundle-float32",
        "x": "runs/a/bundle",
        "news": "models/news",
    }
    with pytest.raises(InputError, match=r"both be served as 'imdb'.*NAME=FOLDER"):
        named_folders(["a/imdb/bundle", "b/imdb/bundle"])
    with pytest.raises(InputError, match="a name is"):
        named_folders(["a b=folder"])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="--precision is 'int4'"):
        ModelSettings(precision="int4")
    with pytest.raises(InputError, match="--focus"):
        ModelSettings(focuses=())


def test_precision_is_measured_for_each_bucket(start_server, folder: Path, capfd) -> None:
    with (
        start_server(folder / "one", precision="auto") as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        model = ClassifierStub(channel).GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
        for bucket in (16, 32, 48):
            assert len({program.precision for program in model.programs if program.bucket == bucket}) == 1
        assert (
            ClassifierStub(channel)
            .Classify(pb.ClassifyRequest(text="card", options=pb.ClassifyOptions(task="topic")), timeout=TIMEOUT)
            .labels
        )
    printed = capfd.readouterr().out
    assert "32 tokens:" in printed
    assert "as long" in printed


def test_health_goes_red_while_the_device_is_stuck(start_server, folder: Path, monkeypatch) -> None:
    from classer.serve.client.client import Client
    from classer.serve.core.engine import Engine

    go_on = threading.Event()
    real = Engine.launch

    def launch(engine: Engine, ids: Any, bucket: int) -> Any:
        assert go_on.wait(TIMEOUT)
        return real(engine, ids, bucket)

    def eventually(healthy: bool) -> bool:
        end = time.monotonic() + TIMEOUT
        while client.healthy() != healthy and time.monotonic() < end:
            time.sleep(0.05)
        return client.healthy() == healthy

    def alive() -> float | None:
        return running.server.operations.registry.get_sample_value("classer_device_alive")

    with (
        start_server(folder / "one", stall_seconds=0.2, metrics_port=0) as running,
        Client(running.address) as client,
    ):
        monkeypatch.setattr(Engine, "launch", launch)

        async def ask() -> None:
            from classer.serve.client.client import AsyncClient

            async with AsyncClient(running.address) as one:
                task = asyncio.create_task(one.classify("card", "topic", timeout=TIMEOUT))
                assert await asyncio.to_thread(eventually, False)
                assert alive() == 0
                go_on.set()
                assert (await task).chosen
                assert await asyncio.to_thread(eventually, True)
                assert alive() == 1

        assert client.healthy()
        asyncio.run(ask())
