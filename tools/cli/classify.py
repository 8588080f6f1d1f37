"""The command `classer classify`. It starts without JAX and TensorFlow where a server answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from classer.data.errors import InputError
from classer.serve.wire.limits import DEFAULT_SERVER

from .arguments import parse
from .connection import ConnectionArguments

if TYPE_CHECKING:
    from classer.serve.client.results import Classification

MAX_TIMEOUT = 86_400


@dataclasses.dataclass(frozen=True)
class ClassifyArguments(ConnectionArguments):
    """
    Attributes:
      texts: the texts; none means one text a line from standard input.
      server: address of a running `classer serve`, HOST:PORT.
      bundle: a bundle that classifies in this process, in place of a server.
      task: name of the task; needed only if the model has several.
      top_k: how many labels to show of each text; chosen ones are shown in any case.
      threshold: the score from which a label is chosen, 0 to 1, instead of the model's own thresholds; in a tree, an
        answer that is less sure stops at a label above.
      focus: the share of all tokens to keep on the mean over layers; of a server one that it was started with.
      timeout: seconds to wait for each answer of a server.
      evidence: also show what the model read to its last layer; needs a focus below 1.
      json: print one JSON object a text.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT …]")] = ()
    server: str = DEFAULT_SERVER
    bundle: Path | None = None
    task: str | None = None
    top_k: int = 3
    threshold: float | None = None
    focus: str | None = None
    timeout: float = 10.0
    evidence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self) -> None:
        if self.bundle is not None and self.server != DEFAULT_SERVER:
            raise InputError("Give --server or --bundle, not both: one of them classifies.")
        if ":" not in self.server:
            raise InputError(f"--server is '{self.server}'; an address is HOST:PORT, such as localhost:50051.")
        if self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}; at least 1 label is shown.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold:g}; a score lies between 0 and 1.")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InputError(f"--timeout is {self.timeout:g}; give seconds, above 0 and at most {MAX_TIMEOUT:,}.")


def classify(argv: Sequence[str]) -> None:
    """Show the labels of a text, by a running server or a bundle."""
    arguments: ClassifyArguments = parse(ClassifyArguments, argv, "classer classify", classify.__doc__)
    from classer.serve.wire.errors import InvalidRequest

    texts: Iterable[str] = arguments.texts or _lines_of_stdin()
    with _classifier(arguments) as ask:
        for number, text in enumerate(texts, start=1):
            started = time.perf_counter()
            try:
                answer = ask(text)
            except InvalidRequest as e:
                raise InvalidRequest(f"Text {number}: {e}") from None
            _show(arguments, text, answer, (time.perf_counter() - started) * 1e3)


@contextlib.contextmanager
def _classifier(a: ClassifyArguments) -> Iterator[Callable[[str], Classification]]:
    """A function that classifies one text, by a bundle in this process or by a server."""
    options: dict[str, Any] = {"top_k": a.top_k, "evidence": a.evidence}
    if a.threshold is not None:
        options["threshold"] = a.threshold
    if a.bundle is not None:
        from classer import load

        with load(a.bundle, focus=a.focus or 1) as model:
            yield lambda text: model.classify(text, a.task, **options)
        return
    from classer.serve.client.client import Client

    if a.focus is not None:
        options["focus"] = a.focus
    tls, key = a.connect_with()
    with Client(a.server, tls=tls, key=key) as client:
        yield lambda text: client.classify(text, a.task, timeout=a.timeout, **options)


def _show(a: ClassifyArguments, text: str, answer: Classification, milliseconds: float) -> None:
    if a.json:
        print(json.dumps({**answer.as_json(), "milliseconds": round(milliseconds, 2)}))
        return
    for label in answer.labels:
        print(f"{'→' if label.chosen else ' '} {label.score:7.2%}  {' › '.join(label.path) or label.label}")
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
