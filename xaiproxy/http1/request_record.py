"""What is known of a request once it has ended: for the log, metrics and traces."""

from __future__ import annotations

from typing import Any, NamedTuple

from xaiproxy import errors
from xaiproxy.http1 import response_head
from xaiproxy.http1.sample import Sample

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before a response


class RequestRecord(NamedTuple):
    """`method` and `path` are "-" if no valid head came. Times are in seconds.

    `started_at`: when the head was complete, in unix time.
    `status`: as sent, or CLIENT_CLOSED_REQUEST.
    `request_bytes`, `response_bytes`: of the bodies, without their framing.
    `first_byte`: until the first byte of the response was sent, or None.
    `overhead`: the proxy's own share of `first_byte`, or None without a single exchange with
    upstream.
    `ended_by`: done, client, upstream, proxy or drain.
    `key`: the name of the client key, or None. `client`: the IP address.
    `request_id`: the client's X-Request-Id, or one made by the proxy.
    `upstream`: the head of upstream's response that was forwarded.
    `refusal`: the proxy's own response. `broken`: why the response was cut by upstream.
    `token_refused`: replayed or passed_on if upstream refused the access token, else "".
    `sample`: content of the response, if it was kept.
    `span`: what traces have begun for the request, or None.
    """

    method: str
    path: str
    started_at: float
    status: int
    request_bytes: int
    response_bytes: int
    first_byte: float | None
    duration: float
    overhead: float | None
    ended_by: str
    key: str | None
    client: str
    user_agent: str
    request_id: str
    upstream: response_head.Head | None
    refusal: errors.ErrorResponse | None
    broken: errors.UpstreamBroken | None
    token_refused: str
    sample: Sample | None
    span: Any = None
