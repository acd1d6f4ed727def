"""/metrics, in the text formats of Prometheus and OpenMetrics. The names are an interface.

prometheus_client renders it from what is counted elsewhere, and nothing of it is on a request's
path. It gets each sample when it is about to render it, and then other greenlets may run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

import gevent.lock
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from xaiproxy import __version__, dropped_lines, login_metrics, process_metrics
from xaiproxy.metric_family import counter, encoder, gauge, info
from xaiproxy.proxy import request_metrics
from xaiproxy.proxy.loop_lag import WINDOW
from xaiproxy.proxy.numbers import Numbers, Source
from xaiproxy.proxy.pace import Pace
from xaiproxy.token_store import TokenStore


class Metrics:
    """prometheus_client's collector."""

    def __init__(self, source: Source, store: TokenStore):
        self._source = source
        self._store = store
        self._numbers = Numbers()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        # Of several at a time, each would have its slice between two turns of the streams.
        self._rendering = gevent.lock.Semaphore()
        # Of the page that is being rendered.
        self._with_names = True

    def page(self, accept: str, with_names: bool = True) -> tuple[bytes, str]:
        """The content and its media type. `accept`: the Accept header.

        `with_names`: whether the label `key` has the names of client keys.
        """
        encode, media_type = encoder(accept)
        with self._rendering:
            self._with_names = with_names
            self._numbers = self._source()
            return encode(self._registry), media_type

    def collect(self) -> Iterator[Metric]:
        pace, numbers = Pace(), self._numbers
        measured = process_metrics.measure(pace) if numbers.process is None else numbers.process
        for families in (
            request_metrics.families(numbers, self._with_names),
            _connections(numbers.gauges, numbers.sums),
            login_metrics.families(self._store, time.time()),
            _program(numbers),
            process_metrics.families(measured, numbers.sums["cpu_seconds"], numbers.started_at),
        ):
            for family in families:
                # Declared as a list, but only iterated.
                family.samples = _paced(family.samples, pace)  # type: ignore[assignment]
                yield family


def _connections(gauges: Mapping[str, float], sums: Mapping[str, float]) -> Iterator[Metric]:
    yield gauge(
        "xaiproxy_requests_in_flight",
        "Requests to the API that are being answered.",
        (),
        [(gauges["in_flight"],)],
    )
    yield gauge("xaiproxy_streams_open", "Open streams.", (), [(gauges["streams"],)])
    yield gauge("xaiproxy_websockets_open", "Open WebSockets.", (), [(gauges["websockets"],)])
    yield gauge("xaiproxy_connections", "Client connections.", (), [(gauges["connections"],)])
    yield gauge(
        "xaiproxy_connections_limit",
        "Client connections above which requests are refused (XAI_PROXY_MAX_CONNECTIONS).",
        (),
        [(gauges["connections_limit"],)],
    )
    yield counter(
        "xaiproxy_connections_accepted",
        "Client connections that were accepted.",
        (),
        [(sums["connections_accepted"],)],
    )
    yield gauge(
        "xaiproxy_upstream_connections",
        "Open connections to upstream.",
        ("state",),
        [("busy", gauges["upstream_busy"]), ("idle", gauges["upstream_idle"])],
    )
    yield counter(
        "xaiproxy_upstream_connections_opened",
        "Connections to upstream that were opened.",
        (),
        [(sums["upstream_connections_opened"],)],
    )


def _program(numbers: Numbers) -> Iterator[Metric]:
    yield gauge(
        "xaiproxy_event_loop_lag_seconds",
        f"How late a timer of the event loop was at most in the last {WINDOW} seconds.",
        (),
        [(numbers.lag,)],
    )
    yield counter(
        "xaiproxy_log_lines_dropped",
        "Log lines that were dropped because the log was not read in time.",
        (),
        [(numbers.sums["log_lines_dropped"] + dropped_lines.published(),)],
    )
    yield info("xaiproxy_build", "The version of xaiproxy.", {"version": __version__})
    yield gauge("xaiproxy_workers", "Proxy processes.", (), [(numbers.workers,)])


def _paced(samples: Iterable[Sample], pace: Pace) -> Iterator[Sample]:
    for sample in samples:
        pace()
        yield sample
