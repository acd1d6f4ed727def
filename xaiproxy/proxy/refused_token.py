"""Whether a response of the API means that the access token is no longer valid."""

from __future__ import annotations

from xaiproxy import tokens
from xaiproxy.http1 import response_head
from xaiproxy.http1.exchange import Exchange
from xaiproxy.proxy import content


def is_refused_token(exchange: Exchange, of_xai: bool) -> bool:
    """Whether it is RFC 6750's 401, or xAI's 403, which xAI also sends for other causes.

    `of_xai`: whether upstream is xAI's API; a similar 403 of another API has an unknown cause.
    """
    if exchange.head.status == 401:
        return True
    if exchange.head.status != 403 or not of_xai:
        return False
    return tokens.is_refusal(_decoded(exchange.head, exchange.peek()))


def _decoded(head: response_head.Head, data: bytes) -> bytes:
    """As much as can be decoded of what may be only the beginning of a body."""
    if not content.codings(head):
        return data
    try:
        return content.inflated(data).take()
    except content.Unreadable:
        return data
