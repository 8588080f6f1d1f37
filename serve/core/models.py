"""The models of a server: loading, looking up, and swapping them while requests run.

No gRPC. `Models` is used from one event loop; slow work runs in threads beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ...data.errors import InputError
from ...data.taxonomy import Task
from ...model.bundle import GOLDEN_LENGTH, Bundle, load_bundle
from ...model.config import EncoderConfig
from ...model.focus import Focus
from ...model.precision import Precision
from ...model.predict import Executables
from ...model.variants import AGREEMENT, VARIANTS, disagreement, golden_ids, variant_predictor
from ..wire.errors import InvalidRequest, NotPossible, UnknownTask
from .answers import AnswerDecoder
from .engine import CompilerProtocol, Engine, ExecutableProtocol, GoldenCheck, TimedProgram
from .tokenizing import TokenizerStage

# Valid names: they stand in URLs, metrics and log lines.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AUTO = "auto"


class PredictorProtocol(CompilerProtocol, Protocol):
    """The part of `model.predict.Predictor` that `make_engine` uses."""

    @property
    def executables(self) -> Executables: ...

    def logits(self, ids: Sequence[np.ndarray], *, batch_size: int, buckets: Sequence[int]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How models are compiled.

    Attributes:
      focuses: the focus budgets to compile programs for, each as `Focus.parse` takes it; the first is the default.
      precision: one of `VARIANTS`, or `AUTO`: the fastest for each bucket, as measured.
      make_predictor: the compiler of a bundle in one precision and at one focus; None is the full focus.
      golden: whether each precision must reproduce the outputs of the bundle's own.
    """

    focuses: tuple[str, ...] = ("1",)
    precision: str = AUTO
    make_predictor: Callable[[Bundle, Precision, Focus | None], PredictorProtocol] = variant_predictor
    golden: bool = True

    def __post_init__(self) -> None:
        if self.precision not in (AUTO, *VARIANTS):
            raise InputError(f"--precision is '{self.precision}'; it is one of {AUTO}, {', '.join(VARIANTS)}.")
        if not self.focuses:
            raise InputError("--focus names no budget; give at least one, such as 1.")


class State(enum.Enum):
    """The states of a model, in order."""

    LOADING = 1
    READY = 2
    RETIRING = 3


class Model:
    """One version of a model, with everything needed to answer requests.

    Attributes:
      name: the name under which it is served.
      bundle: its bundle, without the weights.
      engines: by focus, the default one first.
      executables: its compiled programs, kept so that the next version of the same shapes compiles none.
      state: its state.
      in_flight: how many requests use it now.
      loaded_at: seconds since 1970.
    """

    def __init__(self, name: str, bundle: Bundle) -> None:
        self.name = name
        self.bundle = dataclasses.replace(bundle, weights={})
        self.engines: dict[str, Engine] = {}
        self.executables: list[Executables] = []
        self.tokenizer = TokenizerStage(bundle.tokenizer, bundle.max_length)
        self.answers = AnswerDecoder(bundle.taxonomy, bundle.calibration, name, bundle.version)
        self.state = State.LOADING
        self.in_flight = 0
        self.loaded_at = time.time()
        self._idle: Callable[[Model], None] = lambda _: None

    @property
    def version(self) -> str:
        return self.bundle.version

    def engine(self, focus: str) -> Engine:
        """The engine of a focus; the default engine if `focus` is empty.

        Raises:
          InvalidRequest: there is no engine of that focus.
        """
        if not focus:
            return next(iter(self.engines.values()))
        if focus not in self.engines:
            known = ", ".join(self.engines)
            raise InvalidRequest(f"The field `focus` is none of those that this model serves: {known}.", field="focus")
        return self.engines[focus]

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keeps the model from being freed while a request uses it."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.state is State.RETIRING and not self.in_flight:
                self._idle(self)

    def retire(self, idle: Callable[[Model], None]) -> None:
        """Marks the model as retiring; `idle` is called after its last request."""
        self.state, self._idle = State.RETIRING, idle
        if not self.in_flight:
            idle(self)

    def warm_up(self) -> Iterator[TimedProgram]:
        """Compiles and times the programs, one with each `next`. Runs in any one thread."""
        self.bundle.tokenizer.encode(["warm up"], self.bundle.max_length)
        for engine in self.engines.values():
            yield from engine.warm_up()


