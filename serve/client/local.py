"""A bundle in this process: `load` and `LocalModel`. Turbine's programs and answers without a server or gRPC.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np

from ...data.buckets import bucket_for
from ...data.errors import InputError
from ...data.taxonomy import Task, TaskKind
from ...model.bundle import MANIFEST, load_bundle
from ...model.focus import Focus
from ...model.predict import Executables
from ..core.answers import AnswerDecoder, check_threshold, not_finite
from ..core.engine import Engine
from ..core.models import AUTO, ModelSettings, default_model_name, make_engine
from ..core.tokenizing import TokenizedText, encode_texts, length_error
from ..core.work import Scored
from ..proto import classifier_pb2 as pb
from ..wire.errors import InvalidRequest, NotPossible, ServeError
from .results import Classification, Outcome, TaskInfo, read_classification

# Texts, and their characters, that are tokenised and sorted by length at a time; they bound a call's memory.
CHUNK_TEXTS = 4096
CHUNK_CHARS = 4_000_000
# Up to this many texts count as an interactive call: a small program is compiled for it even if a large one is ready.
FEW_TEXTS = 8


def load(path: str | os.PathLike[str], *, focus: float | str = 1, precision: str = AUTO) -> LocalModel:
    """Loads a trained bundle, to classify in this process.

    >>> model = classer.load("runs/tickets/bundle")
    >>> model.classify("my card has not arrived").best.label
    'card arrival'

    Loading checks the whole bundle. A program is compiled when a text of its length first needs it, which takes some
    seconds for each of up to six lengths.

    Args:
      path: the bundle's folder (INT8 or float32), or the folder of a finished training run, which holds it.
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all. What calls take that name none.
      precision: what to compute in: "float32", "bfloat16" or "int8"; "auto" measures which is fastest for each length.

    Raises:
      InputError: there is no bundle, or it is damaged, or computes something else on this machine; a focus or precision
        that it does not have.
    """
    return LocalModel(_bundle_folder(path), focus=focus, precision=precision)


class _Request(NamedTuple):
    """The options of a call after they were checked."""

    task: Task
    engine: Engine
    threshold: float | None
    focus: str


class LocalModel:
    """A classifier in this process. `load` makes it.

    Methods may be called from any number of threads. Use it as a context manager or `close` it to free its memory
    early. It can be pickled: the other process loads the bundle from the same path.

    Attributes:
      path: the bundle's folder.
      name: the model's name, as `classer serve` would serve it.
      version: a hash of the bundle's content.
      tasks: what it can be asked for, as `Client.tasks` gives it.
      max_length: how many tokens of a text are read.
    """

    def __init__(self, path: Path, *, focus: float | str = 1, precision: str = AUTO) -> None:
        self._settings = ModelSettings((_focus_text(focus),), precision)
        self._bundle = load_bundle(path)
        self.path = path
        self.name = default_model_name(path)
        self.version = self._bundle.version
        self.max_length = self._bundle.max_length
        self.tasks = tuple(
            TaskInfo(task.name, task.kind.value, len(task.labels), self.name, self.version)
            for task in self._bundle.taxonomy.tasks
        )
        self._answers = AnswerDecoder(self._bundle.taxonomy, self._bundle.calibration, self.name, self.version)
        self._executables: list[Executables] = []
        self._engines: dict[Focus, Engine] = {}
        self._lock = threading.Lock()  # engines are used from one thread at a time
        self._closed = False
        self._engine(None)

    def __repr__(self) -> str:
        tasks = ", ".join(f"{task.name} ({task.kind}, {task.num_labels} labels)" for task in self.tasks)
        return f"<classer model '{self.name}', version {self.version}: {tasks}>"

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {"focus": self._settings.focuses[0], "precision": self._settings.precision}
        return functools.partial(load, **settings), (str(self.path),)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees weights and programs. A later call raises `NotPossible`."""
        with self._lock:
            self._closed = True
            self._engines.clear()
            self._executables.clear()
            self._bundle = dataclasses.replace(self._bundle, weights={})

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names of the only task, which are the columns of `predict_proba`.

        Raises:
          InvalidRequest: there are several tasks; see `labels_of`.
        """
        return self.labels_of(None)

    def labels_of(self, task: str | None) -> tuple[str, ...]:
        """The label names of a task: the columns of `predict_proba`. Raises UnknownTask, InvalidRequest."""
        return self._task(task).label_names

    def classify(
        self,
        text: str,
        task: str | None = None,
        *,
        top_k: int = 0,
        threshold: float | None = None,
        focus: float | str | None = None,
        evidence: bool = False,
    ) -> Classification:
        """Classifies one text.

        >>> answer = model.classify("my card has not arrived", threshold=0.5)
        >>> answer.best.label, answer.best.score, answer.chosen
        ('card arrival', 0.97, ('card arrival',))

        Args:
          text: at most 1,000,000 characters; may be empty.
          task: may be left out if the model has one only.
          top_k: how many labels to return, best first; 0 means 5. Chosen ones come in any case.
          threshold: the score from which a label is chosen, 0 to 1, instead of the model's own.
          focus: the share of the text's tokens to read, for this call; see `load`.
          evidence: whether to return the spans that the model read to its last layer; needs a focus below 1.

        Raises:
          InvalidRequest: an argument is out of its limits.
          UnknownTask: there is no task of that name.
          InputError: the focus is out of range, or the model was not trained for it.
        """
        if not isinstance(text, str):
            hint = "; for several texts use classify_batch or predict" if _is_several(text) else ""
            raise InvalidRequest(f"classify takes one text, a str, not {described(text)}{hint}.", field="text")
        (outcome,) = self.classify_batch([text], task, top_k=top_k, threshold=threshold, focus=focus, evidence=evidence)
        if isinstance(outcome, ServeError):
            raise outcome
        return outcome

    def classify_batch(
        self,
        texts: Iterable[str],
        task: str | None = None,
        *,
        top_k: int = 0,
        threshold: float | None = None,
        focus: float | str | None = None,
        evidence: bool = False,
    ) -> list[Outcome]:
        """Classifies any number of texts, sorted by length into full batches.

        Args:
          texts: see `predict`.
          task, top_k, threshold, focus, evidence: as for `classify`, for all texts.

        Returns:
          For each text, in the order given, its answer or the error of its own (a text that is too long).

        Raises:
          ClasserError: as `classify`, for what is wrong with the whole call.
        """
        request = self._request(task, threshold, focus, evidence)
        if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 0:
            raise InvalidRequest(f"top_k must be a whole number from 0; it is {top_k!r}.", field="top_k")
        outcomes: list[Outcome] = []
        for chunk in text_chunks(texts, "classify_batch"):
            results = self._score(chunk, request.engine, spans=evidence)
            good = [one for one in results if not isinstance(one, ServeError)]
            answers = iter(
                self._answers.answer(
                    request.task,
                    [tokens for tokens, _ in good],
                    [scored for _, scored in good],
                    int(top_k),
                    threshold=request.threshold,
                    evidence=evidence,
                    focus=request.focus,
                )
            )
            for one in results:
                answer = one if isinstance(one, ServeError) else next(answers)
                outcomes.append(read_classification(answer) if isinstance(answer, pb.ClassifyResponse) else answer)
        return outcomes

    def predict(
        self,
        texts: Iterable[str],
        task: str | None = None,
        *,
        threshold: float | None = None,
        focus: float | str | None = None,
    ) -> list[Any]:
        """The chosen label of each text.

        >>> model.predict(["my card has not arrived", "where is my refund"])
        ['card arrival', 'refund status']

        Args:
          texts: a list, tuple, NumPy array, pandas or polars Series, column of a `datasets.Dataset`, generator or other
            iterable of str; of one text give a list too, or use `classify`. An empty one gives an empty list.
          task, threshold, focus: as for `classify`, for all texts.

        Returns:
          A list with an entry for each text, in the order given. Binary and multiclass tasks: the label's name, a str;
          None if its score does not reach `threshold`. Hierarchical tasks: the name of the leaf, or of the label above
          it at which the answer stops. Multilabel tasks: a list of names, highest score first, perhaps empty.

        Raises:
          ClasserError: as `classify`; or an entry is no text or too long (the message names it, counted from 0).
        """
        request = self._request(task, threshold, focus)
        names = request.task.label_names
        labels: list[Any] = []
        for probs_NL, chosen_NL in self._decoded(texts, request, "predict"):
            for probs_L, chosen_L in zip(probs_NL, chosen_NL, strict=True):
                chosen = np.flatnonzero(chosen_L)
                best_first = chosen[np.argsort(-probs_L[chosen], kind="stable")]
                held = [names[label] for label in best_first]
                multilabel = request.task.kind is TaskKind.MULTILABEL
                labels.append(held if multilabel else next(iter(held), None))
        return labels

    def predict_proba(
        self, texts: Iterable[str], task: str | None = None, *, focus: float | str | None = None
    ) -> np.ndarray:
        """Calibrated probabilities of all labels.

        >>> model.predict_proba(["my card has not arrived"])[0, model.labels.index("card arrival")]
        0.97

        Args:
          texts: as for `predict`.
          task, focus: as for `classify`, for all texts.

        Returns:
          float32 (N, L), rows in the order of the texts, columns in that of `labels`. The rows of binary and multiclass
          tasks sum to one; so do the leaves of hierarchical ones, whose other labels have the sum of those below them.

        Raises:
          ClasserError: as `predict`.
        """
        request = self._request(task, None, focus)
        blocks = [probs_NL for probs_NL, _ in self._decoded(texts, request, "predict_proba")]
        return np.concatenate([np.zeros((0, len(request.task.labels)), np.float32), *blocks])

    def _request(
        self, task: str | None, threshold: float | None, focus: float | str | None, evidence: bool = False
    ) -> _Request:
        """Checks the options of a call. Raises as `classify`."""
        found = self._task(task)
        if threshold is not None:
            if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
                raise InvalidRequest(f"threshold must be a number from 0 to 1, not {threshold!r}.", field="threshold")
            threshold = float(np.float32(threshold))  # as it is on the wire
            check_threshold(threshold)
        engine = self._engine(focus)
        if evidence and not engine.focused:
            hint = (
                "give a focus below 1, such as focus=0.5"
                if self._bundle.encoder.gated
                else ("this model was not trained for focus (`classer train --focus-epochs`)")
            )
            raise InvalidRequest(f"evidence needs a focus that leaves tokens out; {hint}.", field="evidence")
        return _Request(found, engine, threshold, self._focus(focus))

    def _task(self, name: str | None) -> Task:
        if not isinstance(name, str | None):
            known = ", ".join(task.name for task in self.tasks)
            raise InvalidRequest(f"task is {described(name)}; it is the name of a task: {known}.", field="task")
        return self._answers.task(name or "")

    def _focus(self, focus: float | str | None) -> str:
        return self._settings.focuses[0] if focus is None else _focus_text(focus)

    def _engine(self, focus: float | str | None) -> Engine:
        parsed = Focus.parse(self._focus(focus), self._bundle.encoder.num_layers)
        with self._lock:
            if self._closed:
                raise NotPossible(f"The model '{self.name}' is closed; load it again.")
            if parsed not in self._engines:
                self._engines[parsed] = make_engine(self._bundle, parsed, self._settings, self._executables)
            return self._engines[parsed]

    def _decoded(self, texts: Iterable[str], request: _Request, method: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of probs_NL and chosen_NL in the order of the texts. Raises the error of a text with its position."""
        start = 0
        for chunk in text_chunks(texts, method):
            results = self._score(chunk, request.engine)
            for row, one in enumerate(results, start):
                if isinstance(one, ServeError):
                    _raise_at(row, one)
            scored = [one[1] for one in results if not isinstance(one, ServeError)]
            probs_NL, chosen_NL, finite_N = self._answers.decode(request.task, scored, request.threshold)
            if not finite_N.all():
                _raise_at(start + int(np.argmin(finite_N)), not_finite())
            start += len(chunk)
            yield probs_NL, chosen_NL

    def _score(
        self, texts: Sequence[str], engine: Engine, *, spans: bool = False
    ) -> list[tuple[TokenizedText, Scored] | ServeError]:
        """Tokens and logits of each text, or its error, in order; batches are of texts of like length."""
        results: list[Any] = list(map(length_error, texts))
        short = [i for i, error in enumerate(results) if error is None]
        tokens = encode_texts(self._bundle.tokenizer, [texts[i] for i in short], self.max_length, spans=spans)
        by_bucket: dict[int, list[int]] = {}
        for i, one in zip(short, tokens, strict=True):
            results[i] = one
            if isinstance(one, TokenizedText):
                by_bucket.setdefault(bucket_for(len(one.ids), engine.buckets), []).append(i)
        arrived = time.perf_counter()
        for bucket, rows in sorted(by_bucket.items()):
            with self._lock:
                engine.ensure(bucket, len(rows), exact=len(texts) <= FEW_TEXTS)
            while rows:
                with self._lock:  # for one batch, so that other threads get their turns
                    begun = time.perf_counter()
                    batch, rows = _split(rows, engine.batch_for(bucket, len(rows)))
                    outputs = engine.run([results[i].ids for i in batch], bucket)
                    seconds = time.perf_counter() - begun
                for i, output in zip(batch, outputs, strict=True):
                    results[i] = (results[i], Scored(output, begun - arrived, seconds))
        return results


