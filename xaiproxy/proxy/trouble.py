"""What is wrong although /readyz returns 200: no free connection, no upstream, an unread log.

/readyz, the status page and `xai-login --status` name it. It does not change the status of /readyz:
upstream's state is known only from requests, and a proxy that is not ready may get none. Any client
may read the sentences, so they have no text that a server wrote. They have no numbers that grow:
--status --watch prints what has changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from xaiproxy import log
from xaiproxy.http1.request_record import RequestRecord

FAILURES = 2  # requests in a row, so that a single failed one is no trouble
FAILURE_TIME = 300.0  # seconds for which the last failure counts
DROP_TIME = 900.0  # seconds for which dropped lines count, as in conf/prometheus/rules.yml
# By the label `kind` of xaiproxy_upstream_errors_total.
KINDS = {
    "dns": "its name cannot be resolved",
    "connect": "no connection to it can be opened",
    "tls": "the TLS handshake with it fails",
    "timeout": "it does not answer in time",
    "reset_before_head": "it closes the connection without an answer",
    "reset_in_answer": "it breaks its responses off",
    "egress_proxy": "the egress proxy does not connect to it",
}


class Upstream:
    """The failures of upstream since its last answer. `failures`: their number."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.failures = 0
        self._clock = clock
        self._failed_at = -math.inf
        self._reason = ""

    def add(self, record: RequestRecord) -> None:
        """The record of a request to the API."""
        fault = record.refusal if record.broken is None else record.broken
        status = record.upstream.status if record.upstream is not None else None
        if fault is not None and fault.kind:
            self._reason = KINDS.get(fault.kind, fault.kind)
        elif status is not None and status >= 500:
            self._reason = f"it answers {status}"
        else:
            if status is not None:
                self.failures = 0
            return
        self.failures += 1
        self._failed_at = self._clock()

    def sentence(self) -> str:
        if self.failures < FAILURES or self._clock() - self._failed_at > FAILURE_TIME:
            return ""
        return (
            f"the last requests to the API failed: {self._reason}; the log has the "
            "reason of each, and `xai-login --doctor` checks the network"
        )


class Trouble:
    """`server`: the proxy's, which is made after it.

    `is_token_pending`: whether requests get 503 until a token comes from another machine.
    """

    def __init__(
        self,
        upstream: Upstream,
        lines_dropped: Callable[[], int] = log.lines_dropped,
        clock: Callable[[], float] = time.monotonic,
        is_token_pending: Callable[[], bool] = lambda: False,
    ):
        self.server: Any = None
        self._upstream = upstream
        self._is_token_pending = is_token_pending
        self._lines_dropped = lines_dropped
        self._clock = clock
        self._dropped = 0
        self._dropped_at = -math.inf

    def is_saturated(self) -> bool:
        """Whether every connection has a request to the API."""
        return bool(self.server.in_flight() >= self.server.connections)

    def sentence(self) -> str:
        """The first trouble that there is, without a full stop; "" if there is none."""
        if self.is_saturated():
            return (
                f"all {self.server.connections} connections have a request, and further requests "
                "get 503; raise XAI_PROXY_MAX_CONNECTIONS if that lasts"
            )
        if self._is_token_pending():
            return (
                "the API refuses the access token, and requests get 503 until another one comes "
                "from the refresher on another machine"
            )
        return self._upstream.sentence() or self._unread_log()

    def _unread_log(self) -> str:
        dropped = self._lines_dropped()
        if dropped != self._dropped:
            self._dropped, self._dropped_at = dropped, self._clock()
        if self._clock() - self._dropped_at > DROP_TIME:
            return ""
        return "log lines were dropped, because the log is not read in time"
