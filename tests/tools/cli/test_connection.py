"""Options of the commands that connect to a server."""

import pytest

from classer.data.errors import InputError
from classer.tools.cli.connection import ConnectionArguments


def test_the_key_is_read_from_our_own_variable_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLASSER_API_KEY belongs to another product: its value is never sent to a server."""
    monkeypatch.setenv("CLASSER_API_KEY", "of another product")
    monkeypatch.delenv("CLASSER_SERVER_KEY", raising=False)
    assert ConnectionArguments().connect_with() == (None, None)
    monkeypatch.setenv("CLASSER_SERVER_KEY", "ck_ours")
    assert ConnectionArguments().connect_with() == (None, "ck_ours")


def test_a_key_file_that_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.txt, which cannot be read"):
        ConnectionArguments(api_key_file=tmp_path / "none.txt").connect_with()