def _bundle_folder(path: str | os.PathLike[str]) -> Path:
    """The bundle that a path names: itself, or the `bundle` of a training run. Raises InputError."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"load takes the path of a bundle, a str or a Path, not {described(path)}.")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise InputError(
            f"{folder} is a file; load takes a bundle's folder, which `classer train` writes to OUT/bundle."
        )
    if not (folder / MANIFEST).is_file():
        if (folder / "bundle" / MANIFEST).is_file():
            return folder / "bundle"
        if (folder / "job.json").is_file():
            raise InputError(
                f"{folder} is a training run that has no bundle yet; finish it with `classer train … --resume`."
            )
        if (folder / "export.json").is_file():
            raise InputError(f"{folder} is an export; load takes the bundle that it was made from.")
    return folder


def _focus_text(focus: float | str) -> str:
    if isinstance(focus, bool) or not isinstance(focus, str | int | float | np.number):
        raise InputError(f"focus is {described(focus)}; it is a number above 0 and at most 1, or a str of several.")
    return focus if isinstance(focus, str) else f"{focus:g}"


def text_chunks(texts: Iterable[str], method: str) -> Iterator[list[str]]:
    """Lists of at most `CHUNK_TEXTS` texts and about `CHUNK_CHARS` characters. Raises InvalidRequest: no texts."""
    chunk: list[str] = []
    chars = 0
    for row, text in enumerate(_iterable(texts, method)):
        if not isinstance(text, str):
            raise InvalidRequest(f"texts[{row}] is {described(text)}; {method} takes texts, each a str.", field="texts")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                sentence = "holds a lone surrogate, which UTF-8 cannot carry; decode it properly"
                raise InvalidRequest(f"texts[{row}] {sentence}.", field="texts") from None
        chunk.append(text)
        chars += len(text)
        if len(chunk) == CHUNK_TEXTS or chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _iterable(texts: Any, method: str) -> Iterable[Any]:
    """The texts, one after the other. Raises InvalidRequest: it is one text, a table, or has no order or no entries."""
    expected = f"{method} takes a list, array, Series or other iterable of texts"
    if isinstance(texts, str):
        raise InvalidRequest(f"{expected}; for one text use classify, or give a list of one.", field="texts")
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):  # pandas, polars; datasets, pyarrow
        raise InvalidRequest(f"{expected}, not a table; give one of its columns, such as data['text'].", field="texts")
    if getattr(texts, "ndim", 1) != 1:
        raise InvalidRequest(f"{expected}; this array has the shape {texts.shape} instead of (N,).", field="texts")
    if not _is_several(texts):
        raise InvalidRequest(f"{expected}, not {described(texts)}.", field="texts")
    return texts.to_pylist() if hasattr(texts, "to_pylist") else texts  # of pyarrow


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping | set | frozenset)


def described(value: Any) -> str:
    """A value that is no text, for a sentence; never with its content, which may be long or private."""
    if value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType"):
        return f"{'NaN' if isinstance(value, float) else value}, a missing value"
    if isinstance(value, bytes | bytearray):
        return "bytes, which must be decoded first"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _raise_at(row: int, error: ServeError) -> NoReturn:
    raise type(error)(f"texts[{row}]: {error}", field="texts") from None


def _split(rows: list[int], count: int) -> tuple[list[int], list[int]]:
    return rows[:count], rows[count:]
