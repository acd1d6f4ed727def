"""Exchanges with a scripted upstream, in this process."""

import concurrent.futures

from request_bodies import whole_body
from scripted_upstream import Request, ScriptedUpstream

from xaiproxy.http1 import exchange
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.pool import Pool


def perform(
    pool: Pool,
    scripted: ScriptedUpstream,
    answer: bytes | None = None,
    *,
    begin: str = "GET /v1/x HTTP/1.1\r\nHost: x\r\n",
    body: bytes = b"",
    upgrade: bool = False,
) -> tuple[Request, Exchange]:
    """Send a request, and answer it with `answer` or ScriptedUpstream's default."""
    method = begin.partition(" ")[0]
    request = exchange.Request(begin.encode(), whole_body(body), method, False, upgrade)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        arguments = () if answer is None else (answer,)
        received = threads.submit(lambda: scripted.receive().answer(*arguments))
        done = exchange.perform(pool, request)
        return received.result(), done
