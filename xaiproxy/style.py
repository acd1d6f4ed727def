"""How text is shown on a stream: its width, its colours, and bars."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from typing import NamedTuple, TextIO

GREEN, YELLOW, RED, DIM, BOLD = "32", "33", "31", "2", "1"
# Whatever the colours of the terminal are.
WHITE_ON_BLACK = "38;5;231;48;5;16"
BAR = 40  # cells, at most


class Style(NamedTuple):
    """`columns`: width of the terminal, or None for plain text. `blocks`: whether it shows █."""

    columns: int | None = None
    colours: bool = False
    blocks: bool = False

    def paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colours and text else text

    def wrap(self, text: str, indent: int, unbroken: bool) -> list[str]:
        """Return the lines of a text to the right of its label. `unbroken`: whether it is one."""
        if self.columns is None or unbroken:
            return [text]
        # The last column stays free: some terminals erase a character in it.
        width = max(10, self.columns - 1 - indent)
        return textwrap.wrap(text, width, break_on_hyphens=False) or [""]

    def bar(self, share: float, colour: str, indent: int, mark: float | None = None) -> str:
        """Return a bar filled up to `share`, with a mark at another share; "" as plain text."""
        if self.columns is None:
            return ""
        cells = max(10, min(BAR, self.columns - 1 - indent))
        full, empty, sign = "█░┃" if self.blocks else "#-|"
        filled = round(cells * min(1.0, max(0.0, share)))
        # A pool that is used a little is not shown as unused.
        filled = max(filled, 1) if share > 0 else filled
        drawn = full * filled + empty * (cells - filled)
        if mark is not None and 0 <= mark <= 1:
            at = min(cells - 1, int(cells * mark))
            drawn = drawn[:at] + sign + drawn[at + 1 :]
        return self.paint(colour, drawn[:filled]) + self.paint(DIM, drawn[filled:])


def style_of(stream: TextIO, environ: Mapping[str, str]) -> Style:
    """Return the style of a terminal, or of plain text.

    It alone decides whether a program colours its output. NO_COLOR: https://no-color.org
    """
    # A dumb terminal (Emacs' shell) shows escape sequences as they are.
    if not stream.isatty() or environ.get("TERM") == "dumb":
        return Style()
    # 0: the size of the terminal was never set.
    columns = os.get_terminal_size(stream.fileno()).columns or 80
    return Style(columns, not environ.get("NO_COLOR"), "utf" in (stream.encoding or "").lower())
