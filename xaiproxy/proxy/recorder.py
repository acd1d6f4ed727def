"""The records of requests, counted a moment after the requests: for /metrics and the status page.

A request only appends its record to a list. Content is decoded and usage is read here, so that no
client waits for it. The log line of a compressed stream follows that, because the stream may end
with an error. The work is done in slices, between which streams go on.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import gevent
import gevent.lock

from xaiproxy.http1 import response_head
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.http1.sample import Sample
from xaiproxy.proxy import content, counters, history, request_log, routes, trouble, usage
from xaiproxy.proxy.pace import Pace

# Seconds until a record is counted: many at a time cost less, and few keep little content.
DELAY = 0.25
RECORDS_PER_CHECK = 8  # of the time, which costs a tenth of a record without content
RATE_LIMITS = ("tokens", "requests")
RATE_LIMIT = "x-ratelimit-limit-tokens"  # in every response that has any
NUMBER = re.compile(r"[0-9]{1,15}")
NO_VALUE = ("",)

EndSpan = Callable[[RequestRecord, usage.Usage | None], object]


class Recorder:
    """`counters`, `history`: what they have been folded into.

    `upstream`: the failures of upstream.
    """

    def __init__(self, end_span: EndSpan | None = None):
        """`end_span`: called with each record that has a span, and its usage or None."""
        self._end_span = end_span
        self.counters = counters.Counters()
        self.history = history.History()
        self.upstream = trouble.Upstream()
        self._keys = counters.Names(counters.KEYS)
        self._models = counters.Names(counters.MODELS)
        self._pending: deque[RequestRecord] = deque()
        # The last record whose response has rate limits: only these are read.
        self._limited: RequestRecord | None = None
        self._folding = gevent.lock.Semaphore()
        self._timer: Any = gevent.get_hub().loop.timer(DELAY)

    def add_former(
        self, former_counters: Mapping[str, Any], former_history: Mapping[str, Any]
    ) -> None:
        """Continue the counting of another process. Both are what `plain` has returned there."""
        pace = Pace()
        self.counters.add_plain(former_counters, pace)
        self.history.add_plain(former_history, pace)
        # The numbers of names stay limited.
        for counted in self.counters.routes.values():
            for _, key in counted.requests:
                self._keys.bounded(key)
        for model, _ in self.counters.tokens:
            self._models.bounded(model)

    def add(self, record: RequestRecord) -> None:
        """At the end of a request."""
        self._pending.append(record)
        if not self._timer.active:
            self._timer.start(gevent.spawn, self.fold)

    def fold(self) -> None:
        """Count the records that there are now."""
        pace = Pace()
        with self._folding:
            for number in range(len(self._pending)):
                self._fold(self._pending.popleft(), pace)
                if number % RECORDS_PER_CHECK == 0:
                    pace()
            if self._limited is not None:
                self._add_rate_limits(self._limited)
                self._limited = None

    def _fold(self, record: RequestRecord, pace: Pace) -> None:
        if record.path in request_log.HEALTH_CHECKS:
            return
        route = routes.of(record.path)
        key = self._keys.bounded(record.key or "")
        self.counters.add(record, route, key)
        if route != "own":
            self.history.add(record)
            self.upstream.add(record)
        head, found = record.upstream, None
        if head is not None:
            if RATE_LIMIT in head.values:
                self._limited = record
            if record.sample is not None and head.status < 400:
                found = self._read(record, head, record.sample, key, pace)
                # Up to a mebibyte was searched.
                pace()
        if self._end_span is not None and record.span is not None:
            self._end_span(record, found)

    def _add_rate_limits(self, record: RequestRecord) -> None:
        for kind in RATE_LIMITS:
            limit = _number(record.upstream, f"x-ratelimit-limit-{kind}")
            remaining = _number(record.upstream, f"x-ratelimit-remaining-{kind}")
            if limit is not None and remaining is not None:
                ended_at = record.started_at + record.duration
                self.history.set_rate_limit(ended_at, kind, limit, remaining)

    def _read(
        self,
        record: RequestRecord,
        head: response_head.Head,
        sample: Sample,
        key: str,
        pace: Pace,
    ) -> usage.Usage | None:
        """Decode the content, write the log line that waits for it, and count its usage."""
        data, unread = b"", ""
        try:
            data = content.taken(head, sample, pace)
        except content.Unreadable as error:
            unread = error.reason
        if request_log.is_late(record):
            request_log.write(record, data)
        if not usage.is_expected(record.method, record.path, head.status):
            return None
        if unread:
            self.counters.unread[unread] += 1
            return None
        found = usage.read(data, sample.is_stream)
        if found is None or found.is_partial:
            self.counters.unread["none" if record.ended_by == "done" else "cut"] += 1
        if found is not None:
            model = self._models.bounded(found.model)
            self.counters.add_usage(model, key, found)
            self.history.add_usage(record.started_at + record.duration, model, key, found)
        return found


def _number(head: response_head.Head | None, name: str) -> float | None:
    value = head.values.get(name, NO_VALUE)[0] if head is not None else ""
    return float(value) if NUMBER.fullmatch(value) else None
