"""What the sandbox saw: counters, and the last requests as they came. Never a token: their SHA-256."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from xaiproxy.sandbox.server import ClientGone, Cut, Handler

COUNTERS = {
    "malformed": "requests that are no HTTP, or that two servers could read differently; counted only here",
    "requests": "requests, those to /_sandbox excepted",
    "connections": "connections that brought them",
    "token_requests": "requests to the token endpoint that were handled",
    "logins": "families begun",
    "authorizations": "consents given in a browser",
    "code_exchanges": "authorization codes exchanged",
    "device_requests": "device codes given out",
    "device_polls": "polls for them",
    "slow_downs": "polls told to slow down",
    "refreshes": "refresh tokens spent",
    "reuses": "former refresh tokens presented again",
    "revoked_families": "logins that ended so, or by revocation",
    "revocations": "revocation requests",
    "refused_tokens": "requests to the API refused for their token",
    "streams": "streamed answers begun",
    "open_streams": "streamed answers under way",
    "cancelled_streams": "streamed answers whose client left before the end",
    "websockets": "WebSockets opened",
    "open_websockets": "WebSockets that are open",
    "cancelled_websockets": "WebSockets whose client left without closing them",
    "cancelled_requests": "requests whose client left before the answer's head",
}
SECRET = {"authorization", "proxy-authorization", "x-api-key", "cookie"}
KEPT = 1000  # requests


class Witness:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again; a stream still open goes on counting in the former counters, which nobody reads."""
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.requests: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)
        self._connections: set[int] = set()

    def count(self, name: str) -> None:
        self.counters[name] += 1

    @contextlib.contextmanager
    def open(self, what: str) -> Iterator[None]:
        """Count one of these as begun, then as open, and at an end that the sandbox did not bring as cancelled."""
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
        """Record a request's head; the record grows as its body comes and its answer goes."""
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
        """Read the whole body; its length so far can be seen meanwhile. Raises ClientGone."""
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
    """A secret's SHA-256 in its place, with the scheme, if any, kept."""
    if name.lower() == "sec-websocket-protocol":
        return re.sub(r"(?<=xai-client-secret\.)[^, ]+", lambda found: _digest(found[0]), value)
    if name.lower() not in SECRET:
        return value
    scheme, space, secret = value.rpartition(" ")
    return scheme + space + _digest(secret)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("latin-1")).hexdigest()