class Models:
    """The models of a server.

    Args:
      folders: the bundles that may be loaded, by name.
      settings: how they are compiled.
    """

    def __init__(self, folders: Mapping[str, Path], settings: ModelSettings | None = None) -> None:
        self.folders = dict(folders)
        self._settings = settings or ModelSettings()
        self._versions: dict[str, list[Model]] = {}  # by name: the ready ones, in the order of loading
        self._default: dict[str, Model] = {}
        self._others: list[Model] = []  # loading or retiring
        self._loading = asyncio.Lock()

    def __iter__(self) -> Iterator[Model]:
        """All models in any state, sorted by name."""
        ready = [model for models in self._versions.values() for model in models]
        yield from sorted([*ready, *self._others], key=lambda model: (model.name, model.loaded_at))

    def is_default(self, model: Model) -> bool:
        return self._default.get(model.name) is model

    @property
    def defaults(self) -> list[Model]:
        """The default version of each model, by name."""
        return [self._default[name] for name in sorted(self._default)]

    def find(self, name: str, version: str = "") -> Model:
        """A ready model.

        Args:
          name: its name; may be empty if there is only one.
          version: its version; empty for the default one.

        Raises:
          UnknownTask: there is no such model.
          InvalidRequest: the name is empty and there are several.
        """
        if not self._default:
            raise UnknownTask("No model is loaded; load one through ModelAdmin.", field="model")
        known = ", ".join(sorted(self._default))
        if not name and len(self._default) > 1:
            raise InvalidRequest(f"The field `model` is empty, but there are several; name one of: {known}.")
        name = name or next(iter(self._default))
        if name not in self._default:
            raise UnknownTask(f"There is no model of the name given; there are: {known}.", field="model")
        if not version:
            return self._default[name]
        for model in self._versions[name]:
            if model.version == version:
                return model
        versions = ", ".join(model.version for model in self._versions[name])
        raise UnknownTask(f"The model has no version as given; it has: {versions}.", field="model_version")

    def resolve(self, task: str, model: str = "", version: str = "") -> tuple[Model, Task]:
        """The model and task of a request, from the names that it gives; each may be empty if there is only one.

        Raises:
          UnknownTask: there is no such task or model.
          InvalidRequest: there are several.
        """
        if model or version or len(self._default) <= 1:
            found = self.find(model, version)
            return found, found.answers.task(task)
        having = [one for one in self.defaults if task in one.answers.tasks]
        if len(having) == 1:
            return having[0], having[0].answers.task(task)
        if having:
            names = ", ".join(one.name for one in having)
            raise InvalidRequest(f"Several models have this task; name one of them in `model`: {names}.", field="model")
        known = ", ".join(name for one in self.defaults for name in one.answers.tasks)
        if task:
            raise UnknownTask(f"No model has a task of the name given; there are: {known}.", field="task")
        raise InvalidRequest(f"The field `task` is empty, but there are several; name one of: {known}.", field="task")

    async def load(
        self,
        bundle: str,
        name: str = "",
        *,
        default: bool = True,
        keep_old: bool = False,
        progress: Callable[[Model, TimedProgram | None], bool] = lambda model, warmed: True,
    ) -> Model:
        """Loads a bundle and compiles its programs; then requests go to it, all from the same moment.

        Args:
          bundle: a name of `folders`.
          name: the name to serve it under; empty for the bundle's.
          default: whether it becomes the default version; the first version of a name does in any case.
          keep_old: whether the former default version stays; else it is retired.
          progress: called with the model before and after each compiled program; False gives up.

        Raises:
          UnknownTask: a name is not in `folders`.
          NotPossible: that version is loaded under that name already, or loading was given up.
          InputError: the bundle cannot be used.
        """
        for given in (bundle, name or bundle):
            if given not in self.folders:
                known = ", ".join(sorted(self.folders))
                raise UnknownTask(f"There is no bundle of the name given; there are: {known}.", field="bundle")
        name = name or bundle
        async with self._loading:
            sibling = self._default.get(name)
            model = await asyncio.to_thread(_prepare, name, self.folders[bundle], self._settings, sibling)
            if any(one.version == model.version for one in self._versions.get(name, ())):
                raise NotPossible(f"Version {model.version} of '{name}' is loaded already.")
            self._others.append(model)
            try:
                programs = model.warm_up()
                warmed: TimedProgram | None = None
                while progress(model, warmed):
                    if (warmed := await asyncio.to_thread(next, programs, None)) is None:
                        break
                else:
                    raise NotPossible("Loading was given up.")
            finally:
                self._others.remove(model)
            await asyncio.to_thread(_settle)
            model.state = State.READY
            self._versions.setdefault(name, []).append(model)
            old = self._default.get(name)  # another one than before, if it was unloaded or changed meanwhile
            if default or old is None:
                self._default[name] = model
                if old is not None and not keep_old:
                    self._retire(old)
        return model

    def unload(self, name: str, version: str) -> None:
        """Retires a version. Requests that use it are still answered.

        Raises:
          InvalidRequest: the name or the version is empty.
          UnknownTask: there is no such version.
          NotPossible: it is the default version, and there are others.
        """
        if not name or not version:
            raise InvalidRequest("Both `name` and `version` must be given.", field="version" if name else "name")
        model = self.find(name, version)
        if self.is_default(model):
            if len(self._versions[name]) > 1:
                raise NotPossible(f"Version {version} is the default of '{name}'; make another one the default first.")
            del self._default[name]
        self._retire(model)

    def set_default(self, name: str, version: str) -> Model:
        """Makes a ready version the default of its name. Raises the errors of `find`."""
        if not name or not version:
            raise InvalidRequest("Both `name` and `version` must be given.", field="version" if name else "name")
        self._default[name] = self.find(name, version)
        return self._default[name]

    def close(self) -> None:
        """Ends every thread. No request may be in flight."""
        for model in self:
            model.tokenizer.close()

    def _retire(self, model: Model) -> None:
        self._versions[model.name].remove(model)
        if not self._versions[model.name]:
            del self._versions[model.name]
        self._others.append(model)
        model.retire(self._free)

    def _free(self, model: Model) -> None:
        self._others.remove(model)
        model.tokenizer.close()
        model.engines.clear()
        # Later, when the last request has dropped its references too.
        asyncio.get_running_loop().call_later(0.1, lambda: asyncio.get_running_loop().run_in_executor(None, _trim))


