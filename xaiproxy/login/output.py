"""What xai-login says: sentences on stderr and results on stdout, or for programs JSON lines on stdout."""

import contextlib
import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from xaiproxy import errors, log, tokens

QUIET_ZONE = 2  # modules around the QR code; four are the standard, two are enough on a screen
COLOURS = "\x1b[38;5;231;48;5;16m"  # white on black, whatever the terminal's own: phones read no other way
REMINDER = 60  # seconds between two lines about the time that is left, where no line can be updated in place


class Conversation:
    def __init__(self, as_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None):
        self.as_json = as_json
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        # A dumb terminal (Emacs' shell) shows escape sequences as they are.
        self.on_terminal = (
            not as_json and self._stderr.isatty() and os.environ.get("TERM") != "dumb"
        )
        self._line_open = False
        if isinstance(self._stdout, io.TextIOWrapper):
            self._stdout.reconfigure(
                errors="backslashreplace"
            )  # a path may hold what this terminal cannot show

    def say(self, text: str) -> None:
        """A sentence for a person."""
        if not self.as_json:
            self.clear_line()
            _write(self._stderr, text + "\n")

    def passing(self, text: str) -> None:
        """What is being done now: on a terminal, a line that the next one takes the place of."""
        if self.on_terminal:
            # A line that wraps would leave a row behind each time: only the last one is cleared.
            _write(self._stderr, f"\r\x1b[K{text[: self._columns() - 1]}")
            self._line_open = True

    def event(self, name: str, text: str = "", **fields: Any) -> None:
        """A result: `text` for a person, {"event": name, **fields} for a program."""
        self.clear_line()
        if self.as_json:
            text = json.dumps({"event": name, **fields})
        if text:
            _write(self._stdout, text + "\n")

    def show_qr_code(self, url: str) -> bool:
        """Show it on a terminal that can; return whether it was shown."""
        if not self.on_terminal or "utf" not in (self._stderr.encoding or "").lower():
            return False
        import segno  # 20 ms that nothing else needs

        text = io.StringIO()
        try:
            code = segno.make(url, micro=False, error="l", boost_error=False)
        except segno.DataOverflowError:  # more than 2,953 bytes
            return False
        code.terminal(text, compact=True, border=QUIET_ZONE)
        lines = text.getvalue().splitlines()
        if len(lines[0]) > self._columns():
            return False
        self.say("\n".join(f"{COLOURS}{line}\x1b[0m" for line in lines))
        return True

    def countdown(
        self, what: str, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> Callable[[float], None]:
        """A sleep that meanwhile shows how much is left of `seconds`, and `what` it is left for."""
        end = clock() + seconds
        said = clock()

        def sleep(pause: float) -> None:
            nonlocal said
            until = clock() + pause
            while (rest := until - clock()) > 0:
                left = max(0, round(end - clock()))
                self.passing(f"{left // 60}:{left % 60:02} left {what}")
                if not self.on_terminal and clock() - said >= REMINDER:
                    said = clock()
                    self.say(f"{left // 60} min left {what}")
                time.sleep(min(rest, 1))

        return sleep

    def clear_line(self) -> None:
        if self._line_open:
            _write(self._stderr, "\r\x1b[K")
            self._line_open = False

    def _columns(self) -> int:
        return (
            os.get_terminal_size(self._stderr.fileno()).columns or 80
        )  # 0: nobody told the terminal its size


def _write(stream: TextIO, text: str) -> None:
    # Whoever listens may go away, or the disk that takes the output be full: no reason to drop an approved
    # login. A result that could not be written stays in the stream's buffer, and in the end the command fails
    # over it.
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


def who(login: tokens.Tokens) -> str:
    return login.account or "an account without a name"


def validity(login: tokens.Tokens, now: float) -> str:
    """Until when the access token is good, in a sentence."""
    left, end = login.expires_at - now, local_time(login.expires_at)
    if left > 0:
        return f"The access token is valid until {end}, for another {duration(left)}."
    return f"The access token expired at {end}, {duration(-left)} ago."


def last_failure(login: tokens.Tokens) -> list[str]:
    """What became of the last refresh if it failed, in sentences."""
    failure = login.refresh_error
    if failure is None:
        return []
    why = printable(failure.description or failure.code)
    sentences = [f"The last refresh failed at {local_time(failure.at)}: {why}."]
    if failure.terminal:
        sentences.append(f"It will not be tried again; {errors.SIGN_IN}.")
    elif failure.retry_at:
        sentences.append(f"The next try is due at {local_time(failure.retry_at)}.")
    return sentences


def outlook(login: tokens.Tokens, refresher_alive: bool, now: float) -> str:
    """What becomes of the login, in a sentence."""
    if refresher_alive and login.refresh_token is not None:
        return "The refresher is running and renews it."
    end = f"the login {'lapses' if login.expires_at > now else 'lapsed'} at {local_time(login.expires_at)}"
    if login.refresh_token is None:
        return f"It has no refresh token and cannot be renewed: {end}."
    return f"No refresher is running: {end}, unless supervisord or {errors.typed('xai-refresher')} is started."


def local_time(unix_time: float) -> str:
    """Such as "2026-11-23 14:05 CET"."""
    return datetime.datetime.fromtimestamp(unix_time).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def duration(seconds: float) -> str:
    """Such as "5 h 59 min"."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days"


def printable(text: str) -> str:
    """Text from a file, without what would drive a terminal."""
    return log.CONTROLS.sub(" ", text)
