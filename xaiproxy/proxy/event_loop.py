"""The log and gevent's event loop: when lines are written, and where the hub's own complaints go."""

import logging
from collections.abc import Callable
from typing import Any

import gevent

logger = logging.getLogger(__name__)

RECHECK = 1.0  # seconds between two polls of a log that takes no line


class Leisure:
    """Calls back when the event loop has nothing else to do, and after `limit` seconds at the latest."""

    def __init__(self, limit: float):
        loop = gevent.get_hub().loop
        self._idle, self._timer = loop.idle(), loop.timer(limit, limit)

    def __call__(self, callback: Callable[[], None]) -> None:
        self._idle.start(self._call, callback)
        if not self._timer.active:  # to start it anew each time would cost more than what is called
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
    """Calls back once a descriptor is writable, or after RECHECK seconds; `fd` must be the same in every call.

    The recheck: epoll has been seen to miss that a pipe was emptied while the machine was busy.
    """

    def __init__(self) -> None:
        self._watcher: Any = None
        self._timer = gevent.get_hub().loop.timer(RECHECK)

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


class LogStream:
    """Where gevent prints what a greenlet died of: our log, since stderr may be read by nobody."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.error("%s", text.rstrip())

    def flush(self) -> None:
        pass
