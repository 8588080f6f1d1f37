"""The commands behind `classer`. Each takes its arguments, prints for people, and raises what they can mend.

Heavy modules are imported inside the commands, so that `classer classify` starts without JAX and TensorFlow.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from classer.data.errors import InputError
from classer.model.config import ComputeDtype
from classer.tools.connection import ConnectionArguments

if TYPE_CHECKING:
    from classer.data.taxonomy import Task
    from classer.model.bundle import Bundle
    from classer.train.config import Recipe, TrainJob
    from classer.train.evaluation import TokenizedSplit
    from classer.train.metrics import Metrics
    from classer.train.run import TrainResult

BundleArgument = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]


def train(argv: Sequence[str]) -> None:
    """Train a classifier on labelled texts; leaves a bundle to serve in OUT/bundle."""
    job = parse_job(argv, prog="classer train")
    _check_can_make(job.out)
    from classer.train import processes
    from classer.train.run import run_job

    processes.join()
    processes.listen()
    first = processes.is_first()
    started = time.monotonic()
    try:
        result = run_job(job)
    except processes.Stopped as e:
        if first:
            print(f"{e} The same command goes on{'' if job.restartable else ', with --resume'}.", flush=True)
        processes.end(e)
        return
    if result is None:
        if first:
            print(f"The run in {job.out} is finished; its bundle is {job.out / 'bundle'}.")
        return
    print_result(result, time.monotonic() - started)
    print(f"\nServe it:  classer serve {shlex.quote(str(job.out / 'bundle'))}")
    print('Ask it:    classer classify "some text" --server localhost:50051')


def parse_job(argv: Sequence[str], *, prog: str) -> TrainJob:
    """A training job from command-line arguments; `--preset NAME` sets what the other options default to.

    Raises:
      InputError: no such preset, or a value out of range.
    """
    from classer.train.config import Recipe, TrainJob

    preset, rest = _take_preset(list(argv))
    recipe = _load_preset(preset) if preset else Recipe()
    default = TrainJob(data=tyro.MISSING, out=tyro.MISSING, recipe=recipe)
    description = (
        "Train, calibrate and quantise a classifier. Data: a CSV, TSV, JSONL or Parquet file with a text and a label "
        f"column, or a folder with task.json. --preset NAME starts from a preset: {', '.join(preset_names())}."
    )
    return tyro.cli(
        TrainJob, prog=prog, args=rest, default=default, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def preset_names() -> list[str]:
    from classer.train import presets

    return sorted(module.name for module in pkgutil.iter_modules(presets.__path__))


def print_result(result: TrainResult, seconds: float) -> None:
    """The scores of a run, side by side."""
    if len(result.tasks) == 1:
        _print_task(result)
    else:
        _print_tasks(result)
    print(f"{seconds / 60:.1f} minutes. Reports and pictures: {_path(result.bundle).parent / 'results'}")


def _print_task(result: TrainResult) -> None:
    (scores,) = result.tasks
    print(f"\nOn {scores.float_metrics.n:,} {scores.split} examples:")
    print(f"  {'':24}{'accuracy':>9} {'macro-F1':>9} {'ECE':>7} {'MB':>7}")
    for name, bundle, metrics in (
        ("Classer, float32", result.float_bundle, scores.float_metrics),
        ("Classer, INT8", result.bundle, scores.int8_metrics),
    ):
        size = _megabytes(bundle)
        print(f"  {name:24}{metrics.accuracy:>9.2%} {metrics.macro_f1:>9.3f} {metrics.ece:>7.3f} {size:>7.1f}")
    if scores.baseline is not None:
        print(f"  {'TF-IDF + linear SVM':24}{scores.baseline.accuracy:>9.2%} {scores.baseline.macro_f1:>9.3f}")


def _print_tasks(result: TrainResult) -> None:
    sizes = f"float32 {_megabytes(result.float_bundle):.1f} MB, INT8 {_megabytes(result.bundle):.1f} MB"
    print(f"\nAccuracy (of multilabel tasks micro-F1) and macro-F1; {sizes}:")
    width = max(len(scores.task) for scores in result.tasks)
    print(f"  {'':{width}} {'split':>5} {'texts':>7} {'float32':>15} {'INT8':>15} {'SVM':>15}")
    for scores in result.tasks:
        three = (scores.float_metrics, scores.int8_metrics, scores.baseline)
        # Where exactly one label holds, micro-F1 is the accuracy.
        cells = ["" if one is None else f"{one.micro_f1:.2%} {one.macro_f1:.3f}" for one in three]
        print(
            f"  {scores.task:{width}} {scores.split:>5} {scores.float_metrics.n:>7,} "
            + " ".join(f"{cell:>15}" for cell in cells)
        )


def _megabytes(bundle: Bundle) -> float:
    return sum(file.stat().st_size for file in _path(bundle).rglob("*") if file.is_file()) / 1e6


def serve(argv: Sequence[str]) -> None:
    """Serve bundles over gRPC."""
    from classer.serve.server import ServeConfig
    from classer.serve.server import serve as run_server
    from classer.tools.environment import from_environment

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
    from classer.serve.frontend import FrontEndConfig, run_front_end

    options = (tyro.conf.OmitArgPrefixes,)
    description = frontend.__doc__
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
      timeout: seconds to wait for each answer.
      evidence: also show what the model read to its last layer; the server must run with --focus below 1.
      json: print one JSON object a text.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT …]")] = ()
    server: str = "localhost:50051"
    task: str | None = None
    top_k: int = 3
    timeout: float = 10.0
    evidence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self) -> None:
        if ":" not in self.server:
            raise InputError(f"--server is '{self.server}'; an address is HOST:PORT, such as localhost:50051.")
        if self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}; at least 1 label is shown.")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InputError(f"--timeout is {self.timeout:g}; give seconds, above 0 and at most {MAX_TIMEOUT:,}.")


def classify(argv: Sequence[str]) -> None:
    """Ask a running server which labels a text has."""
    arguments: ClassifyArguments = _parse(ClassifyArguments, argv, "classer classify", classify.__doc__)
    from classer.serve.client import Client
    from classer.serve.errors import InvalidRequest

    texts: Iterable[str] = arguments.texts or _lines_of_stdin()
    tls, key = arguments.connect_with()
    with Client(arguments.server, tls=tls, key=key) as client:
        for number, text in enumerate(texts, start=1):
            started = time.perf_counter()
            try:
                answer = client.classify(
                    text,
                    arguments.task,
                    top_k=arguments.top_k,
                    evidence=arguments.evidence,
                    timeout=arguments.timeout,
                )
            except InvalidRequest as e:
                raise InvalidRequest(f"Text {number}: {e}") from None
            milliseconds = (time.perf_counter() - started) * 1e3
            if arguments.json:
                print(json.dumps({**dataclasses.asdict(answer), "milliseconds": round(milliseconds, 2)}))
                continue
            for label in answer.labels:
                print(f"{'→' if label.chosen else ' '} {label.score:7.2%}  {label.name}")
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


@dataclasses.dataclass(frozen=True)
class MeasureArguments:
    """
    Attributes:
      bundle: the bundle to measure.
      data: a file of labelled texts, or a folder with task.json.
      split: which split of the folder.
      task: name of the bundle's task; needed only if it has several.
      out: a new folder for the report and its pictures.
      text_column: the column of the texts.
      label_column: the column of the labels; by default `label` or `labels`.
      max_length: tokens that a text is cut to; by default what the bundle was trained with.
    """

    bundle: BundleArgument
    data: Path
    split: str = "test"
    task: str | None = None
    out: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    max_length: int | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all. The bundle must have been trained with --focus-epochs.
      threshold: hierarchical tasks: an answer that is less probable than this stops at a label above; 0 never does.
    """

    focus: str = "1"
    threshold: float = 0.0


