"""The addresses of one name under gevent, in the order in which to try them.

One lookup serves all greenlets that wait. It runs in a native thread of its own, because
getaddrinfo cannot be interrupted: in gevent's pool ten that hang would block all others. While a
lookup hangs or fails, the addresses of the former one are used.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import gevent
import gevent.event
from gevent import monkey

from xaiproxy import addresses
from xaiproxy.addresses import Address

REMEMBERED = 60  # seconds that the result of a lookup is used without asking again
STALE_AFTER = 1.0  # seconds of a lookup until the former addresses are used; RFC 8767: 1.8
THREADS = 8  # lookups that hang at the same time, at most

_getaddrinfo = monkey.get_original("socket", "getaddrinfo")
_start_new_thread = monkey.get_original("_thread", "start_new_thread")


class Resolver:
    def __init__(self, host: str, port: int, timeout: float):
        """`timeout`: seconds after which another lookup may start beside one that hangs."""
        self._host, self._port, self._timeout = host, port, timeout
        self._known: list[Address] = []
        # When the lookup that found them began, and when the latest lookup began.
        self._known_at = self._began_at = -math.inf
        self._threads = 0
        # For all greenlets that wait, whichever lookup ends first.
        self._pending: gevent.event.AsyncResult | None = None
        # Lowest first; 0 for those that were not tried.
        self._rank: dict[Address, int] = {}
        self._count = itertools.count(1)

    def addresses(self) -> list[Address]:
        """Raises OSError if the lookup fails and no address is known; has no time limit then."""
        now = time.monotonic()
        if now - self._known_at > REMEMBERED:
            pending = self._look_up(now)
            if self._known:
                pending.wait(max(0, self._began_at + STALE_AFTER - now))
            else:
                pending.get()
        return sorted(self._known, key=lambda address: self._rank.get(address, 0))

    def reached(self, address: Address) -> None:
        """To be tried first from now on."""
        self._rank[address] = -next(self._count)

    def failed(self, address: Address) -> None:
        """To be tried last from now on.

        The next use looks the name up again: it may have changed.
        """
        self._rank[address] = next(self._count)
        self._known_at = -math.inf

    def _look_up(self, now: float) -> gevent.event.AsyncResult:
        """Start a lookup, unless one is running."""
        if self._pending is None:
            self._pending = gevent.event.AsyncResult()
        elif now - self._began_at < self._timeout:
            return self._pending
        pending = self._pending
        if self._threads == THREADS:
            return pending
        self._began_at = now
        self._threads += 1
        outcome: list[Any] = []
        done = gevent.get_hub().loop.async_()

        def work() -> None:
            try:
                outcome.append(addresses.look_up(self._host, self._port, _getaddrinfo))
            except Exception as error:
                # Raised by the greenlets that wait.
                outcome.append(error)
            done.send()

        def finish() -> None:
            done.stop()
            done.close()
            self._threads -= 1
            self._finish(now, outcome[0])

        done.start(finish)
        try:
            _start_new_thread(work, ())
        except RuntimeError as error:
            # No more threads.
            outcome.append(OSError(f"no thread for the name lookup: {error}"))
            finish()
        return pending

    def _finish(self, began_at: float, outcome: list[Address] | Exception) -> None:
        error = outcome if isinstance(outcome, Exception) else None
        if not isinstance(outcome, Exception) and began_at > self._known_at:
            self._known, self._known_at = outcome, began_at
            self._rank = {one: self._rank[one] for one in outcome if one in self._rank}
        # After a failure a later lookup may still succeed.
        if self._pending is not None and (error is None or began_at >= self._began_at):
            pending, self._pending = self._pending, None
            if error is None:
                pending.set(None)
            else:
                pending.set_exception(error)