def default_model_name(folder: Path) -> str:
    """The name of a bundle's model: the folder's, or that of its parent where it is only called bundle…."""
    absolute = folder.absolute()
    return absolute.parent.name if absolute.name.startswith("bundle") else absolute.name


def named_folders(sources: Sequence[str]) -> dict[str, Path]:
    """Bundles by name, from FOLDER (see `default_model_name`) or NAME=FOLDER each.

    Raises:
      InputError: no name, one that is out of its limits, or one that stands for two folders.
    """
    folders: dict[str, Path] = {}
    for source in sources:
        given, equals, rest = source.partition("=")
        if equals and "/" not in given:
            name, path = given, Path(rest)
        else:
            path = Path(source)
            name = default_model_name(path)
        if not _NAME.fullmatch(name):
            raise InputError(
                f"'{source}' would be served as '{name}'; a name is 1 to 64 letters, digits, dots, dashes and "
                "underscores. Give it one: NAME=FOLDER."
            )
        if folders.get(name, path) != path:
            raise InputError(f"{folders[name]} and {path} would both be served as '{name}'; name them: NAME=FOLDER.")
        folders[name] = path
    return folders


@dataclasses.dataclass(eq=False)
class _OnDemand:
    """A predictor that is made, with its weights on the device, at its first use; a plan may never use it.

    Its compiled programs are added to `executables`.
    """

    bundle: Bundle
    variant: Precision
    focus: Focus | None
    settings: ModelSettings
    executables: list[Executables]

    @functools.cached_property
    def predictor(self) -> PredictorProtocol:
        predictor = self.settings.make_predictor(self.bundle, self.variant, self.focus)
        self.executables.append(predictor.executables)
        return predictor

    @property
    def focused(self) -> bool:
        return self.focus is not None

    def compile(self, batch_size: int, length: int) -> ExecutableProtocol:
        return self.predictor.compile(batch_size, length)