def evaluate(argv: Sequence[str]) -> None:
    """Measure a bundle on labelled texts."""
    a = _parse(EvaluateArguments, argv, "classer evaluate", evaluate.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.model.focus import Focus
    from classer.train.evaluation import measure

    predictor = bundle.predictor(focus=Focus.parse(a.focus, bundle.encoder.num_layers))
    logits_NL = predictor.logits(split.ids, columns=bundle.taxonomy.slice_of(task.name))
    title = f"{task.name}, {a.data.name}, {bundle.precision}"
    calibration = bundle.calibration[task.name]
    metrics = measure(task, logits_NL, split.targets_NL, calibration, title=title, results=a.out, threshold=a.threshold)
    _print_metrics(metrics, split.truncated)
    if a.out is not None:
        print(f"Report and pictures: {a.out}")


@dataclasses.dataclass(frozen=True)
class FocusReportArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      focuses: the budgets to measure beside the dense classifier, each as `classer evaluate --focus` takes it.
      texts: at most so many texts of the split, drawn at random, are measured; 0 is all.
      timed_texts: how many of them the time is measured on.
      rounds: how often.
      compute_dtype: of activations, between the products.
    """

    focuses: tuple[str, ...] = ("0.75", "0.6", "0.5", "0.4", "0.33", "0.27", "0.22", "0.18")
    texts: int = 0
    timed_texts: int = 512
    rounds: int = 5
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, low in (("texts", 0), ("timed_texts", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")


def focus_report(argv: Sequence[str]) -> None:
    """Measure a bundle at several budgets: accuracy, speed and latency, as a table and a picture."""
    a = _parse(FocusReportArguments, argv, "classer focus-report", focus_report.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.model.focus import Focus
    from classer.train.focus_report import focus_report as measure_focuses
    from classer.train.focus_report import focus_table, write_focus_report

    split = split.sample(a.texts) if a.texts else split
    rows = measure_focuses(
        bundle,
        task,
        split,
        [Focus.parse(focus, bundle.encoder.num_layers) for focus in a.focuses],
        compute_dtype=a.compute_dtype,
        timed_texts=a.timed_texts,
        rounds=a.rounds,
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    title = f"{task.name}, {len(split.ids):,} texts, {bundle.precision} weights, {a.compute_dtype}"
    print(f"\n{title}\n\n{focus_table(rows)}")
    if a.out is not None:
        write_focus_report(a.out, title, rows)
        print(f"\nTable and picture: {a.out}")


@dataclasses.dataclass(frozen=True)
class FocusPlanArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      max_loss: points of accuracy that may be lost; the plan is the fastest within them.
      speedup: how many times as fast as the dense classifier the plan is to be, instead of `max_loss`.
      texts: at most so many texts of the split, drawn at random; 0 is all.
      compute_dtype: of activations, between the products.
    """

    split: str = "dev"
    max_loss: float | None = None
    speedup: float | None = None
    texts: int = 2000
    compute_dtype: ComputeDtype = "bfloat16"


def focus_plan(argv: Sequence[str]) -> None:
    """Find what each layer should keep, for a loss of accuracy or a speed; prints it as --focus takes it."""
    a = _parse(FocusPlanArguments, argv, "classer focus-plan", focus_plan.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.train.focus_plan import plan_focus

    plan = plan_focus(
        bundle,
        task,
        split.sample(a.texts) if a.texts else split,
        max_loss=a.max_loss,
        speedup=a.speedup,
        compute_dtype=a.compute_dtype,
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    print(f"--focus {plan.focus}")
    print(
        f"about {plan.speedup:.1f} times as fast as the dense classifier, accuracy {plan.accuracy:.2%} instead of "
        f"{plan.dense_accuracy:.2%}; `classer focus-report` measures both"
    )


def _load_measured(a: MeasureArguments) -> tuple[Bundle, Task, TokenizedSplit]:
    """The bundle, its task, and the texts that are to be measured."""
    from classer.data.readers import check_labels, read_examples, read_task_folder
    from classer.model.bundle import load_bundle
    from classer.train.evaluation import tokenize

    if a.out is not None:
        _check_can_make(a.out, new=True)
    bundle = load_bundle(a.bundle)
    names = [task.name for task in bundle.taxonomy.tasks]
    if a.task is None and len(names) > 1:
        raise InputError(f"The bundle has several tasks; name one with --task: {', '.join(names)}.")
    task = bundle.taxonomy.task(names[0] if a.task is None else a.task)
    max_length = bundle.max_length if a.max_length is None else a.max_length
    if not 2 <= max_length <= bundle.max_length:
        raise InputError(f"--max-length is {max_length}; this bundle reads 2 to {bundle.max_length} tokens.")
    if a.data.is_dir():
        folder = read_task_folder(a.data, (a.split,))
        if a.split not in folder.splits:
            raise InputError(f"{a.data} has no split '{a.split}'; it has {', '.join(sorted(folder.there))}.")
        examples = folder.splits[a.split]
    else:
        examples = read_examples(a.data, text_column=a.text_column, label_column=a.label_column, task=task.name)
    check_labels(task, examples)
    return bundle, task, tokenize(task, examples, bundle.tokenizer, max_length)


def teach(argv: Sequence[str]) -> None:
    """Ask teachers for soft labels, which `classer train --soft-labels` learns from."""
    from classer.train.teach import TeachJob
    from classer.train.teach import teach as ask

    job = _parse(TeachJob, argv, "classer teach", teach.__doc__)
    _check_can_make(job.out.parent)
    ask(job)
    print(f"Learn from it:  classer train --soft-labels {shlex.quote(str(job.out))} --data FOLDER --out FOLDER")


def gateway(argv: Sequence[str]) -> None:
    """Offer a running server over HTTP and JSON, with an OpenAPI page."""
    from classer.serve.gateway import GatewayConfig, run_gateway
    from classer.tools.environment import from_environment

    more, argv = from_environment(GatewayConfig, argv, os.environ)
    description = f"{gateway.__doc__} Every option is also an environment variable, --port for one CLASSER_PORT."
    run_gateway(
        tyro.cli(
            GatewayConfig, prog="classer gateway", args=argv, description=description, default=GatewayConfig(**more)
        )
    )


def keys(argv: Sequence[str]) -> None:
    """Make, list and revoke the API keys of a server."""
    from classer.tools.keys import KeysArguments
    from classer.tools.keys import keys as run_keys

    run_keys(tyro.cli(KeysArguments, prog="classer keys", args=list(argv), description=keys.__doc__))


def load_test(argv: Sequence[str]) -> None:
    """Load a running server with real texts and report its latency and throughput."""
    from classer.tools.load_test import LoadTestArguments
    from classer.tools.load_test import load_test as run_load_test

    run_load_test(_parse(LoadTestArguments, argv, "classer load-test", load_test.__doc__))


def upcycle(argv: Sequence[str]) -> None:
    """Turn a pretrained encoder of the BERT family into the native architecture."""
    from classer.train.upcycle import UpcycleJob, run_upcycle

    job = _parse(UpcycleJob, argv, "classer upcycle", upcycle.__doc__)
    _check_can_make(job.out)
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

    a = _parse(QuantizeArguments, argv, "classer quantize", quantize.__doc__)
    _check_can_make(a.out, new=True)
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

    bundle = load_bundle(_parse(InfoArguments, argv, "classer info", info.__doc__).bundle)
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


def _print_metrics(metrics: Metrics, truncated: int) -> None:
    print(f"{metrics.n:,} examples, {truncated:,} of them cut to the maximum length")
    print(
        f"accuracy {metrics.accuracy:.2%} · macro-F1 {metrics.macro_f1:.3f} · micro-F1 {metrics.micro_f1:.3f}", end=" "
    )
    print(f"· expected calibration error {metrics.ece:.3f}")
    worst = sorted((label for label in metrics.labels if label.support), key=lambda label: label.f1)[:5]
    for label in worst:
        print(f"  F1 {label.f1:.3f} (precision {label.precision:.3f}, recall {label.recall:.3f})  {label.name}")


def _parse(kind: type, argv: Sequence[str], prog: str, doc: str | None, fields: str | None = None) -> Any:
    if fields is not None:
        kind.__doc__ = fields
    return tyro.cli(kind, prog=prog, args=list(argv), description=doc)


def _check_can_make(folder: Path, *, new: bool = False) -> None:
    """Raises InputError where no folder of that name can be made, before the work that is to go into it is done."""
    if new and folder.exists():
        raise InputError(f"{folder} exists already and was not touched; name a new folder with --out.")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"--out is {folder}, but {nearest} is a file; name a folder that can be made.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise InputError(f"--out is {folder}, but nothing can be written in {nearest}: {reason}.") from None


def _take_preset(argv: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--preset NAME` or `--preset=NAME` off."""
    for i, argument in enumerate(argv):
        if argument == "--preset":
            if i + 1 == len(argv):
                raise InputError(f"--preset needs a name: {', '.join(preset_names())}.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset="), argv[:i] + argv[i + 1 :]
    return None, argv


def _load_preset(name: str) -> Recipe:
    if name not in preset_names():
        raise InputError(f"There is no preset '{name}'; there are: {', '.join(preset_names())}.")
    return importlib.import_module(f"classer.train.presets.{name}").RECIPE


def _path(bundle: Any) -> Path:
    return bundle.path
