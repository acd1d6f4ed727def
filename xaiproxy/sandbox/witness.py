"""Counters, and a record of the last requests, with the SHA-256 of tokens in their place."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from xaiproxy.sandbox.server import ClientGone, Cut, Handler

COUNTERS = {
    "malformed": "invalid or ambiguous requests, which count nowhere else",
    "requests": "requests, except those to /_sandbox",
    "connections": "connections with such requests",
    "token_requests": "requests to the token endpoint that were handled",
    "logins": "families begun",
    "authorizations": "consents given in a browser",
    "code_exchanges": "authorization codes exchanged",
    "device_requests": "device codes issued",
    "device_polls": "polls for them",
    "slow_downs": "polls answered with slow_down",
    "refreshes": "refresh tokens spent",
    "reuses": "former refresh tokens presented again",
    "revoked_families": "logins that ended because of these, or by revocation",
    "revocations": "revocation requests",
    "refused_tokens": "requests to the API refused because of their token",
    "streams": "streamed responses begun",
    "open_streams": "streamed responses in progress",
    "cancelled_streams": "streamed responses whose client closed before the end",
    "websockets": "WebSockets opened",
    "open_websockets": "WebSockets that are open",
    "cancelled_websockets": "WebSockets whose connection ended without a Close frame",
    "cancelled_requests": "requests whose client closed before the response's head",
}
SECRET = {"authorization", "proxy-authorization", "x-api-key", "cookie"}
KEPT = 1000  # requests


class Witness:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset all; streams that are still open count in the former counters."""
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.requests: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)
        self._connections: set[int] = set()

    def count(self, name: str) -> None:
        self.counters[name] += 1

    @contextlib.contextmanager
    def open(self, what: str) -> Iterator[None]:
        """Count one as begun, as open meanwhile, and as cancelled if an exception ends it.

        Not if that is Cut, which is the sandbox's own doing.
        """
        counters = self.counters
        counters[what] += 1
        counters[f"open_{what}"] += 1
        try:
            yield
        except Cut:
            raise
        except BaseException:
            counters[f"cancelled_{what}"] += 1
            raise
        finally:
            counters[f"open_{what}"] -= 1

    def begin(self, handler: Handler) -> dict[str, Any]:
        """Record a request's head; length of the body and status are added later."""
        self.count("requests")
        if handler.connection not in self._connections:
            self._connections.add(handler.connection)
            self.count("connections")
        record = {
            "connection": handler.connection,
            "method": handler.command,
            "target": handler.path,
            "version": handler.request_version,
            "at": handler.time_start,
            "headers": [[name, _hidden(name, value)] for name, value in handler.header_list()],
            "body_length": 0,
            "body_sha256": None,
            "status": None,
        }
        self.requests.append(record)
        return record

    def read_body(self, handler: Handler, record: dict[str, Any]) -> bytes:
        """Read the whole body and record its length meanwhile. Raises ClientGone."""
        digest, parts = hashlib.sha256(), []
        try:
            while part := handler.wsgi_input.read(16384):
                digest.update(part)
                parts.append(part)
                record["body_length"] += len(part)
        except OSError as error:
            raise ClientGone from error
        record["body_sha256"] = digest.hexdigest()
        return b"".join(parts)


def _hidden(name: str, value: str) -> str:
    """The value with the SHA-256 of a secret in its place; a scheme before it stays."""
    if name.lower() == "sec-websocket-protocol":
        return re.sub(r"(?<=xai-client-secret\.)[^, ]+", lambda found: _digest(found[0]), value)
    if name.lower() not in SECRET:
        return value
    scheme, space, secret = value.rpartition(" ")
    return scheme + space + _digest(secret)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("latin-1")).hexdigest()
