"""Turbine against other servers of the same weights: texts per second, latency and accuracy, in one run.

    python tools/bench/servers.py runs/banking77/bundle-float32 runs/banking77/bundle --data FOLDER

Each server is a process of its own; all stand at once, and are asked in turn, round by round, on loopback, sharing this
machine's cores with the callers. The others: ONNX Runtime's own INT8 and OpenVINO's bfloat16 programs behind our gRPC
server (they replace XLA's, all else is the same); PyTorch in bfloat16 behind FastAPI, with the Hugging Face tokenizer;
and the same behind LitServe with its batching, where `litserve` is installed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from classer.data.readers import read_task_folder
from classer.model.bundle import load_bundle
from classer.tools.bench.serving import call, run_caller
from classer.tools.pipes import drain

try:
    import litserve as lit  # pyright: ignore[reportMissingImports]
except ImportError:
    lit: Any = None

LOADS = {"ClassifyBatch(32), 4 callers": (4, 32), "one text a call, 64 callers": (64, 0)}
START_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Compare:
    """
    Attributes:
      float_bundle: a float32 bundle.
      int8_bundle: the INT8 bundle of the same run.
      data: a folder with task.json, whose test texts are sent.
      texts: number of texts.
      seconds: how long each measurement takes.
      rounds: number of rounds of all measurements; medians are printed.
      focus: also measure Turbine at this focus, which the bundle must be trained for.
      only: names of servers to measure; none is all.
    """

    float_bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FLOAT32")]
    int8_bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INT8")]
    data: Path
    texts: int = 1024
    seconds: float = 8.0
    rounds: int = 3
    focus: str | None = None
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stand:
    """Runs one of the other servers until it is killed.

    Attributes:
      kind: which server.
      export: the export that it serves.
      bundle: the bundle, for runtimes behind our gRPC server.
    """

    kind: Literal["onnxruntime", "openvino", "fastapi", "litserve"]
    export: Path
    bundle: Path


def compare(a: Compare) -> None:
    """Starts the servers, asks them in turn, and prints a table."""
    examples = list(read_task_folder(a.data).splits["test"])[: a.texts]
    texts = [example.text for example in examples]
    labels = [example.labels[0] for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        servers: dict[str, tuple[subprocess.Popen[str], str, str]] = {}
        try:
            for name, protocol, command in commands(a, Path(folder)):
                if not a.only or name in a.only:
                    print(f"Starting {name} …", flush=True)
                    servers[name] = start(command, protocol)
            accuracy = {name: accuracy_of(one, texts, labels) for name, one in servers.items()}
            figures: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
            for number in range(a.rounds):
                for name, (_, protocol, address) in servers.items():
                    for load, (callers, batch) in LOADS.items():
                        ask = call if protocol == "grpc" else call_http
                        measured = ask(address, callers, batch, a.seconds, texts)
                        figures.setdefault((name, load), []).append(measured)
                        print(f"round {number + 1}: {name}, {load}: {measured[0]:,.0f} texts/s", flush=True)
        finally:
            for process, _, _ in servers.values():
                os.killpg(process.pid, signal.SIGKILL)  # LitServe has children
                process.wait()
    print(f"\n{a.data.name}, {len(texts):,} test texts\n")
    print("| server | accuracy | " + " | ".join(f"{load}: texts/s, p50, p99 ms" for load in LOADS) + " |")
    print("|---" * (2 + len(LOADS)) + "|")
    for name in servers:
        cells = []
        for load in LOADS:
            rates, p50, p99 = zip(*figures[name, load], strict=True)
            middle = [statistics.median(values) for values in (rates, p50, p99)]
            cells.append(f"{middle[0]:,.0f}, {1e3 * middle[1]:.1f}, {1e3 * middle[2]:.1f}")
        print(f"| {name} | {accuracy[name]:.2%} | {' | '.join(cells)} |")


def commands(a: Compare, folder: Path) -> list[tuple[str, str, list[str]]]:
    """(name, protocol, command line) of each server; writes the exports that they serve."""
    import onnxruntime.quantization

    from classer.tools.export.run import export_bundle, make_request

    bundle = load_bundle(a.float_bundle)
    for target in ("onnx", "safetensors"):
        export_bundle(make_request(bundle, target, precision=None), target, folder / target)
    onnxruntime.quantization.quantize_dynamic(folder / "onnx" / "model.onnx", folder / "onnx" / "int8.onnx")
    serve = [sys.executable, "-m", "classer.tools.cli.main", "serve", "--port", "0"]
    own = [sys.executable, __file__, "stand"]
    found = [(f"Turbine, {path.name}", "grpc", [*serve, str(path)]) for path in (a.float_bundle, a.int8_bundle)]
    if a.focus:
        found.append((f"Turbine, focus {a.focus}", "grpc", [*serve, str(a.float_bundle), "--focus", a.focus]))
    for name, kind, export, protocol in (
        ("ONNX Runtime INT8, our gRPC", "onnxruntime", "onnx/int8.onnx", "grpc"),
        ("OpenVINO bfloat16, our gRPC", "openvino", "onnx/model.onnx", "grpc"),
        ("PyTorch bfloat16, FastAPI", "fastapi", "safetensors", "http"),
        ("PyTorch bfloat16, LitServe", "litserve", "safetensors", "http"),
    ):
        arguments = ["--kind", kind, "--export", str(folder / export), "--bundle", str(a.float_bundle)]
        found.append((name, protocol, [*own, *arguments]))
    if lit is None:
        print("skipped: LitServe is not installed (pip install litserve)", flush=True)
        found.pop()
    return found


def start(command: Sequence[str], protocol: str) -> tuple[subprocess.Popen[str], str, str]:
    """The process, its protocol, and its address, which is the last word of the line that it prints once it is warm."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving "):
            drain(process.stdout)
            return process, protocol, line.split()[-1]
    raise RuntimeError(f"It ended before it served: {' '.join(command)}")


