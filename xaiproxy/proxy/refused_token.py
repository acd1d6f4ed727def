"""Whether a response of the API means that the access token is no longer valid."""

from __future__ import annotations

import zlib

from xaiproxy import tokens
from xaiproxy.http1.exchange import PEEK_LIMIT, Exchange


def is_refused_token(exchange: Exchange) -> bool:
    """xAI answers an invalid token with 403, which it also uses for other causes."""
    if exchange.head.status == 401:
        return True
    if exchange.head.status != 403:
        return False
    codings = [value.lower() for value in exchange.head.values.get("content-encoding", ())]
    return tokens.is_refusal(_decoded(exchange.peek(), codings))


def _decoded(data: bytes, codings: list[str]) -> bytes:
    """As much as can be decoded of what may be only the beginning of a body."""
    if not codings or codings == ["identity"]:
        return data
    # gzip or zlib, which have headers; raw deflate, which some servers send.
    for window in (47, -15):
        try:
            return zlib.decompressobj(window).decompress(data, PEEK_LIMIT)
        except zlib.error:
            continue
    return data
