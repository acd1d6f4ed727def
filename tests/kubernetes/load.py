"""Clients of the proxy in a pod: what became of their requests."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

CHAT: dict[str, object] = {"model": "grok-4.5", "messages": [{"role": "user", "content": "Count."}]}
TIMEOUT = 60  # seconds
# Seconds between two requests of a client.
PAUSE = 0.01


def fields(key: str) -> dict[str, str]:
    """The header fields of a client key, or none."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def get(port: int, path: str, key: str = "") -> tuple[int, bytes]:
    """Send a request on a connection of its own. Return the status and the body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as one:
        one.request("GET", path, headers=fields(key))
        answer = one.getresponse()
        return answer.status, answer.read()


def ask(port: int, path: str = "/v1/models", key: str = "") -> int:
    return get(port, path, key)[0]


def post(port: int, path: str, body: dict[str, object]) -> tuple[int, bytes]:
    """Return the status and the body of the response."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as one:
        one.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = one.getresponse()
        return answer.status, answer.read()


class Newcomers:
    """Clients that open connection after connection, each for one request, until `enough`.

    `outcomes`: number of requests by outcome: ok, refused, cut, or a status
    """

    def __init__(self, port: int, clients: int, key: str = "", pause: float = PAUSE):
        self._port = port
        self._key = key
        self._pause = pause
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._enough.is_set():
            self.outcomes[self._outcome()] += 1
            time.sleep(self._pause)

    def _outcome(self) -> str:
        try:
            status = ask(self._port, key=self._key)
        except ConnectionRefusedError:
            return "refused"
        except (OSError, http.client.HTTPException):
            return "cut"
        return "ok" if status == 200 else str(status)

    def end(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()


class Streams:
    """Open streams, read by one thread each. `complete`: the number that came to their end."""

    def __init__(self, port: int, number: int, key: str = ""):
        self._port = port
        self._fields = {"Content-Type": "application/json", **fields(key)}
        self.begun = 0
        self.complete = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        body = json.dumps({**CHAT, "stream": True})
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        ) as one:
            one.request("POST", "/v1/chat/completions", body, self._fields)
            answer = one.getresponse()
            if answer.status != 200:
                return
            start = answer.read1()
            with self._lock:
                self.begun += 1
            with contextlib.suppress(http.client.HTTPException, OSError):
                if (start + answer.read()).endswith(b"data: [DONE]\n\n"):
                    with self._lock:
                        self.complete += 1

    def end(self) -> None:
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def together(number: int, each: Callable[[], object]) -> Iterator[None]:
    """Call a function in so many threads, which have ended on exit."""
    threads = [threading.Thread(target=each, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def free_ports() -> tuple[int, int]:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        return one.getsockname()[1], other.getsockname()[1]
