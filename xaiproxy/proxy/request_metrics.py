"""The metrics of requests, of upstream's responses and of tokens: what a Recorder has counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from xaiproxy import errors
from xaiproxy.metric_family import Rows, counter, family, from_zero, gauge
from xaiproxy.proxy import routes
from xaiproxy.proxy.counters import TYPES, Counters, Histogram, RouteCounters
from xaiproxy.proxy.numbers import Numbers

ENDS = ("done", "client", "upstream", "proxy", "drain")
KINDS = ("dns", "connect", "tls", "timeout", "reset_before_head", "reset_in_answer", "egress_proxy")
OUTCOMES = ("replayed", "passed_on")
UNREAD = ("compressed", "too_long", "none", "cut")


def families(numbers: Numbers, with_names: bool) -> Iterator[Metric]:
    """`with_names`: whether the label `key` has the names of client keys."""
    by_key = _as_they_are if with_names else _without_names
    yield from _of_routes(numbers.counters, by_key)
    yield from _of_faults(numbers.counters)
    yield from _of_usage(numbers, by_key)


def _as_they_are(rows: Rows) -> Rows:
    return rows


def _without_names(rows: Rows) -> Rows:
    """Add up the rows that differ only in their third label, the name of a client key."""
    sums: dict[tuple[object, object], int] = defaultdict(int)
    for first, second, _, number in rows:
        sums[first, second] += number
    return [(*labels, "", number) for labels, number in sums.items()]


def _of_routes(counters: Counters, by_key: Callable[[Rows], Rows]) -> Iterator[Metric]:
    yield counter(
        "xaiproxy_requests",
        "Requests by route, status as sent (499: the client left before) and client key.",
        ("route", "status", "key"),
        by_key(
            (route, status, key, number)
            for route, counted in list(counters.routes.items())
            for (status, key), number in list(counted.requests.items())
        ),
    )
    yield counter(
        "xaiproxy_requests_ended",
        "Requests by route and by what ended them.",
        ("route", "ended_by"),
        (
            (route, end, counters.routes[route].ended[end])
            for route in routes.ROUTES
            for end in ENDS
        ),
    )
    yield _histogram(
        "xaiproxy_request_duration_seconds",
        "Seconds from a request's head to the end of its response.",
        _histograms(counters, lambda counted: counted.duration),
    )
    yield _histogram(
        "xaiproxy_time_to_first_byte_seconds",
        "Seconds from a request's head to the first byte of its response.",
        _histograms(counters, lambda counted: counted.first_byte),
    )
    yield _histogram(
        "xaiproxy_overhead_seconds",
        "The proxy's own share of the time to the first byte.",
        [({}, counters.overhead)],
    )
    yield counter(
        "xaiproxy_request_bytes",
        "Bytes of request bodies, by route.",
        ("route",),
        ((route, counters.routes[route].request_bytes) for route in routes.ROUTES),
    )
    yield counter(
        "xaiproxy_response_bytes",
        "Bytes of response bodies, by route.",
        ("route",),
        ((route, counters.routes[route].response_bytes) for route in routes.ROUTES),
    )


def _histograms(
    counters: Counters, of: Callable[[RouteCounters], Histogram]
) -> Iterator[tuple[dict[str, str], Histogram]]:
    for route, counted in list(counters.routes.items()):
        # Those without a request would be most of the page.
        if counted.requests:
            yield {"route": route}, of(counted)


def _of_faults(counters: Counters) -> Iterator[Metric]:
    yield counter(
        "xaiproxy_rejected_requests",
        "Responses of the proxy's own, by error code.",
        ("code",),
        from_zero(_codes(errors.ErrorResponse), counters.rejected),
    )
    yield counter(
        "xaiproxy_upstream_errors",
        "Requests that failed at upstream or on the way to it, by kind.",
        ("kind",),
        from_zero(KINDS, counters.upstream_errors),
    )
    yield counter(
        "xaiproxy_tokens_refused",
        "Responses of upstream that refused the access token, by what became of the request.",
        ("outcome",),
        from_zero(OUTCOMES, counters.tokens_refused),
    )


def _codes(response: type[errors.ErrorResponse]) -> list[str]:
    """The error codes of a class and of those below it."""
    return [response.code, *(code for one in response.__subclasses__() for code in _codes(one))]


def _of_usage(numbers: Numbers, by_key: Callable[[Rows], Rows]) -> Iterator[Metric]:
    counters, limits = numbers.counters, numbers.history.rate_limits()
    yield counter(
        "xaiproxy_tokens",
        "Tokens by model, type and client key; input includes cached_input, output reasoning.",
        ("model", "type", "key"),
        by_key(
            (model, type, key, number)
            for (model, key), sums in list(counters.tokens.items())
            for type, number in zip(TYPES, sums, strict=True)
        ),
    )
    yield counter(
        "xaiproxy_usage_unread",
        "Responses of chat, responses and messages whose usage was not read, by reason.",
        ("reason",),
        from_zero(UNREAD, counters.unread),
    )
    yield gauge(
        "xaiproxy_ratelimit_limit",
        "Upstream's rate limits as last seen.",
        ("kind",),
        [(kind, seen["limit"]) for kind, seen in limits.items()],
    )
    yield gauge(
        "xaiproxy_ratelimit_remaining",
        "What was left of upstream's rate limits as last seen.",
        ("kind",),
        [(kind, seen["remaining"]) for kind, seen in limits.items()],
    )


def _histogram(
    name: str, documentation: str, histograms: Iterable[tuple[dict[str, str], Histogram]]
) -> Metric:
    """`histograms`: each with its labels."""
    return family("histogram", name, documentation, _buckets(name, histograms))


def _buckets(name: str, histograms: Iterable[tuple[dict[str, str], Histogram]]) -> Iterator[Sample]:
    for labels, histogram in histograms:
        # Both at once: requests are counted between two samples.
        counts, total = tuple(histogram.counts), histogram.sum
        number = 0
        for bound, count in zip((*map(repr, histogram.bounds), "+Inf"), counts, strict=True):
            number += count
            yield Sample(f"{name}_bucket", {**labels, "le": bound}, number)
        yield Sample(f"{name}_count", labels, number)
        yield Sample(f"{name}_sum", labels, total)
