"""The list of deliberately broken properties matches the code. Running the breaks takes minutes and is not done here.

docs/internals/properties.md lists the properties.
"""

from __future__ import annotations

import pytest

from classer.tools.dev.break_properties import BREAKS, ROOT, Break


@pytest.mark.parametrize("one", BREAKS, ids=[one.name for one in BREAKS])
def test_the_line_to_break_stands_once(one: Break) -> None:
    assert (ROOT / one.file).read_text(encoding="utf-8").count(one.line) == 1
    assert (ROOT / one.tests.split("::")[0]).is_file()
