"""The list of properties that are broken on purpose fits the code; to break them takes minutes.

docs/internals/properties.md lists them.
"""

from __future__ import annotations

import pytest

from classer.tools.dev.break_properties import BREAKS, ROOT, Break


@pytest.mark.parametrize("one", BREAKS, ids=[one.name for one in BREAKS])
def test_the_line_to_break_stands_once(one: Break) -> None:
    assert (ROOT / one.file).read_text(encoding="utf-8").count(one.line) == 1
    assert (ROOT / one.tests.split("::")[0]).is_file()
