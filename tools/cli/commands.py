"""The commands behind `classer`. Each takes its arguments, prints for people, and raises what they can mend.

Heavy modules are imported inside the commands, so that `classer classify` starts without JAX and TensorFlow.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from classer.data.errors import InputError
from classer.tools.cli.connection import ConnectionArguments

from .arguments import BundleArgument, check_can_make, parse

if TYPE_CHECKING:
    pass


def serve(argv: Sequence[str]) -> None:
    """Serve bundles over gRPC."""
    from classer.serve.rpc.server import ServeConfig
    from classer.serve.rpc.server import serve as run_server
    from classer.tools.cli.environment import from_environment

    @dataclasses.dataclass(frozen=True)
    class Arguments(ServeConfig):
        bundles: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="BUNDLE")] = ()

    more, argv = from_environment(Arguments, argv, os.environ)
    description = f"{serve.__doc__} Every option is also an environment variable: --max-waiting-tokens is " + (
        "CLASSER_MAX_WAITING_TOKENS, the bundles are CLASSER_BUNDLES; the command line goes before it."
    )
    Arguments.__doc__ = ServeConfig.__doc__
    default: dict[str, Any] = {"default": Arguments(**more)} if more else {}
    arguments = tyro.cli(Arguments, prog="classer serve", args=argv, description=description, **default)
    run_server(ServeConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ServeConfig)}))


def frontend(argv: Sequence[str]) -> None:
    """Run a front end, on this machine or another, before an engine that `classer serve` runs."""
    from classer.serve.ops.operations import OperationsConfig
    from classer.serve.rpc.frontend import FrontEndConfig, run_front_end
    from classer.tools.cli.environment import from_environment

    for kind in (FrontEndConfig, OperationsConfig):
        _, argv = from_environment(kind, argv, os.environ)
    options = (tyro.conf.OmitArgPrefixes,)
    description = f"{frontend.__doc__} Every option is also an environment variable, --engine for one CLASSER_ENGINE."
    run_front_end(tyro.cli(FrontEndConfig, prog="classer frontend", args=argv, description=description, config=options))


MAX_TIMEOUT = 86_400


@dataclasses.dataclass(frozen=True)
class ClassifyArguments(ConnectionArguments):
    """
    Attributes:
      texts: the texts; none means one text a line from standard input.
      server: address of a running `classer serve`, HOST:PORT.
      task: name of the task; needed only if the model has several.
      top_k: how many labels to show of each text; chosen ones are shown in any case.
      threshold: the score from which a label is chosen, 0 to 1, instead of the model's own thresholds; in a tree, an
        answer that is less sure stops at a label above.
      timeout: seconds to wait for each answer.
      evidence: also show what the model read to its last layer; the server must run with --focus below 1.
      json: print one JSON object a text.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT …]")] = ()
    server: str = "localhost:50051"
    task: str | None = None
    top_k: int = 3
    threshold: float | None = None
    timeout: float = 10.0
    evidence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self) -> None:
        if ":" not in self.server:
            raise InputError(f"--server is '{self.server}'; an address is HOST:PORT, such as localhost:50051.")
        if self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}; at least 1 label is shown.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold:g}; a score lies between 0 and 1.")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InputError(f"--timeout is {self.timeout:g}; give seconds, above 0 and at most {MAX_TIMEOUT:,}.")


def classify(argv: Sequence[str]) -> None:
    """Ask a running server which labels a text has."""
    arguments: ClassifyArguments = parse(ClassifyArguments, argv, "classer classify", classify.__doc__)
    from classer.serve.client.client import Client, Options
    from classer.serve.wire.errors import InvalidRequest

    options: Options = {"top_k": arguments.top_k, "evidence": arguments.evidence}
    if arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    texts: Iterable[str] = arguments.texts or _lines_of_stdin()
    tls, key = arguments.connect_with()
    with Client(arguments.server, tls=tls, key=key) as client:
        for number, text in enumerate(texts, start=1):
            started = time.perf_counter()
            try:
                answer = client.classify(
                    text,
                    arguments.task,
                    timeout=arguments.timeout,
                    **options,
                )
            except InvalidRequest as e:
                raise InvalidRequest(f"Text {number}: {e}") from None
            milliseconds = (time.perf_counter() - started) * 1e3
            if arguments.json:
                print(json.dumps({**dataclasses.asdict(answer), "milliseconds": round(milliseconds, 2)}))
                continue
            for label in answer.labels:
                print(f"{'→' if label.chosen else ' '} {label.score:7.2%}  {' › '.join(label.path) or label.name}")
            if answer.evidence:
                spans = " · ".join(f"{text[span.start : span.end]} {span.score:.0%}" for span in answer.evidence)
                print(f"  read to the end: {spans}")
            cut = ", cut to them" if answer.truncated else ""
            print(f"  {answer.tokens} tokens{cut}, {milliseconds:.1f} ms, model {answer.model_version}")


