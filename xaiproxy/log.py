"""The log of all processes: one line per event on stderr, as text or JSON.

Two promises:

- A write never blocks, so that a stderr which is not read stops no stream: see line_writer.py.
- What looks like a token or a client key is redacted in message and fields. This is the last line
  of defence: secrets are not logged in the first place.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import select
import time
import traceback
from collections.abc import Callable
from typing import Any

from xaiproxy import dropped_lines
from xaiproxy.line_writer import DROPPED, LINE_LIMIT, LineWriter

BATCH = 64  # lines written together at most, so that a busy event loop does not pile them up
# A JWT, a bearer token, a client key, and a refresh token (86 characters of base64url).
SECRETS = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+(\.[\w-]*)?"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
    r"|xaip_[\w-]{8,}"
    r"|(?<![\w-])[\w-]{80,}(?![\w-])"
)
# A shorter text without one of these has no secret. To search for them takes a tenth of the time.
MARKERS = ("eyJ", "earer ", "xaip_")
SHORTEST_UNMARKED_SECRET = 80  # characters
LONGEST_SECRET = 2048
MESSAGE_LIMIT = 1000  # characters
FIELD_LIMIT = 512
LIMITS = {"traceback": 1500}
# Characters of the message and of each field in a JSON line that is too long; the first that fits
# counts. macOS's LINE_LIMIT is 511 bytes, so most lines of requests are shortened there.
SHORTER = (200, 100, 60, 40, 20)
# Types whose values cannot hold a secret.
PLAIN = frozenset((int, float, bool, type(None)))
# A path or an error_description could otherwise forge lines or control a terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
WORD = re.compile(r'[^ ="]+')  # a value that needs no quotes in a text line

Fields = dict[str, Any]
# From the unix time, the level, the message and the fields of an event.
Line = Callable[[float, str, str, Fields], bytes]

_encode = json.JSONEncoder(ensure_ascii=False).encode
_handler: LineHandler | None = None


def redact(text: str, limit: int) -> str:
    """The first `limit` characters, without secrets, also one that the limit would cut."""
    if len(text) < SHORTEST_UNMARKED_SECRET and not (
        MARKERS[0] in text or MARKERS[1] in text or MARKERS[2] in text
    ):
        return text[:limit]
    return SECRETS.sub("[secret]", text[: limit + LONGEST_SECRET])[:limit]


def end_of_traceback(text: str) -> str:
    """The last part of a traceback, without secrets, also one that the limit would cut."""
    return redact(text, len(text))[-LIMITS["traceback"] :]


def setup(
    process: str,
    level: str,
    format: str,
    fd: int = 2,
    poll: Callable[[], Any] = select.poll,
    defer: Callable[[Callable[[], None]], Any] | None = None,
    when_writable: Callable[[int, Callable[[], None]], Any] | None = None,
    fields: Fields | None = None,
) -> None:
    """Send the package's log to `fd`.

    `poll`: select.poll as the standard library has it, because gevent's switches greenlets.
    `defer`: calls a function a moment later, so that the lines of that moment are written together.
    `when_writable`: calls a function once the descriptor has room. Without it, waiting lines are
    written with the next line, or by `flush`.
    `fields`: the first fields of every line.
    """
    global _handler
    line = line_format(process, format, fd, fields)
    _handler = LineHandler(fd, line, poll, defer, when_writable)
    set_level(level)
    logger = logging.getLogger("xaiproxy")
    logger.handlers[:] = [_handler]
    # The logs of libraries hold URLs with queries: none reaches the root logger's handlers.
    logger.propagate = False


def line_format(process: str, format: str, fd: int, fields: Fields | None = None) -> Line:
    """The function that returns the line of an event, in `format`; "auto" is chosen by `fd`.

    `fields`: the first fields of every line.
    """
    as_json = format == "json" or (format == "auto" and not os.isatty(fd))
    line = functools.partial(_json_line if as_json else _text_line, process)
    if not fields:
        return line
    return lambda created, level, message, own: line(created, level, message, {**fields, **own})


def set_level(level: str) -> None:
    logging.getLogger("xaiproxy").setLevel(level.upper())


def flush() -> None:
    """Write the waiting lines, as far as they fit."""
    if _handler is not None:
        _handler.flush()


def lines_dropped() -> int:
    """How many lines were dropped because the log was not read in time.

    Those of this process since its start, and all that its supervisord has dropped.
    """
    return own_lines_dropped() + dropped_lines.published()


def own_lines_dropped() -> int:
    return 0 if _handler is None else _handler.writer.dropped_in_all


def event(logger: logging.Logger, level: int, message: str, fields: Fields) -> None:
    """Do what `logger.log(level, message, extra={"fields": fields})` does, in half the time."""
    if _handler is not None and logger.isEnabledFor(level):
        _handler.put(time.time(), logging.getLevelName(level), message, fields)


class LineHandler(logging.Handler):
    def __init__(
        self,
        fd: int,
        line: Line,
        poll: Callable[[], Any],
        defer: Callable[[Callable[[], None]], Any] | None,
        when_writable: Callable[[int, Callable[[], None]], Any] | None,
    ):
        super().__init__()
        self._line = line
        self._defer = defer
        self._when_writable = when_writable
        self._events: list[tuple[float, str, str, Fields]] = []
        self.writer = LineWriter(fd, self._notice, poll)

    def emit(self, record: logging.LogRecord) -> None:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(record.exc_info[1]))
            fields["traceback"] = end_of_traceback(text)
        self.put(record.created, record.levelname, record.getMessage(), fields)

    def put(self, created: float, level: str, message: str, fields: Fields) -> None:
        """`created`: unix seconds."""
        self._events.append((created, level, message, fields))
        if self._defer is None or len(self._events) >= BATCH:
            self.flush()
        elif len(self._events) == 1:
            self._defer(self.flush)

    def flush(self) -> None:
        events, self._events = self._events, []
        self.writer.write([self._line(*event) for event in events])
        if self.writer.waiting and self._when_writable is not None:
            self._when_writable(self.writer.fd, self.flush)

    def close(self) -> None:
        """Give the reader some time for the waiting lines, at the end of the process."""
        self.writer.close()
        super().close()

    def _notice(self, dropped: int) -> bytes:
        return self._line(time.time(), "WARNING", DROPPED % dropped, {})


def _json_line(process: str, created: float, level: str, message: str, fields: Fields) -> bytes:
    start = {"time": _time(created), "level": level.lower(), "process": process}
    message, fields = redact(message, MESSAGE_LIMIT), _redacted(fields)
    line = _json({**start, "message": message, **fields})
    for limit in SHORTER:
        if len(line) <= LINE_LIMIT:
            return line
        line = _json({**start, "message": message[:limit], **_shortened(fields, limit)})
    return line if len(line) <= LINE_LIMIT else _json({**start, "message": message[:limit]})


def _json(entry: Fields) -> bytes:
    return _bytes(_encode(entry), lambda control: f"\\u{ord(control):04x}") + b"\n"


def _text_line(process: str, created: float, level: str, message: str, fields: Fields) -> bytes:
    words = [_time(created), level, f"{process}:", redact(message, MESSAGE_LIMIT)]
    words += [f"{name}={_word(value)}" for name, value in _redacted(fields).items()]
    line = _bytes(" ".join(words), lambda control: repr(control)[1:-1])[: LINE_LIMIT - 1]
    # The cut may have left a part of a character.
    return line.decode("utf-8", "ignore").encode() + b"\n"


def _word(value: Any) -> Any:
    """A value of a text line, quoted if it could be taken for several fields."""
    return _encode(value) if isinstance(value, str) and not WORD.fullmatch(value) else value


def _time(created: float) -> str:
    return f"{_second(int(created))}.{int(created % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def _shortened(fields: Fields, limit: int) -> Fields:
    """Without the fields that are None, and with texts of at most `limit` characters."""
    shortened = {
        name: value if type(value) in PLAIN else value[:limit]
        for name, value in fields.items()
        if value is not None
    }
    if "traceback" in fields:
        # Its end names the error.
        shortened["traceback"] = str(fields["traceback"])[-limit:]
    return shortened


def _redacted(fields: Fields) -> Fields:
    """The fields, with all but numbers, None and bools as redacted text."""
    return {
        name: value if type(value) in PLAIN else redact(str(value), LIMITS.get(name, FIELD_LIMIT))
        for name, value in fields.items()
    }


def _bytes(line: str, escape: Callable[[str], str]) -> bytes:
    """UTF-8, with control characters replaced by what `escape` returns for each."""
    if not line.isprintable():
        line = CONTROLS.sub(lambda match: escape(match[0]), line)
    return line.encode("utf-8", "replace")
