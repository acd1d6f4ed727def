"""The numbers of /metrics that requests add to. Their names and labels are in metrics.py."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from xaiproxy.http1.request_record import RequestRecord
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


class Names:
    """The first `limit` values of a label; later ones become OTHER."""

    def __init__(self, limit: int):
        self._limit = limit
        self._known: set[str] = set()

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
