"""Which header fields pass, both ways (RFC 9110 section 7.6.1). Pure functions over lists of (name, value)."""

import re
from collections.abc import Iterable

from xaiproxy import errors

Fields = "list[tuple[str, str]]"

HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"))
# The first row is ours to set, the second is the client's own business, the third says where it sits.
# Expect is answered by us: the body is sent on without waiting for upstream's 100.
NOT_SENT = HOP_BY_HOP | frozenset((
    "authorization", "host", "user-agent", "content-length", "accept-encoding", "expect",
    "x-api-key", "cookie",
    "forwarded"))
PREFIXES_NOT_SENT = ("proxy-", "x-forwarded-")
CODINGS = ("gzip", "deflate", "identity")
NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
VALUE = re.compile(r"[\t -~\x80-\xff]*")


def connection_options(fields: "Iterable[tuple[str, str]]") -> "set[str]":
    """The names that Connection makes hop-by-hop for this message."""
    return {option.strip().lower() for name, value in fields if name.lower() == "connection"
            for option in value.split(",")}


def to_upstream(fields: Fields, *, host: str, user_agent: str, access_token: str) -> Fields:
    """The fields of the request to upstream, but for the framing of its body."""
    options = connection_options(fields)
    fields = [(name, value) for name, value in fields if name.lower() not in options]
    sent = [("Host", host), ("User-Agent", user_agent), ("Authorization", "Bearer " + access_token)]
    accepted = [value for name, value in fields if name.lower() == "accept-encoding"]
    if accepted:
        sent.append(("Accept-Encoding", _reduced(",".join(accepted))))
    for name, value in fields:
        lower = name.lower()
        if lower not in NOT_SENT and not lower.startswith(PREFIXES_NOT_SENT):
            sent.append((name, value))
    return sent


def _reduced(accept_encoding: str) -> str:
    """Only codings in which we can read an error (an answer itself is never decoded)."""
    kept = [item.strip() for item in accept_encoding.split(",")
            if item.partition(";")[0].strip().lower() in CODINGS]
    return ", ".join(kept) or "identity"


def to_client(fields: Fields, *, length: "int | None") -> Fields:
    """The fields of the answer to the client. `length`: of the body as we read it; None when nobody can say.

    Raises UpstreamUnreachable when upstream's fields could be read in two ways.
    """
    dropped = HOP_BY_HOP | connection_options(fields) | {"set-cookie"}
    passed: "list[tuple[str, str]]" = []
    for name, value in fields:
        lower = name.lower()
        if lower in dropped:
            continue
        if lower == "content-length":
            if length is None:
                continue
            value, length = str(length), None  # once, and as we count it
        value = re.sub(r"\r?\n[ \t]+", " ", value)  # RFC 9112 section 5.2: a folded line becomes a space
        if not NAME.fullmatch(name) or not VALUE.fullmatch(value):
            raise errors.UpstreamUnreachable("upstream sent a malformed header; try again, and report it if it stays")
        passed.append((name, value))
    return passed
