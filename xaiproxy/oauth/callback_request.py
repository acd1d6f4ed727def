"""A request to the loopback listener: its head, as far as it has arrived, and the response."""

import contextlib
import dataclasses
import html
import http
import re
import socket

# Bytes of a request head. Browsers include the cookies of all other servers on 127.0.0.1.
HEAD_LIMIT = 65536
REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r?\n((?:.*\n)*?)\r?\n")
ORIGIN = re.compile(rb"^origin:[ \t]*(\S+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


@dataclasses.dataclass
class CallbackRequest:
    socket: socket.socket
    end: float
    head: bytearray = dataclasses.field(default_factory=bytearray)
    refused: bool = False

    def add(self, received: bytes) -> bool:
        """Returns whether the head is complete."""
        begin = max(0, len(self.head) - 2)
        self.head += received
        return self.head.find(b"\n\r\n", begin) >= 0 or self.head.find(b"\n\n", begin) >= 0


def respond(connection: socket.socket, status: int, text: str, origin: str | None = None) -> None:
    body = (
        ""
        if status == 204
        else (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>xaiproxy</title>'
            '<body style="font-family: sans-serif; margin: 4em"><h1>xaiproxy</h1>'
            f"<p>{html.escape(text)}</p></body></html>\n"
        )
    )
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "Connection: close",
        "Cache-Control: no-store",
        "Vary: Origin",
        "Referrer-Policy: no-referrer",
    ]
    if body:
        lines += ["Content-Type: text/html; charset=utf-8", f"Content-Length: {len(body.encode())}"]
    if origin:
        lines += [
            f"Access-Control-Allow-Origin: {origin}",
            "Access-Control-Allow-Methods: GET, OPTIONS",
            "Access-Control-Allow-Headers: Content-Type",
            "Access-Control-Allow-Private-Network: true",
        ]
    # The client may be gone; its request counts all the same.
    with contextlib.suppress(OSError):
        # Shorter than any socket's buffer.
        connection.send("\r\n".join([*lines, "", body]).encode())
        connection.shutdown(socket.SHUT_WR)
