"""The pace of work that must not hold up streams."""

from __future__ import annotations

import time

import gevent

SLICE = 0.001  # seconds of work at most before other greenlets run
# Seconds until it continues. With gevent.sleep(0) the loop would not poll its sockets each time.
PAUSE = 0.001


class Pace:
    """To be called between steps of work, each shorter than SLICE."""

    def __init__(self) -> None:
        self._began_at = time.perf_counter()

    def __call__(self) -> None:
        if time.perf_counter() - self._began_at >= SLICE:
            gevent.sleep(PAUSE)
            self._began_at = time.perf_counter()
