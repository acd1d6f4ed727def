"""The output of xai-login: messages on stderr and results on stdout, or JSON lines on stdout."""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from xaiproxy.style import WHITE_ON_BLACK, Style, style_of

QUIET_ZONE = 2  # modules around the QR code; the standard is four, but two suffice on a screen
REMINDER = 60  # seconds between two lines of the countdown, if a line cannot be updated in place


class Output:
    """`as_json`: JSON for programs instead of sentences for people."""

    def __init__(self, as_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None):
        self.as_json = as_json
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._line_open = False
        if isinstance(self._stdout, io.TextIOWrapper):
            # A path may contain characters that this terminal cannot show.
            self._stdout.reconfigure(errors="backslashreplace")

    def message(self, text: str) -> None:
        """Print a sentence for a person."""
        if not self.as_json:
            self.clear_line()
            _write(self._stderr, text + "\n")

    def progress(self, text: str) -> None:
        """Show on a terminal what is going on, in a line that the next output replaces."""
        if columns := self._stderr_style().columns:
            # Only one row is cleared, so the line must not wrap.
            _write(self._stderr, f"\r\x1b[K{text[: columns - 1]}")
            self._line_open = True

    def event(self, name: str, text: str = "", **fields: Any) -> None:
        """Print a result: `text` for a person, {"event": name, **fields} for a program."""
        self.clear_line()
        if self.as_json:
            text = json.dumps({"event": name, **fields})
        if text:
            _write(self._stdout, text + "\n")

    def style(self) -> Style:
        """The present style of stdout, which a resize changes."""
        return Style() if self.as_json else style_of(self._stdout, os.environ)

    def rows(self) -> int:
        """The height of stdout, which is a terminal."""
        return os.get_terminal_size(self._stdout.fileno()).lines or 24

    def draw(self, text: str) -> None:
        """Write text with escape sequences to stdout, which is a terminal."""
        _write(self._stdout, text)

    def show_qr_code(self, url: str) -> bool:
        """Show the QR code if the terminal can; return whether it did."""
        style = self._stderr_style()
        if not style.columns or not style.blocks:
            return False
        # Importing it takes 20 ms.
        import segno

        text = io.StringIO()
        try:
            code = segno.make(url, micro=False, error="l", boost_error=False)
        # The URL is longer than 2,953 bytes.
        except segno.DataOverflowError:
            return False
        code.terminal(text, compact=True, border=QUIET_ZONE)
        lines = text.getvalue().splitlines()
        if len(lines[0]) > style.columns:
            return False
        # Without colours, phones can read it on a dark background only.
        self.message("\n".join(style.paint(WHITE_ON_BLACK, line) for line in lines))
        return True

    def countdown(
        self, what: str, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> Callable[[float], None]:
        """Return a sleep function that shows how much of `seconds` is left, and for `what`."""
        end = clock() + seconds
        reminded_at = clock()

        def sleep(pause: float) -> None:
            nonlocal reminded_at
            until = clock() + pause
            while (rest := until - clock()) > 0:
                left = max(0, round(end - clock()))
                self.progress(f"{left // 60}:{left % 60:02} left {what}")
                if not self._stderr_style().columns and clock() - reminded_at >= REMINDER:
                    reminded_at = clock()
                    self.message(f"{left // 60} min left {what}")
                time.sleep(min(rest, 1))

        return sleep

    def clear_line(self) -> None:
        if self._line_open:
            _write(self._stderr, "\r\x1b[K")
            self._line_open = False

    def _stderr_style(self) -> Style:
        return Style() if self.as_json else style_of(self._stderr, os.environ)


def _write(stream: TextIO, text: str) -> None:
    # An approved login must not be lost because the reader is gone or the disk is full. A result
    # that could not be written stays in the stream's buffer, so that the command fails at its end.
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()
