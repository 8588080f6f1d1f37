"""Export and verification. An export is loaded in its runtime and compared with Classer before it gets its name."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classer.data.errors import InputError
from classer.data.files import staged_folder
from classer.model.bundle import Bundle
from classer.model.focus import Focus, check_focus
from classer.model.precision import Precision
from classer.model.variants import variant_predictor

from .folder import Export, GoldenText, read_export, write_manifest, write_shared
from .formats import FORMATS, Format, Request, format_named

# Largest accepted difference of a probability from Classer's own float32 or INT8 programs. Half precisions round
# activations. INT8 rounds them to whole steps, so that a difference in the last bit may become a whole step.
TOLERANCE = {
    Precision.float32: 1e-4,
    Precision.float16: 1e-2,
    Precision.bfloat16: 5e-2,
    Precision.int8: 3e-2,
}

Say = Callable[[str], object]


class Checked(NamedTuple):
    """The result of a verification.

    Attributes:
      export: the verified export.
      difference: the largest absolute difference of a golden probability.
      load_seconds: seconds to load the model in its runtime.
    """

    export: Export
    difference: float
    load_seconds: float


def make_request(
    bundle: Bundle, target: str, *, precision: Precision | None, focus: str = "1", lengths: tuple[int, ...] = ()
) -> Request:
    """Builds a request from the user's options and checks that the format supports it.

    Args:
      bundle: the bundle to export.
      target: the name of the format.
      precision: by default int8 for an INT8 bundle, else the format's first precision.
      focus: the share of tokens that each layer keeps, in the syntax of `Focus.parse`.
      lengths: static sequence lengths in tokens; by default `default_lengths`.

    Raises:
      InputError: the format does not support the precision, focus or lengths; the message names what it supports.
    """
    kind = format_named(target)
    precision = precision or (Precision.int8 if bundle.precision == Precision.int8 else kind.precisions[0])
    _check_precision(bundle, target, kind, precision)
    parsed = Focus.parse(focus, bundle.encoder.num_layers)
    if not parsed.full and not kind.focused:
        raise InputError(f"{target} cannot express Focused Attention; export to onnx or stablehlo, or with --focus 1.")
    check_focus(parsed, bundle.encoder)
    static = kind.static is True or (kind.static == "focused" and not parsed.full)
    if lengths and not static:
        raise InputError(f"{target} takes any length here; leave --lengths out.")
    wrong = [length for length in lengths if not 2 <= length <= bundle.max_length]
    if wrong:
        raise InputError(f"--lengths has {wrong[0]}; this bundle reads 2 to {bundle.max_length} tokens.")
    chosen = tuple(sorted({*lengths})) if lengths else default_lengths(bundle.max_length)
    max_length = chosen[-1] if static else bundle.max_length
    return Request(bundle, precision, parsed, max_length, chosen if static else ())


def default_lengths(max_length: int) -> tuple[int, ...]:
    """Powers of two from 32 up, below `max_length`, and `max_length` itself; in tokens."""
    return (*(length for length in (32, 64, 128, 256, 512) if length < max_length), max_length)


def export_bundle(request: Request, target: str, out: Path, say: Say = lambda sentence: None) -> Checked:
    """Writes an export to a new folder. The folder appears only if the export is complete and verified.

    Raises:
      InputError: `out` exists, a package is missing, or the runtime's answers differ by more than the tolerance.
    """
    if out.exists():
        raise InputError(f"{out} exists already and was not touched; name a new folder with --out.")
    module = FORMATS[target].load_module()
    with staged_folder(out) as staging:
        say(f"Writing {target}, {request.precision} …")
        module.write(request, staging)
        write_shared(staging, request.bundle, golden(request, target), _readme(request, target, module.usage(request)))
        packages = ("jax", "numpy", *FORMATS[target].needs)
        write_manifest(
            staging,
            {
                "target": target,
                "precision": request.precision,
                "focus": str(request.focus),
                "max_length": request.max_length,
                "lengths": list(request.lengths),
                "bundle": request.bundle.version,
                "versions": {name: importlib.metadata.version(name.replace("_", "-")) for name in packages},
            },
        )
        say("Checking it in its runtime …")
        checked = verify(staging)
    return checked._replace(export=read_export(out))


def verify(path: Path) -> Checked:
    """Verifies an export: checksums, tokens and probabilities.

    Every golden text runs both alone and in a batch with the others, which tests dynamic sizes and padding.

    Raises:
      InputError: the export is damaged or too old, a package is missing, or tokens or probabilities differ.
    """
    export = read_export(path)
    if export.target not in FORMATS:
        raise InputError(f"{path} is of the format '{export.target}'; this Classer knows {', '.join(FORMATS)}.")
    module = FORMATS[export.target].load_module()
    _check_age(export)
    texts = [row.text for row in export.golden]
    for row, ids in zip(export.golden, export.tokenizer.encode(texts, export.max_length).ids, strict=True):
        if tuple(ids.tolist()) != row.ids:
            raise InputError(f"{path}: its tokenizer gives other tokens than it did for the text '{row.text[:60]}'.")
    started = time.perf_counter()
    runtime = module.load(export)
    load_seconds = time.perf_counter() - started
    expected_NL = np.array([row.probabilities for row in export.golden])
    worst = 0.0
    for batch_size in (len(texts), 1):
        got_NL = runtime(texts, batch_size)
        difference_N = np.abs(got_NL - expected_NL).max(axis=1)
        i = int(np.argmax(np.where(np.isnan(difference_N), np.inf, difference_N)))
        if not difference_N[i] <= TOLERANCE[export.precision]:  # also when NaN
            raise InputError(
                f"{export.target} computes something else than Classer: a probability of golden text {i + 1} differs "
                f"by {difference_N[i]:.2g}, more than {TOLERANCE[export.precision]:g}."
            )
        worst = max(worst, float(difference_N[i]))
    return Checked(export, worst, load_seconds)


def golden(request: Request, target: str) -> list[GoldenText]:
    """The texts of every verification, with the answers of Classer's own programs.

    If the format quantises weights only, the answers come from a program with INT8 weights and float activations.

    The texts are the bundle's golden texts. Float models add the empty text and a text that is truncated. INT8 models
    do not: on a text unlike the training texts, rounding differs too much to compare (see `bundle.quantize_bundle`).
    """
    bundle = request.bundle
    texts = [text for text in bundle.golden_texts if text]
    if request.precision != Precision.int8 or not texts:
        texts += ["", " ".join([*bundle.golden_texts, "a text"] * 100)[: 8 * bundle.max_length]]
    ids = bundle.tokenizer.encode(texts, request.max_length).ids
    if FORMATS[target].weights_only and request.precision == Precision.int8:
        predictor = variant_predictor(bundle, Precision.float32, request.focus)
    else:
        predictor = bundle.predictor(focus=request.focus)
    logits_NL = predictor.logits(ids, batch_size=len(ids))
    by_task = [bundle.probabilities(task.name, logits_NL) for task in bundle.taxonomy.tasks]
    rows = np.concatenate(by_task, axis=1)
    return [
        GoldenText(text, tuple(row_ids.tolist()), tuple(map(float, row)))
        for text, row_ids, row in zip(texts, ids, rows, strict=True)
    ]


def _check_precision(bundle: Bundle, target: str, kind: Format, precision: Precision) -> None:
    holders = [name for name, other in FORMATS.items() if precision in other.precisions]
    if precision == Precision.int8 and bundle.precision != Precision.int8:
        raise InputError(f"{bundle.path} is float32; make it INT8 first: classer quantize BUNDLE --out FOLDER.")
    if bundle.precision == Precision.int8 and precision != Precision.int8:
        raise InputError(f"{bundle.path} is INT8, and its floats are gone; export the float32 bundle of the run.")
    if precision not in kind.precisions:
        floats = (
            f", or export the float32 bundle (bundle-float32 beside it) to {target}"
            if precision == Precision.int8
            else ""
        )
        raise InputError(
            f"{target} holds {', '.join(kind.precisions)}, not {precision}. For {precision} take "
            f"{', '.join(holders)}{floats}."
        )


def expired(export: Export) -> bool:
    """Whether an export is older than the days for which its format is guaranteed to be readable."""
    days = FORMATS[export.target].guaranteed_days if export.target in FORMATS else None
    return days is not None and _age(export) > days


def renew(path: Path, bundle: Bundle) -> Checked:
    """Replaces an export by a new one from the same bundle, with the same options.

    Raises:
      InputError: `bundle` is not the bundle of the old export, or the new export cannot be written or verified.
    """
    old = read_export(path)
    if old.bundle != bundle.version:
        raise InputError(f"{path} was made from bundle {old.bundle}; {bundle.path} is {bundle.version}.")
    request = make_request(bundle, old.target, precision=old.precision, focus=old.focus, lengths=old.lengths)
    new, aside = (path.with_name(f"{path.name}.{name}") for name in ("new", "old"))
    for folder in (new, aside):
        shutil.rmtree(folder, ignore_errors=True)
    export_bundle(request, old.target, new)
    path.rename(aside)
    new.rename(path)
    shutil.rmtree(aside)
    return verify(path)


def _age(export: Export) -> int:
    return (datetime.datetime.now(datetime.UTC).date() - export.created).days


def _check_age(export: Export) -> None:
    if expired(export):
        raise InputError(
            f"{export.path} was made {_age(export)} days ago; {export.target} is guaranteed to be readable for "
            f"{FORMATS[export.target].guaranteed_days}. Make it anew from its bundle: classer verify-export FOLDER "
            "--bundle BUNDLE."
        )


def _readme(request: Request, target: str, usage: str) -> str:
    tasks = "; ".join(f"{task.name} ({task.kind}, {len(task.labels)} labels)" for task in request.bundle.taxonomy.tasks)
    return (
        f"# {tasks}\n\n{target}, {request.precision}, focus {request.focus}, texts up to {request.max_length} tokens, "
        f"from bundle {request.bundle.version}.\n\n```python\n{usage}\n```\n\n"
        "Columns are the labels of `taxonomy.json`, task after task. `probabilities` are calibrated: logits divided by "
        "the temperature in `calibration.json`, then a softmax, or for a multilabel task sigmoids, whose thresholds "
        "stand there too (0.5 where there are none). `classer verify-export .` checks this folder.\n"
    )
