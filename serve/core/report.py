"""The summary that `classer serve` prints of a model: its programs, and why each precision was chosen."""

from __future__ import annotations

from .engine import Engine
from .models import Model


def model_summary(model: Model) -> str:
    """A few lines of text: the model, then its measured speed, one line a length bucket."""
    engines = model.engines.items()
    programs = [warmed for _, engine in engines for warmed in (*engine.programs, *engine.measured)]
    compiled = {id(warmed.program): warmed.compile_seconds for warmed in programs}
    lines = [
        f"{model.name}: version {model.version}, {model.bundle.precision} weights; compiled {len(compiled)} programs "
        f"in {sum(compiled.values()):.0f} s. Expect, in full batches of one length:"
    ]
    for focus, engine in engines:
        if len(model.engines) > 1 or focus != "1":
            lines.append(f"  at focus {focus}")
        lines += _bucket_lines(engine)
    return "\n".join(lines)


def _bucket_lines(engine: Engine) -> list[str]:
    lines = []
    for bucket in engine.buckets:
        rate = max(one.batch_size / one.run_seconds for one in engine.programs if one.length == bucket)
        tried = [one for one in engine.measured if one.length == bucket]
        chosen = next(one for one in tried if one.chosen)
        others = [one for one in tried if one is not chosen]
        why = "the only one tried"
        if others:
            said = [
                f"{one.precision} takes {one.run_seconds / chosen.run_seconds:.2f}× as long"
                if one.run_seconds >= chosen.run_seconds
                else f"{one.precision} is faster, but {one.max_error:.3f} off the golden outputs"
                for one in others
            ]
            why = "; ".join(said)
        lines.append(f"  {bucket:5} tokens: {rate:8,.0f} texts/s in {chosen.precision} ({why})")
    return lines
