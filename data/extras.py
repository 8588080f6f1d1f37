"""Optional dependencies: the extras of the distribution, and the sentence that names the missing one."""

from __future__ import annotations

from .errors import InputError

# The name on the package index. `classer` there is another product's.
DISTRIBUTION = "classer-turbine"


def install_command(*extras: str) -> str:
    """The command that installs Classer with the extras, or without any."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'" if extras else f"pip install {DISTRIBUTION}"


def missing_packages(what: str, packages: str, *extras: str) -> InputError:
    """The error for optional dependencies that are not installed.

    Args:
      what: the feature that needs them, the start of the sentence: "The gateway".
      packages: their names, for reading: "FastAPI and uvicorn".
      extras: the extras that bring them.
    """
    return InputError(f"{what} needs {packages}, not installed here: {install_command(*extras)}")
