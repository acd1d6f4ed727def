"""The agents of many proxies: short requests and long streams, at a slow pace."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time

from .login import get

# Seconds from one request of a client to its next.
PACE = 1.0
# Requests of a client up to a stream, and the events of that, one a second.
REQUESTS, EVENTS = 20, 12

# When, and what became of a request.
Outcome = tuple[float, str]


class Agent(threading.Thread):
    """The agent of one proxy: short requests and long streams. `failed`: those not served."""

    def __init__(self, port: int, enough: threading.Event):
        super().__init__(daemon=True)
        self.port = port
        self.requests = self.streams = 0
        self.slowest = 0.0
        self.failed: list[Outcome] = []
        self._enough = enough

    def run(self) -> None:
        self._enough.wait(random.uniform(0, PACE))
        for number in range(random.randrange(REQUESTS), 1 << 30):
            if self._enough.wait(PACE):
                return
            if number % REQUESTS:
                self._request()
            else:
                self._stream()

    def _request(self) -> None:
        began = time.monotonic()
        status, body = get(self.port, "/v1/models")
        self.requests += 1
        self.slowest = max(self.slowest, time.monotonic() - began)
        if status != "200":
            self.failed.append((time.monotonic(), f"{status} {body[:200]}"))

    def _stream(self) -> None:
        self.streams += 1
        status, body = stream(self.port)
        if status != "200" or not body.endswith(b"data: [DONE]\n\n"):
            self.failed.append((time.monotonic(), f"{status} for a stream, {body[:200]!r}"))


def stream(port: int) -> tuple[str, bytes]:
    """The status, or the name of the exception, and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        try:
            body = json.dumps({"model": "grok-4.5", "messages": [], "stream": True})
            fields = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, fields)
            answer = connection.getresponse()
            return str(answer.status), answer.read()
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, b""
