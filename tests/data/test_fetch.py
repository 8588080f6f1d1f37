"""Downloads with the real pip, from a folder instead of a registry."""

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from classer.data.errors import InputError
from classer.data.fetch import cache_folder, fetch_wheel_file, sha256_of


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny valid wheel in a folder that is pip's only source."""
    links = tmp_path / "links"
    links.mkdir()
    files = {
        "carrier/data.txt": b"payload",
        "carrier-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
        "carrier-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "carrier-1.0.dist-info/RECORD"
    hashes = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
    lines = [f"{name},sha256={hashes[name].rstrip('=')},{len(data)}" for name, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    path = links / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return path


def test_fetches_once_and_again_if_damaged(wheel: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    expected = sha256_of(wheel)
    fetched = fetch_wheel_file("carrier==1.0", expected, cache)
    assert fetched.read_bytes() == wheel.read_bytes()
    assert list(cache.iterdir()) == [fetched]

    fetched.write_bytes(b"damaged")
    assert fetch_wheel_file("carrier==1.0", expected, cache).read_bytes() == wheel.read_bytes()

    wheel.unlink()
    assert fetch_wheel_file("carrier==1.0", expected, cache) == fetched


def test_another_file_under_the_name_is_refused(wheel: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"carrier==1\.0 is not the expected file: its SHA-256 is .* instead of 00"):
        fetch_wheel_file("carrier==1.0", "00" * 32, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_no_such_package(wheel: Path, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"could not download carrier==2\.0 from the package registry: .*carrier==2\.0"
    ):
        fetch_wheel_file("carrier==2.0", "00" * 32, tmp_path / "cache")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLASSER_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("CLASSER_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "classer"