def accuracy_of(server: tuple[subprocess.Popen[str], str, str], texts: Sequence[str], labels: Sequence[str]) -> float:
    _, protocol, address = server
    if protocol == "grpc":
        from classer.serve.client.client import Classification, Client

        with Client(address) as client:
            outcomes = client.classify_batch(texts, top_k=1)
        best = [one.best.label if isinstance(one, Classification) else "" for one in outcomes]
    else:
        best = asyncio.run(_http_labels(address, texts))
    return float(np.mean([one == label for one, label in zip(best, labels, strict=True)]))


# The callers of HTTP servers: one connection each, kept open.


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> Any:
    writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return json.loads(await reader.readexactly(length))


async def _http_labels(address: str, texts: Sequence[str]) -> list[str]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    found: list[str] = []
    for first in range(0, len(texts), 32):
        answer = await _post(reader, writer, json.dumps({"texts": texts[first : first + 32]}).encode())
        found += [label for label, _ in answer["labels"]]
    writer.close()
    return found


def call_http(
    address: str, callers: int, batch: int, seconds: float, texts: Sequence[str]
) -> tuple[float, float, float]:
    """`bench_serving.call` for HTTP, likewise in a process of its own."""
    return run_caller([sys.executable, __file__, "call"], address, callers, batch, seconds, texts)


def run_calls() -> None:
    """Calls one HTTP server for some seconds, as `run_caller` says on the standard input."""
    address, callers, batch, seconds, texts = json.load(sys.stdin)
    host, port = address.split(":")
    width = batch or 1
    bodies = [json.dumps({"texts": (texts * width)[i : i + width]}).encode() for i in range(0, len(texts), width)]
    latencies: list[float] = []

    async def caller(number: int, end: float) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        turn = number
        while time.monotonic() < end:
            begin = time.monotonic()
            await _post(reader, writer, bodies[turn % len(bodies)])
            latencies.append(time.monotonic() - begin)
            turn += callers
        writer.close()

    async def main() -> float:
        begin = time.monotonic()
        await asyncio.gather(*(caller(number, begin + seconds) for number in range(callers)))
        return time.monotonic() - begin

    took = asyncio.run(main())
    latencies.sort()
    middle, late = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(json.dumps([len(latencies) * width / took, middle, late]))


# The other servers.


def stand(a: Stand) -> None:
    {"onnxruntime": behind_our_server, "openvino": behind_our_server, "fastapi": fastapi, "litserve": litserve}[a.kind](
        a
    )


