"""An outage of the login in the log: an error at first and each minute, and a line at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import gevent

logger = logging.getLogger(__name__)

REPEAT = 60.0  # seconds between two error lines
POLL_INTERVAL = 1.0  # seconds between two checks whether it is over


class Outage:
    """`lasts`: whether an outage was logged and its end was not."""

    def __init__(
        self,
        is_over: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = gevent.sleep,
    ):
        self.lasts = False
        self._is_over = is_over
        self._clock = clock
        self._sleep = sleep
        self._reason = ""
        self._began = 0.0

    def hit(self, reason: str) -> None:
        """A request could not be served.

        `reason`: a sentence, logged unless a line about this outage is recent.
        """
        self._reason = reason
        if not self.lasts and not self._is_over():
            self.lasts, self._began = True, self._clock()
            logger.error("requests cannot be served: %s", reason)
            gevent.spawn(self._watch, self._began)

    def end(self) -> None:
        if self.lasts:
            self.lasts = False
            logger.info("requests can be served again, after %.0f s", self._clock() - self._began)

    def _watch(self, began: float) -> None:
        logged_at = began
        while True:
            self._sleep(POLL_INTERVAL)
            if not self.lasts or self._began != began:
                return None
            if self._is_over():
                return self.end()
            if self._clock() - logged_at >= REPEAT:
                logged_at = self._clock()
                logger.error(
                    "requests cannot be served for %.0f s now: %s", logged_at - began, self._reason
                )
