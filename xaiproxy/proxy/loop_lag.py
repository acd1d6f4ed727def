"""How late the event loop is, measured by a timer."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import gevent

INTERVAL = 0.1  # seconds from one measurement to the next
WINDOW = 15  # seconds of which the worst counts: no longer than the interval of most scrapes


class LoopLag:
    def __init__(self) -> None:
        self._timer: Any = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
        self._lags: deque[float] = deque([0.0], maxlen=round(WINDOW / INTERVAL))
        self._measured_at = time.perf_counter()
        self._timer.start(self._measure)

    def _measure(self) -> None:
        now = time.perf_counter()
        self._lags.append(now - self._measured_at - INTERVAL)
        self._measured_at = now

    def seconds(self) -> float:
        """The greatest delay of the timer within WINDOW."""
        return max(0.0, *self._lags)

    def close(self) -> None:
        self._timer.stop()
        self._timer.close()
