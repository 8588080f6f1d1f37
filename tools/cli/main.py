"""The command `classer`: its table of commands, and what turns their errors into exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from classer import __version__
from classer.data.errors import ClasserError, InputError
from classer.data.extras import missing_packages
from classer.data.fetch import cache_folder
from classer.data.files import disk_error
from classer.serve.ops.cache import check_private


@dataclasses.dataclass(frozen=True)
class Command:
    """An entry of the table of commands.

    Attributes:
      summary: one line for `classer --help`, the first line of the function's docstring.
      extra: the extra of the distribution that brings what the command imports; "" for the base.
      module: the module that defines the command's function; by default the command's name in this folder.
    """

    summary: str
    extra: str
    module: str = ""

    def load(self, name: str) -> Callable[[Sequence[str]], None]:
        """Imports the module of the command called `name`, and returns its function."""
        function = name.replace("-", "_")
        return getattr(importlib.import_module(self.module or f"{__package__}.{function}"), function)


# In the order of `classer --help`. Modules are imported when their command runs.
COMMANDS: dict[str, Command] = {
    "train": Command("Train a classifier on labelled texts; leaves a bundle to serve in OUT/bundle.", "train"),
    "serve": Command("Serve bundles over gRPC.", "serve"),
    "classify": Command("Show the labels of a text, by a running server or a bundle.", ""),
    "predict": Command("Classify a file of texts: every column is kept, predictions are appended.", "local"),
    "evaluate": Command("Measure a bundle on labelled texts.", "train"),
    "info": Command("Check a bundle and describe what it holds.", "local"),
    "export": Command("Write a bundle for another runtime, checked in that runtime.", "export"),
    "verify-export": Command(
        "Check an export: checksums, and the golden texts in its runtime.", "export", "classer.tools.cli.export"
    ),
    "gateway": Command("Offer a running server over HTTP and JSON, with an OpenAPI page.", "http"),
    "keys": Command("Make, list and revoke the API keys of a server.", ""),
    "load-test": Command("Load a running server with real texts and report its latency and throughput.", "train"),
    "frontend": Command("Run a front end for an engine that `classer serve` runs, here or elsewhere.", "serve"),
    "quantize": Command("Turn a float32 bundle into an INT8 one.", "train"),
    "teach": Command("Ask teachers for soft labels, which `classer train --soft-labels` learns from.", "teachers"),
    "focus-report": Command("Measure a bundle at several focus budgets: accuracy, speed, latency.", "train"),
    "focus-plan": Command("Find the share that each layer keeps, for --max-loss or --speedup.", "train"),
    "prepare": Command("Turn labelled texts into cleaned, deduplicated, tokenised training shards.", "prepare"),
    "convert": Command("Turn a pretrained encoder of the BERT family into the native architecture.", "train"),
    "aot": Command(
        "Compile for GPUs and TPUs that are not attached: memory, FLOPs, traffic.",
        "train",
        "classer.tools.aot.aot",
    ),
}
# The first command of each group → the group's heading in `classer --help`.
HEADINGS = {
    "train": "First steps",
    "export": "Other runtimes",
    "gateway": "Operating a server",
    "quantize": "More of training",
}
# A command's former name → its name. Works for one more version.
RENAMED = {"upcycle": "convert"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. User errors print one sentence on stderr; the exit code is then 2."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] in (["train"], ["convert"], ["upcycle"]):
            tune_allocator()
    return run(dispatch, argv)


def dispatch(argv: Sequence[str]) -> None:
    """Hands the arguments over to the command that the first of them names.

    Raises:
      InputError: there is no such command, or its packages are not installed.
    """
    if argv and argv[0] in RENAMED:
        new = RENAMED[argv[0]]
        print(f"classer: `classer {argv[0]}` is deprecated and will be removed; use `classer {new}`.", file=sys.stderr)
        argv = [new, *argv[1:]]
    if argv[:1] == ["--version"]:
        print(f"classer {__version__}")
    elif not argv or argv[0] in ("-h", "--help"):
        print(_usage())
    elif argv[0] in COMMANDS:
        _run_command(argv[0], argv[1:])
    else:
        raise InputError(f"There is no command '{argv[0]}'. There are: {', '.join(COMMANDS)}.")


def _run_command(name: str, argv: Sequence[str]) -> None:
    command = COMMANDS[name]
    try:
        command.load(name)(argv)
    except ModuleNotFoundError as e:
        if not command.extra or e.name is None or e.name.split(".")[0] == "classer":
            raise
        raise missing_packages(f"classer {name}", e.name.split(".")[0], command.extra) from None


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Calls a command and turns its errors into an exit code."""
    # Otherwise gRPC's core prints its own message about a port in use before ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    keep_compiled_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line buffering keeps the lines of stdout and stderr in order where both go to one file. A character that the
        # terminal lacks is printed as its code instead of raising.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        try:
            command(list(argv))
        finally:
            sys.stdout.flush()  # here, where a reader that left can be caught
    except ClasserError as e:
        return _fail(str(e))
    except BrokenPipeError:
        # The reader of the output has stopped (`| head`). The rest of the buffer is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is not None:
            return _fail(f"{e.filename}: {e.strerror}.")
        if (reason := disk_error(e)) is None:
            raise
        return _fail(f"Something could not be written: {reason[0].lower()}{reason[1:]}.")
    except KeyboardInterrupt:
        print("classer: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _fail(sentence: str) -> int:
    print(f"classer: error: {sentence}", file=sys.stderr)
    return 2


def keep_compiled_programs() -> None:
    """Sets JAX's cache of compiled programs to the cache folder, unless $JAX_COMPILATION_CACHE_DIR is set.

    The cache holds code, so a folder that others may write to is not used. Call it before JAX is imported.
    """
    folder = cache_folder() / "programs"
    with contextlib.suppress(InputError):  # without a private folder nothing is cached
        check_private(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def tune_allocator() -> None:
    """Restarts this process with glibc's allocator tuned for training, unless its tunables are set already.

    A training step on a CPU allocates and frees some hundred megabytes. By default glibc returns them to the system
    each time, and page faults take a third of a step. Tuned, it keeps them in one arena of huge pages. glibc reads its
    tunables only when a process starts.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    settings = {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 1 << 40}
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _usage() -> str:
    lines = ["usage: classer COMMAND [OPTIONS]", "", "Train, serve and query text classifiers on your own machines."]
    for name, command in COMMANDS.items():
        if name in HEADINGS:
            lines += ["", f"{HEADINGS[name]}:"]
        lines.append(f"  {name:13} {command.summary}")
    lines += [
        "",
        "A first classifier, from a CSV file with the columns text and label:",
        "  classer train --data tickets.csv --out runs/tickets",
        '  classer classify "my card has not arrived" --bundle runs/tickets/bundle',
        "",
        "`classer COMMAND --help` lists a command's options.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
