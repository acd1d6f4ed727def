"""Whether an answer of the API says that the access token is dead."""

import zlib

from xaiproxy import tokens
from xaiproxy.http1.exchange import PEEK_LIMIT, Exchange


def is_refused_token(exchange: Exchange) -> bool:
    """Whether the answer says that the access token is dead: xAI does so with 403, whose other causes are not ours."""
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
    for window in (
        47,
        -15,
    ):  # gzip or zlib, told by their headers; raw deflate, which some servers send
        try:
            return zlib.decompressobj(window).decompress(data, PEEK_LIMIT)
        except zlib.error:
            continue
    return data
