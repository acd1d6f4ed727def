"""/metrics, in the text formats of Prometheus and OpenMetrics. The names are an interface.

prometheus_client renders it from what is counted elsewhere, and nothing of it is on a request's
path. It gets each sample when it is about to render it, and then other greenlets may run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import gevent.lock
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from xaiproxy import __version__, kernel, log
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy import login_metrics, process_metrics, request_metrics
from xaiproxy.proxy.loop_lag import WINDOW, LoopLag
from xaiproxy.proxy.metric_family import counter, gauge, info
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.recorder import Recorder
from xaiproxy.token_store import TokenStore

OPENMETRICS = "application/openmetrics-text"


class Metrics:
    """prometheus_client's collector. `server`: the proxy's, which is made after it."""

    def __init__(self, recorder: Recorder, store: TokenStore, pool: Pool, lag: LoopLag):
        self.server: Any = None
        self.recorder = recorder
        self._store = store
        self._pool = pool
        self._lag = lag
        self._started_at = kernel.started_at()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        # Of several at a time, each would have its slice between two turns of the streams.
        self._rendering = gevent.lock.Semaphore()
        # Of the page that is being rendered.
        self._with_names, self._own = True, 1

    def page(self, accept: str, with_names: bool = True, own: int = 1) -> tuple[bytes, str]:
        """The content and its media type. `accept`: the Accept header.

        `with_names`: whether the label `key` has the names of client keys. `own`: the requests
        among those of `server` that are for this page, 0 or 1.
        """
        self.recorder.fold()
        encode, media_type = choose_encoder(OPENMETRICS if _wants_openmetrics(accept) else "")
        with self._rendering:
            self._with_names, self._own = with_names, own
            return encode(self._registry), media_type

    def collect(self) -> Iterator[Metric]:
        pace = Pace()
        for families in (
            request_metrics.families(self.recorder, self._with_names),
            self._connections(),
            login_metrics.families(self._store, time.time()),
            self._program(),
            process_metrics.families(self._started_at, pace),
        ):
            for family in families:
                # Declared as a list, but only iterated.
                family.samples = _paced(family.samples, pace)  # type: ignore[assignment]
                yield family

    def _connections(self) -> Iterator[Metric]:
        server, pool = self.server, self._pool
        yield gauge(
            "xaiproxy_requests_in_flight",
            "Requests that are being answered, without this one.",
            (),
            [(server.busy - self._own,)],
        )
        yield gauge("xaiproxy_streams_open", "Open streams.", (), [(server.open["streams"],)])
        yield gauge(
            "xaiproxy_websockets_open", "Open WebSockets.", (), [(server.open["websockets"],)]
        )
        yield gauge("xaiproxy_connections", "Client connections.", (), [(len(server.pool),)])
        yield gauge(
            "xaiproxy_connections_limit",
            "Client connections above which requests are refused (XAI_PROXY_MAX_CONNECTIONS).",
            (),
            [(server.connections,)],
        )
        yield counter(
            "xaiproxy_connections_accepted",
            "Client connections that were accepted.",
            (),
            [(server.accepted,)],
        )
        yield gauge(
            "xaiproxy_upstream_connections",
            "Open connections to upstream.",
            ("state",),
            [("busy", pool.busy), ("idle", pool.idle)],
        )
        yield counter(
            "xaiproxy_upstream_connections_opened",
            "Connections to upstream that were opened.",
            (),
            [(pool.opened,)],
        )

    def _program(self) -> Iterator[Metric]:
        yield gauge(
            "xaiproxy_event_loop_lag_seconds",
            f"How late a timer of the event loop was at most in the last {WINDOW} seconds.",
            (),
            [(self._lag.seconds(),)],
        )
        yield counter(
            "xaiproxy_log_lines_dropped",
            "Log lines that were dropped because the log was not read in time.",
            (),
            [(log.lines_dropped(),)],
        )
        yield info("xaiproxy_build", "The version of xaiproxy.", {"version": __version__})
        yield gauge("xaiproxy_workers", "Proxy processes.", (), [(1,)])


def _wants_openmetrics(accept: str) -> bool:
    # choose_encoder gets no text of the client's: it raises for a version that is not a number.
    return any(part.split(";")[0].strip() == OPENMETRICS for part in accept.split(","))


def _paced(samples: Iterable[Sample], pace: Pace) -> Iterator[Sample]:
    for sample in samples:
        pace()
        yield sample
