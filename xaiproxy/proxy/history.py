"""The last hour by minutes, the tokens of the day and the last rate limits, for the status page."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.counters import OTHER, add_rows, rows
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.usage import Usage

MINUTES = 60  # that are kept
# Seconds, from 1 us to 5 hours: first bytes are counted in these steps, so that a percentile is
# exact to 5 %.
STEPS = tuple(1e-6 * 1.1**step for step in range(250))
TOKENS = ("input", "cached_input", "output", "reasoning")
ROWS = 100  # of tokens: the page asks every two seconds, and each takes 3 us


class Minute:
    """`first_bytes`: the number of first bytes in each of STEPS, and above them."""

    __slots__ = ("_percentiles", "_plain", "errors", "first_bytes", "requests")

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.first_bytes = [0] * (len(STEPS) + 1)
        # After so many requests.
        self._percentiles: tuple[int, float | None, float | None] = (0, None, None)
        self._plain: list[Any] = [0, 0, []]

    def percentiles(self) -> tuple[float | None, float | None]:
        """The median and the 95th percentile, computed once for a minute that is over."""
        if self._percentiles[0] != self.requests:
            self._percentiles = self.requests, self.percentile(0.5), self.percentile(0.95)
        return self._percentiles[1:]

    def plain(self) -> list[Any]:
        """The requests, the errors, and the steps that have first bytes with their numbers.

        It is computed once for a minute that is over.
        """
        if self._plain[0] != self.requests:
            steps = [[step, number] for step, number in enumerate(self.first_bytes) if number]
            self._plain = [self.requests, self.errors, steps]
        return self._plain

    def add_plain(self, plain: list[Any]) -> None:
        requests, errors, steps = plain
        self.requests += requests
        self.errors += errors
        for step, number in steps:
            self.first_bytes[step] += number

    def percentile(self, share: float) -> float | None:
        """The seconds within which `share` of the first bytes were sent; None without any."""
        left = math.ceil(share * sum(self.first_bytes))
        if left == 0:
            return None
        step = bisect_left(list(itertools.accumulate(self.first_bytes)), left)
        return float(f"{STEPS[min(step, len(STEPS) - 1)] / 1.05:.3g}")


NO_REQUEST = Minute()


class History:
    """Folded from the records of requests to the API. Times are unix seconds."""

    def __init__(self) -> None:
        # By the number of the minute in unix time.
        self._minutes: dict[int, Minute] = {}
        # The latest, and its begin.
        self._minute = Minute()
        self._begin = -math.inf
        # Of the day between two local midnights: by model and key, in the order of TOKENS.
        self._day = (0.0, 0.0)
        self._tokens: dict[tuple[str, str], list[int]] = {}
        self._rate_limits: dict[str, dict[str, float]] = {}

    def add(self, record: RequestRecord) -> None:
        since = record.started_at + record.duration - self._begin
        if not 0 <= since < 60:
            self._change_minute(record.started_at + record.duration)
        minute = self._minute
        minute.requests += 1
        if record.status >= 500 or record.broken is not None:
            minute.errors += 1
        if record.first_byte is not None:
            minute.first_bytes[bisect_left(STEPS, record.first_byte)] += 1

    def _change_minute(self, at: float) -> None:
        number = int(at // 60)
        self._begin = number * 60
        # Also what a clock that was set back has left in the future.
        for other in [other for other in self._minutes if abs(number - other) >= MINUTES]:
            del self._minutes[other]
        self._minute = self._minutes.setdefault(number, Minute())

    def add_usage(self, at: float, model: str, key: str, usage: Usage) -> None:
        """`model`, `key`: names whose number is bounded."""
        if not self._day[0] <= at < self._day[1]:
            self._day, self._tokens = _day(at), {}
        sums = self._tokens.get((model, key))
        if sums is None:
            sums = self._tokens[model, key] = [0] * len(TOKENS)
        sums[0] += usage.input
        sums[1] += usage.cached_input
        sums[2] += usage.output
        sums[3] += usage.reasoning

    def set_rate_limit(self, at: float, kind: str, limit: float, remaining: float) -> None:
        """`kind`: tokens or requests."""
        self._rate_limits[kind] = {"limit": limit, "remaining": remaining, "at": at}

    def minutes(self, now: float) -> list[dict[str, Any]]:
        """The last 60 minutes, the oldest first; the last one is not over.

        Each with `at`, its begin; `requests`; `errors`, those with a status of 500 or above or a
        response that upstream broke; and the seconds to the first byte, `first_byte_p50` and
        `first_byte_p95`, or None.
        """
        last = int(now // 60)
        found = []
        for number in range(last - MINUTES + 1, last + 1):
            minute = self._minutes.get(number, NO_REQUEST)
            half, most = minute.percentiles()
            found.append(
                {
                    "at": number * 60,
                    "requests": minute.requests,
                    "errors": minute.errors,
                    "first_byte_p50": half,
                    "first_byte_p95": most,
                }
            )
        return found

    def tokens_today(self, now: float) -> list[dict[str, Any]]:
        """Tokens since local midnight by `model` and `key`, the largest user first.

        Those after the first ROWS are one row.
        """
        if not self._day[0] <= now < self._day[1]:
            return []
        rows = heapq.nlargest(ROWS, self._tokens.items(), key=lambda row: row[1][0] + row[1][2])
        if len(self._tokens) > ROWS:
            shown = map(sum, zip(*(sums for _, sums in rows), strict=True))
            everything = map(sum, zip(*self._tokens.values(), strict=True))
            rest = [whole - part for whole, part in zip(everything, shown, strict=True)]
            rows.append(((OTHER, OTHER), rest))
        return [
            {"model": model, "key": key, **dict(zip(TOKENS, sums, strict=True))}
            for (model, key), sums in rows
        ]

    def rate_limits(self) -> dict[str, dict[str, float]]:
        """By kind (tokens, requests): the last `limit` and `remaining`, and `at`, their time."""
        return {kind: dict(values) for kind, values in self._rate_limits.items()}

    def plain(self) -> dict[str, Any]:
        """All of it in types that JSON has, for another process."""
        return {
            "minutes": {number: minute.plain() for number, minute in self._minutes.items()},
            "day": self._day,
            "tokens": rows(self._tokens),
            "rate_limits": self._rate_limits,
        }

    def add_plain(
        self, plain: Mapping[str, Any], pace: Pace, clock: Callable[[], float] = time.time
    ) -> None:
        """Add what `plain` has returned in another process.

        If the clock was set back, that may have a day that has not begun, which is left out, and
        rate limits with a time in the future, which any others replace.
        """
        now = clock()
        for number, minute in plain["minutes"].items():
            self._minutes.setdefault(int(number), Minute()).add_plain(minute)
            pace()
        begin, end = plain["day"]
        if now >= begin > self._day[0]:
            self._day, self._tokens = (begin, end), {}
        if begin == self._day[0]:
            add_rows(self._tokens, plain["tokens"], pace)
        for kind, seen in plain["rate_limits"].items():
            known = self._rate_limits.setdefault(kind, seen)
            self._rate_limits[kind] = max(
                known, seen, key=lambda one: (one["at"] <= now, one["at"])
            )


def _day(at: float) -> tuple[float, float]:
    """The local midnights around a time."""
    year, month, day = time.localtime(at)[:3]
    return (
        time.mktime((year, month, day, 0, 0, 0, 0, 0, -1)),
        time.mktime((year, month, day + 1, 0, 0, 0, 0, 0, -1)),
    )