class OtherRuntime:
    """A `serve.core.models.PredictorProtocol` whose programs another runtime runs."""

    focused = False

    def __init__(self, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        from classer.model.predict import Executables

        self._run = run
        self.executables = Executables()

    def compile(self, batch_size: int, length: int) -> OtherRuntime:
        return self

    def launch_explain(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Any:
        raise NotImplementedError("It has no focus, so it is never asked which tokens it kept.")

    def launch(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: self._run(tokens_BS, lengths_B)

    def logits(self, ids: Sequence[np.ndarray], *, batch_size: int, buckets: Sequence[int]) -> np.ndarray:
        from classer.data.buckets import pad_batch

        return self._run(*pad_batch(ids, len(ids), buckets[-1], 0))


def behind_our_server(a: Stand) -> None:
    from classer.serve.core.models import ModelSettings
    from classer.serve.rpc.server import ServeConfig, serve

    run = _onnxruntime(a.export) if a.kind == "onnxruntime" else _openvino(a.export)
    # No check against the bundle's outputs: the accuracy is measured instead.
    settings = ModelSettings(precision="float32", make_predictor=lambda *_: OtherRuntime(run), golden=False)
    serve(ServeConfig(bundles=(str(a.bundle),), port=0), settings)


def _feeds(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> dict[str, np.ndarray]:
    lengths_B = np.maximum(lengths_B, 1)  # filler rows
    mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    return {"input_ids": tokens_BS.astype(np.int64), "attention_mask": mask_BS.astype(np.int64)}


def _onnxruntime(file: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda tokens_BS, lengths_B: np.asarray(session.run(["logits"], _feeds(tokens_BS, lengths_B))[0])


def _openvino(file: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda tokens_BS, lengths_B: np.array(request.infer(_feeds(tokens_BS, lengths_B))["logits"], np.float32)


class Torch:
    """The exported weights in transformers, with its tokenizer: texts → (label, score) each."""

    def __init__(self, export: Path) -> None:
        import torch
        import transformers
        from safetensors.torch import load_file

        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(export)
        self.model = transformers.AutoModel.from_pretrained(export, add_pooling_layer=False).eval()
        self.head = load_file(export / "head.safetensors")
        task = json.loads((export / "taxonomy.json").read_text())
        self.names = [label["name"] for label in task["tasks"][0]["labels"]]

    def __call__(self, texts: list[str]) -> list[tuple[str, float]]:
        torch = self.torch
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        logits = ((hidden * mask).sum(1) / mask.sum(1)) @ self.head["weight"].T + self.head["bias"]
        scores, best = logits.softmax(-1).max(-1)
        return [(self.names[i], score) for i, score in zip(best.tolist(), scores.tolist(), strict=True)]


def fastapi(a: Stand) -> None:
    import socket

    import uvicorn
    from fastapi import FastAPI

    classify = Torch(a.export)
    app = FastAPI()

    @app.post("/predict")
    def predict(request: dict[str, list[str]]) -> dict[str, list[tuple[str, float]]]:
        return {"labels": classify(request["texts"])}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))

    async def main() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.05)
        print(f"Serving on 127.0.0.1:{port}", flush=True)
        await serving

    asyncio.run(main())


class LitServeApi(lit.LitAPI if lit else object):  # pyright: ignore[reportGeneralTypeIssues]
    """`Torch` for LitServe, which starts it in a process of its own."""

    export = Path()

    def setup(self, device: str) -> None:
        self.classify = Torch(self.export)

    def decode_request(self, request: dict[str, list[str]], **_: Any) -> list[str]:
        return request["texts"]

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, x: list[list[str]], **_: Any) -> list[list[tuple[str, float]]]:
        answers = iter(self.classify([text for texts in x for text in texts]))
        return [[next(answers) for _ in texts] for texts in x]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: list[tuple[str, float]], **_: Any) -> dict[str, Any]:
        return {"labels": output}


def litserve(a: Stand) -> None:
    import socket
    import threading

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def say() -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                asyncio.run(_http_labels(f"127.0.0.1:{port}", ["a text"]))
            except (OSError, RuntimeError, asyncio.IncompleteReadError):
                time.sleep(0.5)
            else:
                print(f"Serving on 127.0.0.1:{port}", flush=True)
                return

    threading.Thread(target=say, daemon=True).start()
    api = LitServeApi(max_batch_size=32, batch_timeout=0.002)
    api.export = a.export
    server = lit.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["stand"]:
        stand(tyro.cli(Stand, args=argv[1:]))
    elif argv[:1] == ["call"]:
        run_calls()
    else:
        compare(tyro.cli(Compare, args=argv, description=__doc__))


if __name__ == "__main__":
    main()
