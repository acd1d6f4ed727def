"""An upstream that records every request and answers it at once with its method and target.

It is stricter than any server: every byte that the proxy must not write is a fault.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
from typing import NamedTuple

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD = re.compile(
    rb"(%b) (/v[12]/[!-~]*) HTTP/1\.1\r\n((?:%b: [\t -~\x80-\xff]*\r\n)*)\r\n" % (TOKEN, TOKEN)
)
LENGTH = re.compile("0|[1-9][0-9]*")
CHUNK = re.compile(rb"([1-9a-f][0-9a-f]*)\r\n")
LAST = b"0\r\n\r\n"
OURS = ("host", "user-agent", "authorization", "content-length", "transfer-encoding", "via")
VIA = re.compile("1[.]1 xaiproxy-[0-9a-f]{16}(, 1[.]1 xaiproxy-[0-9a-f]{16})*")
# Fields that never pass: about the client's connection, its identity, its route to the proxy, or
# the framing of the message.
NEVER = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "cookie",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "forwarded",
    "cdn-loop",
    "fastly-client-ip",
    "fly-client-ip",
    "referer",
    "true-client-ip",
    "x-amzn-trace-id",
    "x-azure-clientip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-real-ip",
}
NEVER_BEGINS = (
    "cf-",
    "proxy-",
    "remote-",
    "tailscale-user-",
    "x-amzn-oidc-",
    "x-auth-request-",
    "x-envoy-",
    "x-forwarded-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "x-original-",
    "x-remote-",
)
HANDSHAKE = (("Connection", "Upgrade"), ("Upgrade", "websocket"))


class Seen(NamedTuple):
    """A complete request. `fields`: those that the proxy does not set itself, and HANDSHAKE."""

    method: str
    target: str
    body: bytes = b""
    fields: tuple[tuple[str, str], ...] = ()


class Fault(Exception):
    pass


class RecordingUpstream:
    """Records requests.

    `requests`: complete ones, in the order of their last bytes. `faults`: everything else that
    arrived, and what is wrong with it. In each turn the upstream reads everything that has arrived
    before it answers. A response therefore proves that its request, and every request sent before,
    is recorded.
    """

    def __init__(self, token: str = "the-token"):
        self.requests: list[Seen] = []
        self.faults: list[str] = []
        # In bytes, including those of incomplete requests.
        self.received = 0
        self._authorization = f"Bearer {token}"
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.authority = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.origin = f"http://{self.authority}"
        self._unread: dict[socket.socket, bytes] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> RecordingUpstream:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        # This wakes poll(), and accept() fails.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in (self._listener, *self._unread):
            sock.close()

    def taken(self) -> list[Seen]:
        """Return the requests since the last call. Fails if anything else arrived."""
        requests, faults, self.requests, self.faults = self.requests, self.faults, [], []
        assert not faults, faults
        return requests

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while True:
            poll.poll()
            try:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _ = self._listener.accept()
                        sock.setblocking(False)
                        poll.register(sock, select.POLLIN)
                        self._unread[sock] = b""
            except OSError:
                return
            ended = [sock for sock in self._unread if not self._read(sock)]
            for sock, answers in [(sock, self._answers(sock)) for sock in self._unread]:
                with contextlib.suppress(OSError):
                    sock.sendall(answers)
            for sock in ended:
                poll.unregister(sock)
                del self._unread[sock]
                sock.close()

    def _read(self, sock: socket.socket) -> bool:
        """Read all bytes that have arrived. Return False at EOF."""
        try:
            while data := sock.recv(1 << 20):
                self.received += len(data)
                self._unread[sock] += data
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _answers(self, sock: socket.socket) -> bytes:
        answers = b""
        try:
            while end := self._request(self._unread[sock]):
                self._unread[sock] = self._unread[sock][end:]
                seen = self.requests[-1]
                text = f"{seen.method} {seen.target}".encode()
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text)
                answers += head + (b"" if seen.method == "HEAD" else text)
        except Fault as fault:
            self.faults.append(f"{fault}: {self._unread[sock][:2000]!r}")
            self._unread[sock] = b""
        return answers

    def _request(self, data: bytes) -> int:
        """Record the first request in `data`. Return its end, or 0 if it is incomplete."""
        match = HEAD.match(data)
        if match is None:
            if b"\r\n\r\n" in data or re.search(rb"(?<!\r)\n|\r(?!\n|$)", data):
                raise Fault("not a request")
            return 0
        method, target, lines = (part.decode("latin-1") for part in match.groups())
        fields = [tuple(line.split(": ", 1)) for line in lines.split("\r\n")[:-1]]
        values: dict[str, list[str]] = {}
        for name, value in fields:
            values.setdefault(name.lower(), []).append(value)
        others = tuple(field for field in fields if field[0].lower() not in OURS)
        body, end = _body(data, match.end(), values)
        if end:
            self._check(method, values, others, body)
            self.requests.append(Seen(method, target, body, others))
        return end

    def _check(
        self,
        method: str,
        values: dict[str, list[str]],
        others: tuple[tuple[str, str], ...],
        body: bytes,
    ) -> None:
        if values.get("host") != [self.authority] or values.get("authorization") != [
            self._authorization
        ]:
            raise Fault("not exactly the proxy's Host and token")
        if len(values.get("user-agent", ())) != 1:
            raise Fault("not exactly one User-Agent")
        if len(values.get("via", ())) != 1 or not VIA.fullmatch(values["via"][0]):
            raise Fault("not exactly one Via, of xaiproxy alone")
        names = {name.lower() for name, _ in others if (name, _) not in HANDSHAKE}
        is_handshake = bool({("Upgrade", "websocket"), ("Connection", "Upgrade")} & {*others})
        if is_handshake and (others[-2:] != HANDSHAKE or method != "GET" or body):
            raise Fault("half a handshake, or one with a body")
        for name in names | {name.replace("_", "-") for name in names if "_" in name}:
            if name in NEVER or name in OURS or name.startswith(NEVER_BEGINS):
                raise Fault(f"{name} must not pass")


def _body(data: bytes, at: int, values: dict[str, list[str]]) -> tuple[bytes, int]:
    """Return the body that begins at `at`, and its end, or 0 if it is incomplete."""
    lengths, codings = values.get("content-length", []), values.get("transfer-encoding", [])
    if len(lengths) + len(codings) > 1 or codings not in ([], ["chunked"]):
        raise Fault("the end of the body is ambiguous")
    if not codings:
        if lengths and not LENGTH.fullmatch(lengths[0]):
            raise Fault("not a length")
        end = at + int(lengths[0] if lengths else "0")
        return data[at:end], end if len(data) >= end else 0
    body = b""
    while not data.startswith(LAST, at):
        match = CHUNK.match(data, at)
        if match is None:
            if b"\r\n" in data[at : at + 100] and not LAST.startswith(data[at:]):
                raise Fault("not a chunk")
            return b"", 0
        start, at = match.end(), match.end() + int(match[1], 16) + 2
        if len(data) < at:
            return b"", 0
        if data[at - 2 : at] != b"\r\n":
            raise Fault("not the end of a chunk")
        body += data[start : at - 2]
    return body, at + len(LAST)
