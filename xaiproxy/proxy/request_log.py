"""The log line of a request: what happened, and for a failure its code and its reason."""

from __future__ import annotations

import logging
from typing import Any

from xaiproxy import log
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy import content, upstream_error

logger = logging.getLogger("xaiproxy.request")

HEALTH_CHECKS = frozenset(("/healthz", "/readyz"))
# What programs request again and again.
POLLED = HEALTH_CHECKS | {"/metrics", "/status.json"}


def is_late(record: RequestRecord) -> bool:
    """Whether the line is to be written once the content is decoded: an error may end it."""
    sample = record.sample
    return (
        sample is not None and sample.is_stream and sample.keeps_all and record.ended_by == "done"
    )


def write(record: RequestRecord, decoded: bytes | None = None) -> None:
    """`decoded`: the content of a response whose line is late."""
    code, reason = failure_of(record, decoded)
    message = f"{record.method} {record.path} {record.status}"
    upstream = record.upstream
    fields: dict[str, Any] = {
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "request_bytes": record.request_bytes,
        "bytes": record.response_bytes,
        "first_byte_ms": None if record.first_byte is None else _ms(record.first_byte),
        "duration_ms": _ms(record.duration),
        "ended_by": record.ended_by,
        "key": record.key,
        "client": record.client,
        "user_agent": record.user_agent,
        "request_id": record.request_id,
        "upstream_request_id": upstream and upstream.values.get("x-request-id", (None,))[0],
    }
    if code:
        message += f" {code}"
        fields["error"] = code
        fields["reason"] = reason
    log.event(logger, level_of(record, code), message, fields)


def _ms(seconds: float) -> float:
    return int(seconds * 10000) / 10


def level_of(record: RequestRecord, code: str) -> int:
    """`code`: of the failure, or ""."""
    if record.path in POLLED and record.status == 200:
        return logging.DEBUG
    if record.refusal is not None:
        return logging.WARNING if record.status >= 500 else logging.INFO
    # Of a response that began: it was cut, or ended with an error.
    return logging.WARNING if code and record.status < 400 else logging.INFO


def failure_of(record: RequestRecord, decoded: bytes | None = None) -> tuple[str, str]:
    """The code and the reason of a failure; empty if it is none, or the client's."""
    if record.broken is not None:
        return "upstream_broken", f"upstream broke the response off: {record.broken}"
    if record.ended_by == "drain":
        return "drain_timeout", "the response was not complete within XAI_PROXY_DRAIN_TIMEOUT"
    if record.refusal is not None:
        return record.refusal.code, str(record.refusal)
    head, sample = record.upstream, record.sample
    if head is None or sample is None or record.ended_by == "client":
        return "", ""
    if head.status < 400:
        size = upstream_error.LAST_EVENTS
        end = sample.end(size) if decoded is None else decoded[-size:]
        return upstream_error.in_stream(end) or ("", "")
    try:
        text = content.taken(head, sample).decode("utf-8", "replace")
    except content.Unreadable:
        text = ""
    return upstream_error.of(text, head.status)
