"""The command `classer`: train, serve, classify, evaluate, quantize, info."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from classer import __version__
from classer.data.errors import InputError
from classer.serve.errors import ClasserError
from classer.tools import commands

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": commands.train,
    "serve": commands.serve,
    "classify": commands.classify,
    "evaluate": commands.evaluate,
    "quantize": commands.quantize,
    "info": commands.info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What the user can mend is one sentence on stderr and exit code 2."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] == ["train"]:
            use_huge_pages()
    argv = list(argv)
    if argv[:1] == ["--version"]:
        print(f"classer {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        print(f"classer: error: there is no command '{argv[0]}'. There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return run(command, argv[1:])


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Calls a command and turns its errors into an exit code."""
    try:
        command(argv)
    except (InputError, ClasserError) as e:
        print(f"classer: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("classer: stopped.", file=sys.stderr)
        return 130
    return 0


def use_huge_pages() -> None:
    """Starts this process anew with glibc's allocator on huge pages, unless its tunables are set already.

    A training step on a CPU allocates and frees some hundred megabytes; with pages of 4 KB a quarter of its time goes
    into page faults. glibc reads the setting only when a process starts.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _usage() -> str:
    lines = ["usage: classer COMMAND [OPTIONS]", "", "Train, quantise, serve and query text classifiers.", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}")
    lines += ["", "`classer COMMAND --help` lists a command's options."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
