"""Which header fields pass, both ways (RFC 9110 section 7.6.1). Pure functions over lists of (name, value)."""

import functools
from collections.abc import Iterable

from xaiproxy.message_head import lower_of

Fields = "list[tuple[str, str]]"

HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"))
# The first row is ours to set, the second is the client's own business, the third says where it sits.
# Expect is answered by us: the body is sent on without waiting for upstream's 100.
NOT_SENT = HOP_BY_HOP | frozenset((
    "authorization", "host", "user-agent", "content-length", "accept-encoding", "expect",
    "x-api-key", "cookie",
    "forwarded"))
PREFIXES_NOT_SENT = ("proxy-", "x-forwarded-")
NOT_PASSED = HOP_BY_HOP | {"set-cookie"}
CODINGS = ("gzip", "deflate", "identity")


def connection_options(fields: "Iterable[tuple[str, str]]") -> "set[str]":
    """The names that Connection makes hop-by-hop for this message."""
    return {option.strip().lower() for name, value in fields if lower_of(name) == "connection"
            for option in value.split(",")}


def to_upstream(fields: Fields, *, host: str, user_agent: str, access_token: str) -> Fields:
    """The fields of the request to upstream, but for the framing of its body."""
    options = connection_options(fields)
    sent = [("Host", host), ("User-Agent", user_agent), ("Authorization", "Bearer " + access_token)]
    accepted = []
    for field in fields:
        lower = lower_of(field[0])
        if lower in options:
            continue
        if _passes(lower):
            sent.append(field)
        elif lower == "accept-encoding":
            accepted.append(field[1])
    if accepted:
        sent.insert(3, ("Accept-Encoding", _reduced(",".join(accepted))))
    return sent


@functools.lru_cache(maxsize=1024)
def _passes(lower: str) -> bool:
    return lower not in NOT_SENT and not lower.startswith(PREFIXES_NOT_SENT)


@functools.lru_cache(maxsize=256)
def _reduced(accept_encoding: str) -> str:
    """Only codings in which we can read an error (an answer itself is never decoded)."""
    kept = [item.strip() for item in accept_encoding.split(",")
            if item.partition(";")[0].strip().lower() in CODINGS]
    return ", ".join(kept) or "identity"


def to_client(fields: Fields, *, length: "int | None") -> Fields:
    """The fields of the answer to the client. `length`: of the body as we read it; None when nobody can say."""
    passed = []
    dropped = NOT_PASSED
    for field in fields:
        if lower_of(field[0]) == "connection":
            dropped = NOT_PASSED | connection_options(fields)
            break
    for field in fields:
        lower = lower_of(field[0])
        if lower in dropped:
            continue
        if lower == "content-length":
            if length is None:
                continue
            field, length = (field[0], str(length)), None  # once, and as we count it
        passed.append(field)
    return passed
