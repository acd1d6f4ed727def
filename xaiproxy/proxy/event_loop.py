"""The log of a process that gevent's event loop runs.

Lines are written when the loop is idle, and no write waits. The log also has gevent's own messages.
"""

import logging
from collections.abc import Callable
from typing import Any

import gevent
import gevent.monkey

from xaiproxy import config, log

logger = logging.getLogger(__name__)

LOG_DELAY = 0.005  # seconds that a log line waits at most for the loop to be idle
POLL_INTERVAL = 1.0  # seconds between two polls of a log that is full


def set_up_log(settings: config.Config, slot: int | None = None) -> None:
    """`slot`: number of this worker, which becomes a field of every line."""
    log.setup(
        "proxy",
        settings.log_level,
        settings.log_format,
        # The patched poll would switch greenlets in the middle of a line.
        poll=gevent.monkey.get_original("select", "poll"),
        defer=WhenIdle(LOG_DELAY),
        when_writable=WhenWritable(),
        fields={} if slot is None else {"slot": slot},
    )
    gevent.get_hub().exception_stream = _HubMessages()


class WhenIdle:
    """Calls a function once the event loop is idle, and after `limit` seconds at the latest."""

    def __init__(self, limit: float):
        loop = gevent.get_hub().loop
        self._idle, self._timer = loop.idle(), loop.timer(limit, limit)

    def __call__(self, callback: Callable[[], None]) -> None:
        self._idle.start(self._call, callback)
        # The timer goes on for a while: to start it for each line would cost more than the line.
        if not self._timer.active:
            self._timer.again(self._tick, callback)

    def _call(self, callback: Callable[[], None]) -> None:
        self._idle.stop()
        callback()

    def _tick(self, callback: Callable[[], None]) -> None:
        if self._idle.active:
            self._call(callback)
        else:
            self._timer.stop()


class WhenWritable:
    """Calls a function once a descriptor, which is the same in every call, is writable.

    It is called after POLL_INTERVAL at the latest: on a busy machine epoll has been seen not to
    report that a pipe was emptied.
    """

    def __init__(self) -> None:
        self._watcher: Any = None
        self._timer = gevent.get_hub().loop.timer(POLL_INTERVAL)

    def __call__(self, fd: int, callback: Callable[[], None]) -> None:
        if self._watcher is None:
            self._watcher = gevent.get_hub().loop.io(fd, 2)
        self._watcher.start(self._call, callback)
        self._timer.stop()
        self._timer.start(self._call, callback, update=True)

    def _call(self, callback: Callable[[], None]) -> None:
        self._watcher.stop()
        self._timer.stop()
        callback()


class _HubMessages:
    """The stream for gevent's tracebacks of greenlets, instead of a stderr that may block."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.error("%s", text.rstrip())

    def flush(self) -> None:
        pass
