"""One log format for all processes: a line an event on stderr, as text or JSON, that never blocks and never tells.

Never blocks: a stderr that nobody reads must stop no stream. Every line is shorter than PIPE_BUF and written as
line_writer.py says.

Never tells: whatever looks like a token or a client key is blotted out of message and fields before they are
formatted, as the last line of defence behind not logging it in the first place.
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

from xaiproxy.line_writer import LINE_LIMIT, LineWriter

BATCH = 64  # lines written together at most: while the event loop is held up they must not pile up
SECRETS = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+(\.[\w-]*)?"  # a JWT
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
    r"|xaip_[\w-]{8,}"  # a client key of ours
    r"|(?<![\w-])[\w-]{80,}(?![\w-])"  # a refresh token: 86 characters of base64url
)
SHORTEST_SECRET = 13  # characters, of those
MESSAGE_LIMIT = 1000  # characters
FIELD_LIMIT = 512
MEMO_LIMIT = 256  # characters of what is remembered: strangers choose paths
NUMBERS = frozenset((int, float))
PLAIN = frozenset((int, float, bool, type(None)))  # what cannot hold a secret
# Controls would let what others send (a path, an error_description) forge lines or drive a terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_handler: LineHandler | None = None


def blot(text: str, limit: int) -> str:
    """The first `limit` characters, without secrets, even one that the limit cuts."""
    if len(text) < SHORTEST_SECRET:
        return text[:limit]
    return SECRETS.sub("[secret]", text[: limit + 2048])[:limit]


def setup(
    process: str,
    level: str,
    format: str,
    fd: int = 2,
    poll: Callable[[], Any] = select.poll,
    defer: Callable[[Callable[[], None]], Any] | None = None,
    when_writable: Callable[[int, Callable[[], None]], Any] | None = None,
) -> None:
    """Send the package's log to `fd`.

    Under gevent, `poll` must be the original: the patched one switches greenlets. `defer`: runs what it is given a
    moment later, so that the lines of that moment are written together. `when_writable`: runs what it is given once
    the descriptor has room; without it, lines that wait are written with the next line or by `flush`.
    """
    as_json = format == "json" or (format == "auto" and not os.isatty(fd))
    global _handler
    _handler = handler = LineHandler(
        fd,
        JsonFormatter(process) if as_json else TextFormatter(process),
        poll,
        defer,
        when_writable,
    )
    set_level(level)
    logger = logging.getLogger("xaiproxy")
    logger.handlers[:] = [handler]
    logger.propagate = (
        False  # other libraries' logs hold URLs with queries: they stay where they are
    )


def set_level(level: str) -> None:
    logging.getLogger("xaiproxy").setLevel(level.upper())


def flush() -> None:
    """Write what waits for room, as far as it fits."""
    if _handler is not None:
        _handler.flush()


def event(logger: logging.Logger, level: int, message: str, fields: dict[str, Any]) -> None:
    """What logger.log(level, message, extra={"fields": fields}) does, without what that spends on making a record."""
    if _handler is not None and logger.isEnabledFor(level):
        _handler.put(time.time(), logging.getLevelName(level), message, fields)


class LineHandler(logging.Handler):
    def __init__(
        self,
        fd: int,
        style: _Formatter,
        poll: Callable[[], Any],
        defer: Callable[[Callable[[], None]], Any] | None = None,
        when_writable: Callable[[int, Callable[[], None]], Any] | None = None,
    ):
        super().__init__()
        self._style = style
        self._defer = defer
        self._when_writable = when_writable
        self._events: list[tuple[float, str, str, dict[str, Any]]] = []
        self.writer = LineWriter(fd, self._notice, poll)

    def emit(self, record: logging.LogRecord) -> None:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        self.put(record.created, record.levelname, record.getMessage(), fields)

    def put(self, created: float, level: str, message: str, fields: dict[str, Any]) -> None:
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
        """At the end of the process: what waits has a last chance."""
        self.writer.close()
        super().close()

    def _line(self, created: float, level: str, message: str, fields: dict[str, Any]) -> bytes:
        return self._style.line(created, level, message, fields).encode("utf-8", "replace") + b"\n"

    def _notice(self, dropped: int) -> bytes:
        return self._line(
            time.time(),
            "WARNING",
            f"{dropped} log lines were dropped: nobody read them in time",
            {},
        )


class _Formatter:
    def __init__(self, process: str):
        self.process = process

    def line(self, created: float, level: str, message: str, fields: dict[str, Any]) -> str:
        """`created`: unix seconds."""
        raise NotImplementedError


def _stamp(created: float) -> str:
    second = int(created)
    return f"{_second(second)}.{int((created - second) * 1000):03d}Z"


@functools.lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _escaped(line: str, escape: Callable[[str], str]) -> str:
    return line if line.isprintable() else CONTROLS.sub(lambda match: escape(match[0]), line)


def _without_secrets(fields: dict[str, Any]) -> dict[str, Any]:
    """All that is not a number as text."""
    blotted = {
        name: value if type(value) in PLAIN else blot(str(value), FIELD_LIMIT)
        for name, value in fields.items()
    }
    if "traceback" in fields:
        blotted["traceback"] = blot(fields["traceback"][-1500:], 1500)
    return blotted


class JsonFormatter(_Formatter):
    def line(self, created: float, level: str, message: str, fields: dict[str, Any]) -> str:
        start = f'{{"time": "{_stamp(created)}", "level": "{level.lower()}", "process": "{self.process}", "message": '
        if "traceback" not in fields:
            pairs = [
                f', "{name}": {value if type(value) in NUMBERS else _text(value)}'
                for name, value in fields.items()
            ]
            line = f"{start}{_quoted(message, MESSAGE_LIMIT)}{''.join(pairs)}}}"
            if len(line) < LINE_LIMIT // 4:  # of UTF-8 at most four bytes a character
                return line
        return self._shortened(start, blot(message, MESSAGE_LIMIT), _without_secrets(fields))

    def _shortened(self, start: str, message: str, fields: dict[str, Any]) -> str:
        for shorter in (
            {"message": message} | fields,
            {"message": message[:200]} | {name: str(value)[:50] for name, value in fields.items()},
            {"message": message[:200]},
        ):
            line = start + _json(shorter).removeprefix('{"message": ')
            if len(line.encode("utf-8", "replace")) < LINE_LIMIT:
                break
        return line


def _json(value: Any) -> str:
    return _escaped(
        json.dumps(value, ensure_ascii=False), lambda character: f"\\u{ord(character):04x}"
    )


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return _json(value) if type(value) in PLAIN else _quoted(str(value), FIELD_LIMIT)


def _quoted(text: str, limit: int) -> str:
    return (_remembered if len(text) < MEMO_LIMIT else _remembered.__wrapped__)(text, limit)


@functools.lru_cache(maxsize=512)  # methods, paths, names of keys: they come again
def _remembered(text: str, limit: int) -> str:
    return _json(blot(text, limit))


class TextFormatter(_Formatter):
    def line(self, created: float, level: str, message: str, fields: dict[str, Any]) -> str:
        words = [_stamp(created), level.upper(), f"{self.process}:", blot(message, MESSAGE_LIMIT)]
        words += [f"{name}={value}" for name, value in _without_secrets(fields).items()]
        line = _escaped(" ".join(words), lambda character: repr(character)[1:-1])
        return line.encode("utf-8", "replace")[: LINE_LIMIT - 200].decode("utf-8", "ignore")
