"""oauth/loopback.py over raw sockets: browsers, and other programs that connect to the listener."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from xaiproxy import errors
from xaiproxy.oauth import loopback

STATE = "state-1"
GOOD = f"GET /callback?code=c-1&state={STATE} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
XAI = "https://accounts.x.ai"


class Waiting:
    """A Listener that waits in a thread."""

    def __init__(self, listener: loopback.Listener, **options: Any) -> None:
        self.port = urllib.parse.urlsplit(listener.redirect_uri).port
        self.reported: list[str] = []
        self.outcome: list[Any] = []
        options = {"seconds": 10, "report": self.reported.append, **options}

        def wait() -> None:
            try:
                self.outcome.append(listener.wait(STATE, **options))
            except errors.Error as error:
                self.outcome.append(error)

        self.thread = threading.Thread(target=wait)
        self.thread.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def ask(self, request: str) -> str:
        """The whole response to a request."""
        with self.connect() as connection:
            connection.sendall(request.encode())
            return read(connection)

    def result(self) -> Any:
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.outcome[0]


def read(connection: socket.socket) -> str:
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(65536):
            received += more
    return received.decode()


@pytest.fixture
def listener() -> Iterator[loopback.Listener]:
    with loopback.Listener(0, "https://auth.x.ai") as listener:
        yield listener


@pytest.fixture
def waiting(listener: loopback.Listener) -> Iterator[Waiting]:
    waiting = Waiting(listener)
    yield waiting
    if not waiting.outcome:
        waiting.ask(GOOD)
    waiting.result()


def test_the_redirect_gives_the_code(waiting: Waiting):
    reply = waiting.ask(GOOD)
    assert reply.startswith("HTTP/1.1 200 OK\r\n") and "c-1" not in reply
    assert "You can close this window" in reply
    assert waiting.result() == "c-1" and waiting.reported == []


def test_a_preflight_is_answered_and_does_not_end_the_wait(waiting: Waiting):
    reply = waiting.ask(
        "OPTIONS /callback?code=c-1 HTTP/1.1\r\nHost: 127.0.0.1:56121\r\n"
        f"Origin: {XAI}\r\nAccess-Control-Request-Method: GET\r\n"
        "Access-Control-Request-Private-Network: true\r\n\r\n"
    )
    head, _, body = reply.partition("\r\n\r\n")
    status, *fields = head.split("\r\n")
    assert status == "HTTP/1.1 204 No Content" and body == "" and "Content-Length" not in head
    for field in (
        f"Access-Control-Allow-Origin: {XAI}",
        "Access-Control-Allow-Methods: GET, OPTIONS",
        "Vary: Origin",
        "Access-Control-Allow-Headers: Content-Type",
        "Access-Control-Allow-Private-Network: true",
    ):
        assert field in fields
    reply = waiting.ask(GOOD.replace("\r\n\r\n", f"\r\nOrigin: {XAI}\r\n\r\n"))
    assert f"\r\nAccess-Control-Allow-Origin: {XAI}\r\n" in reply
    assert waiting.result() == "c-1"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "https://accounts.x.ai.evil.example",
        "http://accounts.x.ai",
        "null",
        "https://ACCOUNTS.x.ai",
        "http://127.0.0.1:9191",
    ],
)
def test_no_other_origin_may_read_or_preflight(waiting: Waiting, origin: str):
    reply = waiting.ask(f"OPTIONS /callback HTTP/1.1\r\nOrigin: {origin}\r\n\r\n")
    assert reply.startswith("HTTP/1.1 403 Forbidden\r\n") and "Access-Control" not in reply
    reply = waiting.ask(f"GET /callback?code=x&state=wrong HTTP/1.1\r\nOrigin: {origin}\r\n\r\n")
    assert reply.startswith("HTTP/1.1 400 Bad Request\r\n") and "Access-Control" not in reply


def test_a_loopback_issuers_own_page_may_read_the_response():
    with loopback.Listener(0, "http://127.0.0.1:9191") as listener:
        waiting = Waiting(listener)
        reply = waiting.ask("OPTIONS /callback HTTP/1.1\r\norigin:http://127.0.0.1:9191\r\n\r\n")
        assert reply.startswith("HTTP/1.1 204 ")
        assert "\r\nAccess-Control-Allow-Origin: http://127.0.0.1:9191\r\n" in reply
        waiting.ask(GOOD)
        assert waiting.result() == "c-1"


@pytest.mark.parametrize(
    "request_line, status",
    [
        ("GET /favicon.ico", 404),
        ("GET /", 404),
        ("GET /callback/", 404),
        ("GET //callback?code=c-1&state=state-1", 404),
        ("POST /callback?code=c-1&state=state-1", 405),
        ("HEAD /callback?code=c-1&state=state-1", 405),
        ("GET /callback", 400),
        ("GET /callback?code=c-2&state=other", 400),
        ("GET /callback?code=c-2", 400),
        ("GET /callback?error=access_denied", 400),
        ("GET /callback?state=state-1", 400),
    ],
)
def test_another_request_is_answered_and_does_not_end_the_wait(
    waiting: Waiting, request_line: str, status: int
):
    reply = waiting.ask(f"{request_line} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert reply.startswith(f"HTTP/1.1 {status} ")
    waiting.ask(GOOD)
    assert waiting.result() == "c-1"
    # Only a bad redirect is reported; other requests are not.
    assert len(waiting.reported) == (status == 400)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n",
        b"GET /callback\r\n\r\n",
        b"GET /callback?code=c-1&state=state-1 HTTP/1.1\r\nHalf: ",
        b"x" * 70000,
        b"",
    ],
)
def test_stray_connections_do_not_end_the_wait(waiting: Waiting, nonsense: bytes):
    with waiting.connect() as silent, waiting.connect() as stray, waiting.connect() as rude:
        with contextlib.suppress(ConnectionError):
            stray.sendall(nonsense)
        rude.sendall(b"GET /callback?code")
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close()
        assert waiting.ask(GOOD).startswith("HTTP/1.1 200 ")
        assert waiting.result() == "c-1"
        silent.close()


def test_a_redirect_may_arrive_byte_by_byte(waiting: Waiting):
    with waiting.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in GOOD.encode():
            connection.sendall(bytes([byte]))
        assert read(connection).startswith("HTTP/1.1 200 ")
    assert waiting.result() == "c-1"


def test_many_silent_connections_do_not_block_the_redirect(waiting: Waiting):
    with contextlib.ExitStack() as stack:
        many = [
            stack.enter_context(waiting.connect()) for _ in range(3 * loopback.CONNECTION_LIMIT)
        ]
        assert waiting.ask(GOOD).startswith("HTTP/1.1 200 ")
        # The oldest connection was closed to make room.
        assert read(many[0]) == ""
    assert waiting.result() == "c-1"


def test_a_silent_connection_is_closed_after_a_timeout():
    with loopback.Listener(0, "https://auth.x.ai", request_timeout=0.1) as listener:
        waiting = Waiting(listener)
        with waiting.connect() as silent:
            assert silent.recv(1) == b""
        waiting.ask(GOOD)
        waiting.result()


def test_a_denied_redirect_is_access_denied(waiting: Waiting):
    reply = waiting.ask(
        "GET /callback?error=access_denied&error_description=User+denied&state=state-1 "
        "HTTP/1.1\r\n\r\n"
    )
    assert reply.startswith("HTTP/1.1 200 ") and "denied" in reply
    assert isinstance(waiting.result(), errors.AccessDenied)


def test_a_taken_port_is_replaced():
    with loopback.Listener(0, "https://auth.x.ai") as first:
        port = urllib.parse.urlsplit(first.redirect_uri).port
        with loopback.Listener(port, "https://auth.x.ai") as second:
            assert second.redirect_uri != first.redirect_uri
    with loopback.Listener(port, "https://auth.x.ai") as third:
        assert third.redirect_uri == f"http://127.0.0.1:{port}/callback"


def test_the_wait_ends_with_expired_token(listener: loopback.Listener):
    waiting = Waiting(listener, seconds=0.2)
    assert isinstance(
        waiting.result(), errors.ExpiredToken
    ) and "the login was not approved in time" in str(waiting.result())


def test_a_pasted_address_gives_the_code(listener: loopback.Listener):
    theirs, ours = os.openpty()
    with open(theirs, "wb", 0) as keyboard, open(ours, "rb", 0):
        waiting = Waiting(listener, paste_from=ours)
        keyboard.write(b"http://127.0.0.1:1/callback?state=state-1\n")
        keyboard.write(b"\nhttp://127.0.0.1:1/callback?code=")
        waiting.ask("GET /favicon.ico HTTP/1.1\r\n\r\n")
        keyboard.write(b"c-2&state=state-1\n")
        assert waiting.result() == "c-2"
        assert len(waiting.reported) == 1 and "no 'code' parameter" in waiting.reported[0]


ADDRESS = f"http://127.0.0.1:1/callback?code=code-0002&state={STATE}"


@pytest.mark.parametrize(
    "lines, complaints",
    [
        # An address that a narrow window, an e-mail or another program has split into lines.
        *(([ADDRESS[:at], ADDRESS[at:]], 1) for at in range(len("http://"), len(ADDRESS))),
        ([ADDRESS[at : at + 9] for at in range(0, len(ADDRESS), 9)], 6),
        ([f"'{ADDRESS[:40]}\r", f"    {ADDRESS[40:]}'\r"], 1),
        # Bracketed paste, whole and broken.
        ([f"\x1b[200~{ADDRESS}\x1b[201~"], 0),
        ([f"\x1b[200~{ADDRESS[:40]}", f"{ADDRESS[40:]}\x1b[201~"], 1),
        (["\x1b[200~code-0002\x1b[201~"], 0),
        # An incomplete address, and then something else.
        ([ADDRESS[:40], ADDRESS], 1),
        ([ADDRESS[:40], "", "code-0002"], 1),
        (["ls", "what now?", "code-0002"], 2),
        ([ADDRESS.replace("state-1", "other"), "code-0002"], 1),
        (["http://" + "x" * 3000] + ["y" * 3000] * 9 + [ADDRESS], 10),
    ],
)
def test_pasted_lines_are_joined_or_reported(
    listener: loopback.Listener, lines: list[str], complaints: int
):
    theirs, ours = os.pipe()
    with open(theirs, "rb", 0), open(ours, "wb", 0) as keyboard:
        reported: list[str] = []
        keyboard.write("".join(f"{line}\n" for line in lines).encode())
        assert (
            listener.wait(STATE, seconds=5, paste_from=theirs, report=reported.append)
            == "code-0002"
        )
        assert len(reported) == complaints, reported


def test_a_refused_code_may_be_followed_by_another_wait(listener: loopback.Listener):
    """The caller waits once more, whether the keyboard has been closed or not."""
    theirs, ours = os.openpty()
    with open(theirs, "wb", 0) as keyboard, open(ours, "rb", 0):
        for line, code in (("continue", "continue"), (ADDRESS, "code-0002"), (ADDRESS[:-3], None)):
            keyboard.write(line.encode() + b"\n")
            waiting = Waiting(listener, paste_from=ours, seconds=5 if code else 0.2)
            assert waiting.result() == code or (
                not code and isinstance(waiting.result(), errors.ExpiredToken)
            )
        keyboard.write(b"\x04")
        for _ in range(2):
            waiting = Waiting(listener, paste_from=ours)
            waiting.ask(GOOD)
            assert waiting.result() == "c-1"


def test_a_redirect_with_many_cookies_gives_the_code(waiting: Waiting):
    """A browser sends the cookies of every program on 127.0.0.1, on any port."""
    cookies = "".join(f"Cookie: c{n}={'x' * 4000}\r\n" for n in range(15))
    reply = waiting.ask(GOOD.replace("\r\n\r\n", f"\r\n{cookies}\r\n"))
    assert (
        reply.startswith("HTTP/1.1 200 ") and waiting.result() == "c-1" and waiting.reported == []
    )


def test_a_request_with_too_many_cookies_gets_431_with_advice(waiting: Waiting):
    cookies = "".join(f"Cookie: c{n}={'x' * 4000}\r\n" for n in range(100))
    with waiting.connect() as connection:
        connection.sendall(GOOD.replace("\r\n\r\n", f"\r\n{cookies}\r\n").encode())
        received = b""
        # recv raises after a reset.
        while more := connection.recv(65536):
            received += more
    assert received.startswith(b"HTTP/1.1 431 ") and b"paste it into the terminal" in received
    waiting.ask(GOOD)
    assert waiting.result() == "c-1"
    assert len(waiting.reported) == 1 and "most probably because of cookies" in waiting.reported[0]


def test_the_redirect_may_come_after_the_keyboard_has_closed(listener: loopback.Listener):
    theirs, ours = os.openpty()
    with open(theirs, "wb", 0) as keyboard, open(ours, "rb", 0):
        waiting = Waiting(listener, paste_from=ours)
        # Ctrl-D.
        keyboard.write(b"\x04")
        waiting.ask(GOOD)
        assert waiting.result() == "c-1"


def test_a_hung_up_keyboard_is_not_read_in_a_loop(listener: loopback.Listener):
    gone, other_side = os.pipe()
    os.close(other_side)
    before = time.thread_time()
    with open(gone, "rb"), pytest.raises(errors.ExpiredToken):
        listener.wait(STATE, seconds=0.4, paste_from=gone)
    assert time.thread_time() - before < 0.2
