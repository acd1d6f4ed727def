"""The last hour by minutes, the tokens of the day and the last rate limits, for the status page."""

from __future__ import annotations

import math
import time
from typing import Any

from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.usage import Usage

MINUTES = 60  # that are kept
STEPS = 10  # of the first byte's logarithm: a percentile is exact to 5 %
TOKENS = ("input", "cached_input", "output", "reasoning")


class Minute:
    """`first_bytes`: the number of first bytes in each step of the logarithm of their seconds."""

    __slots__ = ("errors", "first_bytes", "requests")

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.first_bytes: dict[int, int] = {}

    def add(self, record: RequestRecord) -> None:
        self.requests += 1
        if record.status >= 500 or record.broken is not None:
            self.errors += 1
        if record.first_byte is not None:
            step = math.floor(math.log(max(record.first_byte, 1e-6)) * STEPS)
            self.first_bytes[step] = self.first_bytes.get(step, 0) + 1

    def percentile(self, share: float) -> float | None:
        """The seconds within which `share` of the first bytes were sent; None without any."""
        left = math.ceil(share * sum(self.first_bytes.values()))
        for step, number in sorted(self.first_bytes.items()):
            left -= number
            if left <= 0:
                return float(f"{math.exp((step + 0.5) / STEPS):.3g}")
        return None


class History:
    """Folded from the records of requests to the API. Times are unix seconds."""

    def __init__(self) -> None:
        # By the number of the minute in unix time.
        self._minutes: dict[int, Minute] = {}
        # Of one day: by model and key, in the order of TOKENS.
        self._day: Any = None
        self._tokens: dict[tuple[str, str], list[int]] = {}
        self._rate_limits: dict[str, dict[str, float]] = {}

    def add(self, record: RequestRecord) -> None:
        number = int((record.started_at + record.duration) // 60)
        minute = self._minutes.get(number)
        if minute is None:
            minute = self._minutes[number] = Minute()
            # Also what a clock that was set back has left in the future.
            for other in [other for other in self._minutes if abs(number - other) >= MINUTES]:
                del self._minutes[other]
        minute.add(record)

    def add_usage(self, at: float, model: str, key: str, usage: Usage) -> None:
        """`model`, `key`: names whose number is bounded."""
        day = _day(at)
        if day != self._day:
            self._day, self._tokens = day, {}
        sums = self._tokens.setdefault((model, key), [0] * len(TOKENS))
        for index, name in enumerate(TOKENS):
            sums[index] += getattr(usage, name)

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
            minute = self._minutes.get(number) or Minute()
            found.append(
                {
                    "at": number * 60,
                    "requests": minute.requests,
                    "errors": minute.errors,
                    "first_byte_p50": minute.percentile(0.5),
                    "first_byte_p95": minute.percentile(0.95),
                }
            )
        return found

    def tokens_today(self, now: float) -> list[dict[str, Any]]:
        """Tokens since local midnight by `model` and `key`, the largest user first."""
        if _day(now) != self._day:
            return []
        rows = [
            {"model": model, "key": key, **dict(zip(TOKENS, sums, strict=True))}
            for (model, key), sums in self._tokens.items()
        ]
        return sorted(rows, key=lambda row: -row["input"] - row["output"])

    def rate_limits(self) -> dict[str, dict[str, float]]:
        """By kind (tokens, requests): the last `limit` and `remaining`, and `at`, their time."""
        return {kind: dict(values) for kind, values in self._rate_limits.items()}


def _day(at: float) -> tuple[int, ...]:
    return time.localtime(at)[:3]
