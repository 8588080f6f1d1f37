"""Launches training jobs: `python tools/launch.py --preset banking77 --data FOLDER --out runs/banking77`.

Takes what `classer train` takes and runs the same job.
"""

from __future__ import annotations

import sys

from classer.tools.cli import main, tune_allocator

if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(["train", *sys.argv[1:]]))
