"""One log format for all processes: a line an event on stderr, as text or JSON, that never blocks and never tells.

Never blocks: a stdout or stderr that nobody reads must stop no stream. Every line is shorter than PIPE_BUF, so
that a pipe takes it whole or not at all (pipe(7)), and is written only when a poll with time-out zero says that it
fits; others are dropped, counted, and the count is logged as soon as one fits again.

Never tells: whatever looks like a token or a client key is blotted out of message and fields before they are
formatted, as the last line of defence behind not logging it in the first place.
"""

import contextlib
import datetime
import json
import logging
import os
import re
import select
import traceback
from collections.abc import Callable
from typing import Any

LINE_LIMIT = select.PIPE_BUF - 1
SECRETS = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+(\.[\w-]*)?"      # a JWT
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
    r"|xaip_[\w-]{8,}"                      # a client key of ours
    r"|(?<![\w-])[\w-]{80,}(?![\w-])"       # a refresh token: 86 characters of base64url
)
# Controls would let what others send (a path, an error_description) forge lines or drive a terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def blot(text: str, limit: int) -> str:
    """The first `limit` characters, without secrets, even one that the limit cuts."""
    return SECRETS.sub("[secret]", text[:limit + 2048])[:limit]


def setup(process: str, level: str, format: str, fd: int = 2,
          poll: Callable[[], Any] = select.poll) -> None:
    """Send the package's log to `fd`. Under gevent, `poll` must be the original: the patched one switches greenlets."""
    as_json = format == "json" or (format == "auto" and not os.isatty(fd))
    handler = LineHandler(fd, poll)
    handler.setFormatter(JsonFormatter(process) if as_json else TextFormatter(process))
    logger = logging.getLogger("xaiproxy")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False  # other libraries' logs hold URLs with queries: they stay where they are


class LineHandler(logging.Handler):
    def __init__(self, fd: int, poll: Callable[[], Any]):
        super().__init__()
        if os.isatty(fd):
            # A terminal stopped with Ctrl-S may have room for half a line. That a write does not wait is a mode of
            # the open file, which the shell shares: hence one of our own.
            with contextlib.suppress(OSError):
                fd = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self.fd = fd
        self.dropped = 0
        self._poll = poll()
        self._poll.register(fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        if self.dropped:
            missing = logging.LogRecord(record.name, logging.WARNING, "", 0, "%d log lines were dropped: "
                                        "nobody read them in time", (self.dropped,), None)
            if not self._write(missing):
                self.dropped += 1
                return
            self.dropped = 0
        if not self._write(record):
            self.dropped += 1

    def _write(self, record: logging.LogRecord) -> bool:
        line = self.format(record).encode("utf-8", "replace") + b"\n"
        if not any(events & select.POLLOUT for _, events in self._poll.poll(0)):
            return False
        try:
            os.write(self.fd, line)
        except OSError:  # the reader is gone: there is nobody to tell
            return False
        return True


class _Formatter(logging.Formatter):
    def __init__(self, process: str):
        super().__init__()
        self.process = process

    def _parts(self, record: logging.LogRecord) -> "tuple[str, str, str, dict[str, Any]]":
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        fields = {name: value if isinstance(value, (int, float, type(None))) else blot(str(value), 512)
                  for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = blot("".join(traceback.format_exception(record.exc_info[1]))[-1500:], 1500)
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z"), record.levelname.lower(), \
            blot(record.getMessage(), 1000), fields


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time, level, message, fields = self._parts(record)
        entry = {"time": time, "level": level, "process": self.process, "message": message}
        for attempt in (entry | fields,
                        entry | {"message": message[:200]} | {name: str(value)[:50] for name, value in fields.items()},
                        entry | {"message": message[:200]}):
            line = CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(attempt, ensure_ascii=False))
            if len(line.encode("utf-8", "replace")) < LINE_LIMIT:
                break
        return line


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time, level, message, fields = self._parts(record)
        words = [time, level.upper(), f"{self.process}:", message]
        words += [f"{name}={value}" for name, value in fields.items()]
        line = CONTROLS.sub(lambda match: repr(match[0])[1:-1], " ".join(words))
        return line.encode("utf-8", "replace")[:LINE_LIMIT - 200].decode("utf-8", "ignore")
