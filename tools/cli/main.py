"""The command `classer`, and what all of its commands share."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from classer import __version__
from classer.data.errors import InputError
from classer.data.fetch import cache_folder
from classer.serve.ops.cache import check_private
from classer.serve.wire.errors import ClasserError
from classer.tools.aot.aot import aot

from .classify import classify
from .evaluate import evaluate
from .export import export, verify_export
from .focus_plan import focus_plan
from .focus_report import focus_report
from .frontend import frontend
from .gateway import gateway
from .info import info
from .keys import keys
from .load_test import load_test
from .prepare import prepare
from .quantize import quantize
from .serve import serve
from .teach import teach
from .train import train
from .upcycle import upcycle

# In the order in which a newcomer meets them.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "serve": serve,
    "classify": classify,
    "evaluate": evaluate,
    "info": info,
    "export": export,
    "verify-export": verify_export,
    "gateway": gateway,
    "keys": keys,
    "load-test": load_test,
    "frontend": frontend,
    "quantize": quantize,
    "teach": teach,
    "focus-report": focus_report,
    "focus-plan": focus_plan,
    "prepare": prepare,
    "upcycle": upcycle,
    "aot": aot,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What the user can mend is one sentence on stderr and exit code 2."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] in (["train"], ["upcycle"]):
            tune_allocator()
    return run(dispatch, argv)


def dispatch(argv: Sequence[str]) -> None:
    """Hands the arguments over to the command that the first of them names.

    Raises:
      InputError: there is no such command.
    """
    if argv[:1] == ["--version"]:
        print(f"classer {__version__}")
    elif not argv or argv[0] in ("-h", "--help"):
        print(_usage())
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        raise InputError(f"There is no command '{argv[0]}'. There are: {', '.join(COMMANDS)}.")


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Calls a command and turns its errors into an exit code."""
    # gRPC's core would print its own account of a port in use before our sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    keep_compiled_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line by line, so that in a file our lines and those on stderr stand in their order; and a terminal that lacks
        # a character gets its code instead of a traceback.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        try:
            command(list(argv))
        finally:
            sys.stdout.flush()  # here, where a reader that left can be caught
    except (InputError, ClasserError) as e:
        return _fail(str(e))
    except BrokenPipeError:
        # Who read the output wants no more of it (`| head`). What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is None:
            raise
        return _fail(f"{e.filename}: {e.strerror}.")
    except KeyboardInterrupt:
        print("classer: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _fail(sentence: str) -> int:
    print(f"classer: error: {sentence}", file=sys.stderr)
    return 2


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the cache folder, unless $JAX_COMPILATION_CACHE_DIR says otherwise.

    What is kept there is code: a folder that others may write to is left alone. Call it before JAX is imported.
    """
    folder = cache_folder() / "programs"
    with contextlib.suppress(InputError):  # with no private folder everything is compiled anew
        check_private(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def tune_allocator() -> None:
    """Starts this process anew with glibc's allocator set for training, unless its tunables are set already.

    A training step on a CPU allocates and frees some hundred megabytes. As glibc comes, it returns them to the system
    each time, and a third of a step goes into page faults. Here it keeps what it was given, in one arena of huge pages.
    glibc reads its tunables only when a process starts.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    settings = {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 1 << 40}
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _usage() -> str:
    lines = ["usage: classer COMMAND [OPTIONS]", "", "Train, quantise, serve and query text classifiers.", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:13} {(command.__doc__ or '').splitlines()[0]}")
    lines += ["", "`classer COMMAND --help` lists a command's options."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
