"""/metrics of the refresher: the login's metrics, its version and its process."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from xaiproxy import __version__, kernel, login_metrics, process_metrics
from xaiproxy.metric_family import encoder, info
from xaiproxy.token_store import TokenStore


class Metrics:
    """prometheus_client's collector."""

    def __init__(self, store: TokenStore):
        self._store = store
        self._started_at = kernel.started_at()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The content and its media type. `accept`: the Accept header."""
        encode, media_type = encoder(accept)
        return encode(self._registry), media_type

    def collect(self) -> Iterator[Metric]:
        yield from login_metrics.families(self._store, time.time())
        yield info("xaiproxy_build", "The version of xaiproxy.", {"version": __version__})
        measured = process_metrics.measure(lambda: None)
        yield from process_metrics.families(measured, time.process_time(), self._started_at)
