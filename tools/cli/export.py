"""The commands `classer export` and `classer verify-export`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from classer.data.errors import InputError
from classer.model.precision import Precision

if TYPE_CHECKING:
    from ..export.run import Checked

Target = Literal["safetensors", "stablehlo", "savedmodel", "onnx", "onnx-int8", "openvino", "litert"]


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """
    Attributes:
      bundle: the bundle to export: float32, or INT8 for an INT8 export.
      to: the format.
      out: a new folder for it.
      precision: of activations and weights; by default float32, or INT8 of an INT8 bundle.
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all.
      lengths: sequence lengths of formats that are bound to them; by default powers of two up to the bundle's own.
    """

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    to: Target
    out: Path
    precision: Precision | None = None
    focus: str = "1"
    lengths: tuple[int, ...] = ()


def export(argv: Sequence[str]) -> None:
    """Write a bundle for another runtime, checked in that runtime."""
    a = tyro.cli(ExportArguments, prog="classer export", args=list(argv), description=export.__doc__)
    from classer.model.bundle import load_bundle

    from ..export.formats import format_named
    from ..export.run import export_bundle, make_request

    if a.out.exists():
        raise InputError(f"{a.out} exists already and was not touched; name a new folder with --out.")
    format_named(a.to).load_module()
    request = make_request(load_bundle(a.bundle), a.to, precision=a.precision, focus=a.focus, lengths=a.lengths)
    checked = export_bundle(request, a.to, a.out, say=lambda sentence: print(sentence, file=sys.stderr, flush=True))
    print(_summary(checked))
    print(f"How to load it: {a.out / 'README.md'}. Check it anywhere: classer verify-export {shlex.quote(str(a.out))}")


@dataclasses.dataclass(frozen=True)
class VerifyArguments:
    """
    Attributes:
      folder: what `classer export` wrote.
      bundle: the bundle it was made from; StableHLO that is older than JAX guarantees to read is made anew from it.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    bundle: Path | None = None


def verify_export(argv: Sequence[str]) -> None:
    """Check an export: checksums, and the golden texts in its runtime."""
    a = tyro.cli(VerifyArguments, prog="classer verify-export", args=list(argv), description=verify_export.__doc__)
    from ..export.folder import read_export
    from ..export.run import expired, renew, verify

    if a.bundle is not None and expired(read_export(a.folder)):
        from classer.model.bundle import load_bundle

        renew(a.folder, load_bundle(a.bundle))
        print(f"{a.folder} was older than its guarantee, and was made anew.")
    print(_summary(verify(a.folder)))


def _summary(checked: Checked) -> str:
    e = checked.export
    size = sum(file.stat().st_size for file in e.path.rglob("*") if file.is_file()) / 1e6
    return (
        f"{e.path}: {e.target}, {e.precision}, {size:.1f} MB, loads in {checked.load_seconds:.1f} s; "
        f"{len(e.golden)} golden texts agree, the largest difference of a probability is {checked.difference:.1g}."
    )