def _prepare(name: str, path: Path, settings: ModelSettings, sibling: Model | None) -> Model:
    """Reads a bundle, and compiles the program of its check; `Model.warm_up` compiles the others."""
    bundle = load_bundle(path)
    model = Model(name, bundle)
    alike = sibling if sibling is not None and _shapes(sibling.bundle) == _shapes(bundle) else None
    for text in settings.focuses:
        focus = Focus.parse(text, bundle.encoder.num_layers)
        if not focus.full and not bundle.encoder.gated and "1" in settings.focuses:
            continue  # a model without gates serves the full focus only
        before = alike.engines.get(text) if alike is not None else None
        plan = before.plan if before is not None and before.ready else {}
        model.engines[text] = make_engine(bundle, focus, settings, model.executables, plan)
    if sibling is not None:
        model.executables += sibling.executables  # including those of precisions that were not chosen
    return model


def make_engine(
    bundle: Bundle,
    focus: Focus,
    settings: ModelSettings,
    executables: list[Executables],
    plan: Mapping[int, str] | None = None,
) -> Engine:
    """The engine of a bundle at one focus, with the bundle's own precision as its reference. Compiles the reference.

    Args:
      bundle: with its weights.
      focus: what each layer keeps.
      settings: precision, compiler and check; its focuses are not read.
      executables: compiled programs are added to it.
      plan: see `Engine`.

    Raises:
      InputError: the bundle was not trained for the focus.
    """
    kept = None if focus.full else focus
    variants: list[Precision] = [one for one in VARIANTS if settings.precision in (AUTO, one)]
    variants.sort(key=lambda one: one != bundle.precision)  # among equals the bundle's own is preferred
    predictors: dict[str, _OnDemand] = {one: _OnDemand(bundle, one, kept, settings, executables) for one in variants}
    own = predictors.get(bundle.precision) or _OnDemand(bundle, bundle.precision, kept, settings, executables)
    return Engine(
        predictors,
        max_length=bundle.max_length,
        pad_id=bundle.tokenizer.pad_id,
        golden=_golden(bundle, own.predictor) if settings.golden else None,
        plan=plan,
    )


def _shapes(bundle: Bundle) -> tuple[EncoderConfig, int, int]:
    """Bundles of equal shapes can share measurements and compiled programs."""
    return bundle.encoder, bundle.taxonomy.num_labels, bundle.max_length


def _golden(bundle: Bundle, predictor: PredictorProtocol) -> GoldenCheck:
    """The outputs of the bundle's own precision; at full focus `load_bundle` has checked them."""
    ids = golden_ids(bundle)
    length = min(GOLDEN_LENGTH, bundle.max_length)
    reference_NL = predictor.logits(ids, batch_size=max(1, len(ids)), buckets=(length,))

    def max_error(texts: Sequence[int], logits_NL: np.ndarray) -> float:
        return disagreement(bundle, logits_NL, reference_NL[list(texts)])

    return GoldenCheck(ids, max_error, AGREEMENT)


def _settle() -> None:
    """Exempts all loaded objects from further garbage collections.

    Under load full collections run every few seconds. With a model they take 0.4 s each, which stops the process.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _trim() -> None:
    """Returns freed memory to the system: glibc keeps it, and the next model may not fit into the rest."""
    _settle()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            _libc().malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")
