"""One function decides how text is shown, above all whether it has colours."""

import io
import os
import pty
import re
from collections.abc import Iterator
from typing import TextIO

import pytest
from checkout import ROOT

from xaiproxy.style import GREEN, Style, style_of


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as stream:
        yield stream
    os.close(master)


@pytest.mark.parametrize(
    "environ, columns, painted",
    [
        ({}, 80, "\x1b[32mfine\x1b[0m"),
        # https://no-color.org: when it is present and not an empty string.
        ({"NO_COLOR": ""}, 80, "\x1b[32mfine\x1b[0m"),
        ({"NO_COLOR": "1"}, 80, "fine"),
        ({"TERM": "dumb"}, None, "fine"),
    ],
)
def test_a_terminal_has_colours_unless_they_are_unwanted(
    terminal: TextIO, environ: dict[str, str], columns: int | None, painted: str
) -> None:
    style = style_of(terminal, environ)
    assert (style.columns, style.paint(GREEN, "fine")) == (columns, painted)


def test_anything_else_gets_plain_text() -> None:
    assert style_of(io.StringIO(), {}) == Style()


def test_no_other_module_writes_a_colour() -> None:
    for path in (ROOT / "xaiproxy").rglob("*.py"):
        found = re.search(r"\\(x1b|033)\[[^\"']*m\b", path.read_text())
        assert not found or path.name == "style.py", path