def _lines_of_stdin() -> Iterator[str]:
    if sys.stdin.isatty():
        print("Type texts, one a line; Ctrl-D ends.", file=sys.stderr)
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise InputError(
                f"Standard input, line {number}: byte 0x{line[e.start]:02x} at its position {e.start} is not UTF-8."
            ) from None


def teach(argv: Sequence[str]) -> None:
    """Ask teachers for soft labels, which `classer train --soft-labels` learns from."""
    from classer.train.teach import TeachJob
    from classer.train.teach import teach as ask

    job = parse(TeachJob, argv, "classer teach", teach.__doc__)
    check_can_make(job.out.parent)
    ask(job)
    print(f"Learn from it:  classer train --soft-labels {shlex.quote(str(job.out))} --data FOLDER --out FOLDER")


def gateway(argv: Sequence[str]) -> None:
    """Offer a running server over HTTP and JSON, with an OpenAPI page."""
    from classer.serve.gateway.run import GatewayConfig, run_gateway
    from classer.tools.cli.environment import from_environment

    more, argv = from_environment(GatewayConfig, argv, os.environ)
    description = f"{gateway.__doc__} Every option is also an environment variable, --port for one CLASSER_PORT."
    run_gateway(
        tyro.cli(
            GatewayConfig, prog="classer gateway", args=argv, description=description, default=GatewayConfig(**more)
        )
    )


def keys(argv: Sequence[str]) -> None:
    """Make, list and revoke the API keys of a server."""
    from classer.tools.cli.keys import KeysArguments
    from classer.tools.cli.keys import keys as run_keys

    run_keys(tyro.cli(KeysArguments, prog="classer keys", args=list(argv), description=keys.__doc__))


def load_test(argv: Sequence[str]) -> None:
    """Load a running server with real texts and report its latency and throughput."""
    from classer.tools.cli.load_test import LoadTestArguments
    from classer.tools.cli.load_test import load_test as run_load_test

    run_load_test(parse(LoadTestArguments, argv, "classer load-test", load_test.__doc__))


def upcycle(argv: Sequence[str]) -> None:
    """Turn a pretrained encoder of the BERT family into the native architecture."""
    from classer.train.upcycle import UpcycleJob, run_upcycle

    job = parse(UpcycleJob, argv, "classer upcycle", upcycle.__doc__)
    check_can_make(job.out)
    run_upcycle(job)
    print(f"Train from it:  classer train --encoder {shlex.quote(str(job.out))} --data FILE --out FOLDER")


@dataclasses.dataclass(frozen=True)
class QuantizeArguments:
    """
    Attributes:
      bundle: a float32 bundle.
      out: a new folder for the INT8 one.
    """

    bundle: BundleArgument
    out: Path


def quantize(argv: Sequence[str]) -> None:
    """Turn a float32 bundle into an INT8 one."""
    from classer.model.bundle import load_bundle, save_bundle
    from classer.model.bundle import quantize as to_int8

    a = parse(QuantizeArguments, argv, "classer quantize", quantize.__doc__)
    check_can_make(a.out, new=True)
    before = load_bundle(a.bundle)
    after = save_bundle(to_int8(before), a.out)
    old, new = (sum(weights.nbytes for weights in bundle.weights.values()) for bundle in (before, after))
    print(f"{a.out}: INT8, version {after.version}, weights {new / 1e6:.1f} MB ({new / old:.3f} of float32).")


@dataclasses.dataclass(frozen=True)
class InfoArguments:
    """
    Attributes:
      bundle: the bundle to describe.
    """

    bundle: BundleArgument


def info(argv: Sequence[str]) -> None:
    """Check a bundle and say what is in it."""
    from classer.model.bundle import load_bundle

    bundle = load_bundle(parse(InfoArguments, argv, "classer info", info.__doc__).bundle)
    encoder = bundle.encoder
    parameters = sum(value.size for name, value in bundle.weights.items() if not name.endswith("_scale"))
    print(f"{bundle.path}: whole, {bundle.precision}, version {bundle.version}")
    print(
        f"  encoder: {encoder.num_layers} layers, {encoder.d_model} wide, {encoder.num_heads} heads, "
        f"{parameters / 1e6:.1f} M parameters; texts are read up to {bundle.max_length} tokens"
    )
    for task in bundle.taxonomy.tasks:
        calibration = bundle.calibration[task.name]
        print(
            f"  task '{task.name}': {task.kind}, {len(task.labels)} labels, temperature {calibration.temperature:.3f}"
        )
        for i, label in enumerate(task.labels):
            threshold = f"  from {calibration.thresholds[i]:.3f}" if calibration.thresholds else ""
            description = f"  {label.description}" if label.description else ""
            print(f"    {'  ' * int(task.depth_L[i])}{label.name}{threshold}{description}")
