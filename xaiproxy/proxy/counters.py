"""The numbers of /metrics that requests add to. Their names and labels are in metrics.py."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.routes import ROUTES
from xaiproxy.proxy.usage import Usage

# Seconds: the upper bounds of the histograms' buckets.
DURATION = tuple(round(0.01 * 2**step, 2) for step in range(18))
FIRST_BYTE = DURATION[:15]
OVERHEAD = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
TYPES = ("input", "cached_input", "output", "reasoning")  # of tokens
KEYS, MODELS = 100, 50  # different values of these labels, not counting OTHER
OTHER = "other"


class Histogram:
    """`counts`: of the observations in each bucket, the last one without an upper bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def plain(self) -> list[Any]:
        return [self.sum, self.counts]

    def add_plain(self, plain: list[Any]) -> None:
        total, counts = plain
        self.sum += total
        self.counts = [own + other for own, other in zip(self.counts, counts, strict=True)]


# Values of a label that its limit does not count: without a client key, and of the further ones.
UNCOUNTED = frozenset(("", OTHER))


class Names:
    """The first `limit` values of a label; later ones become OTHER."""

    def __init__(self, limit: int):
        self._limit = limit + len(UNCOUNTED)
        self._known = set(UNCOUNTED)

    def bounded(self, name: str) -> str:
        if name not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(name)
        return name


class RouteCounters:
    """`requests`: by status and key. `ended`: by what ended them."""

    __slots__ = ("duration", "ended", "first_byte", "request_bytes", "requests", "response_bytes")

    def __init__(self) -> None:
        self.requests: dict[tuple[int, str], int] = defaultdict(int)
        self.ended: dict[str, int] = defaultdict(int)
        self.duration = Histogram(DURATION)
        self.first_byte = Histogram(FIRST_BYTE)
        self.request_bytes = self.response_bytes = 0

    def plain(self) -> dict[str, Any]:
        return {
            "requests": rows(self.requests),
            "ended": self.ended,
            "duration": self.duration.plain(),
            "first_byte": self.first_byte.plain(),
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
        }

    def add_plain(self, plain: Mapping[str, Any]) -> None:
        for status, key, number in plain["requests"]:
            self.requests[status, key] += number
        add_numbers(self.ended, plain["ended"])
        self.duration.add_plain(plain["duration"])
        self.first_byte.add_plain(plain["first_byte"])
        self.request_bytes += plain["request_bytes"]
        self.response_bytes += plain["response_bytes"]


class Counters:
    """`tokens`: by model and key, in the order of TYPES. `unread`: responses whose usage was not
    read, by reason.

    `rejected`: the proxy's own responses, by code. `upstream_errors`: by kind.
    """

    def __init__(self) -> None:
        self.routes = {route: RouteCounters() for route in ROUTES}
        self.overhead = Histogram(OVERHEAD)
        self.upstream_errors: dict[str, int] = defaultdict(int)
        self.tokens_refused: dict[str, int] = defaultdict(int)
        self.rejected: dict[str, int] = defaultdict(int)
        self.tokens: dict[tuple[str, str], list[int]] = {}
        self.unread: dict[str, int] = defaultdict(int)

    def add(self, record: RequestRecord, route: str, key: str) -> None:
        """`key`: a name whose number is bounded."""
        counted, duration, first_byte = self.routes[route], record.duration, record.first_byte
        counted.requests[record.status, key] += 1
        counted.ended[record.ended_by] += 1
        counted.request_bytes += record.request_bytes
        counted.response_bytes += record.response_bytes
        histogram = counted.duration
        histogram.counts[bisect_left(DURATION, duration)] += 1
        histogram.sum += duration
        if first_byte is not None:
            histogram = counted.first_byte
            histogram.counts[bisect_left(FIRST_BYTE, first_byte)] += 1
            histogram.sum += first_byte
        if record.overhead is not None:
            histogram = self.overhead
            histogram.counts[bisect_left(OVERHEAD, record.overhead)] += 1
            histogram.sum += record.overhead
        if record.token_refused:
            self.tokens_refused[record.token_refused] += 1
        if record.refusal is not None:
            self.rejected[record.refusal.code] += 1
            if record.refusal.kind:
                self.upstream_errors[record.refusal.kind] += 1
        elif record.broken is not None:
            self.upstream_errors[record.broken.kind] += 1

    def add_usage(self, model: str, key: str, usage: Usage) -> None:
        """`model`, `key`: names whose number is bounded."""
        sums = self.tokens.get((model, key))
        if sums is None:
            sums = self.tokens[model, key] = [0] * len(TYPES)
        sums[0] += usage.input
        sums[1] += usage.cached_input
        sums[2] += usage.output
        sums[3] += usage.reasoning

    def plain(self) -> dict[str, Any]:
        """All of it in types that JSON has, for another process."""
        return {
            "routes": {name: one.plain() for name, one in self.routes.items() if one.requests},
            "overhead": self.overhead.plain(),
            "tokens": rows(self.tokens),
            **{name: getattr(self, name) for name in NUMBERS},
        }

    def add_plain(self, plain: Mapping[str, Any], pace: Pace) -> None:
        """Add what `plain` has returned in another process."""
        for name, values in plain["routes"].items():
            self.routes[name].add_plain(values)
            pace()
        self.overhead.add_plain(plain["overhead"])
        add_rows(self.tokens, plain["tokens"], pace)
        for name in NUMBERS:
            add_numbers(getattr(self, name), plain[name])

    def limit_names(self, pace: Pace) -> None:
        """Make OTHER of the keys and models above KEYS and MODELS, as a sum of workers may have."""
        all_keys: set[str] = set()
        for counted in self.routes.values():
            all_keys.update(key for _, key in counted.requests)
            pace()
        keys = _excess(all_keys, KEYS)
        models = _excess({model for model, _ in self.tokens}, MODELS)
        if not (keys or models):
            return
        for counted in self.routes.values():
            requests, counted.requests = counted.requests, defaultdict(int)
            for (status, key), number in requests.items():
                counted.requests[status, OTHER if key in keys else key] += number
                pace()
        tokens, self.tokens = self.tokens, {}
        for (model, key), sums in tokens.items():
            names = OTHER if model in models else model, OTHER if key in keys else key
            add_rows(self.tokens, [[*names, sums]], pace)


def _excess(names: set[str], limit: int) -> set[str]:
    """The names after the first `limit` in alphabetical order.

    So all workers that add up the same numbers show the same. As names are added, no other one
    comes back, so the counters of OTHER do not fall.
    """
    return set(sorted(names - UNCOUNTED)[limit:])


# The attributes of Counters that are dicts of numbers by names.
NUMBERS = ("upstream_errors", "tokens_refused", "rejected", "unread")


def rows(values: Mapping[tuple[Any, str], Any]) -> list[list[Any]]:
    """JSON has no tuples as names of members."""
    return [[first, second, value] for (first, second), value in values.items()]


def add_rows(sums: dict[tuple[str, str], list[int]], others: list[list[Any]], pace: Pace) -> None:
    for first, second, numbers in others:
        own = sums.get((first, second), [0] * len(TYPES))
        sums[first, second] = [one + other for one, other in zip(own, numbers, strict=True)]
        pace()


def add_numbers(numbers: dict[str, int], others: Mapping[str, int]) -> None:
    for name, number in others.items():
        numbers[name] += number
