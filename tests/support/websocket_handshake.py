"""A WebSocket handshake through the proxy, by hand: RFC 6455 section 4."""

from __future__ import annotations

from proxy_process import Client
from scripted_upstream import Request, ScriptedUpstream

HANDSHAKE = (
    "Connection: keep-alive, Upgrade",
    "upgrade: WebSocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol: realtime, other",
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
)
LINES = (
    b"Upgrade: websocket",
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    b"Sec-WebSocket-Protocol: realtime",
    b"Sec-WebSocket-Extensions: permessage-deflate",
)
ACCEPTED = b"\r\n".join(
    [b"HTTP/1.1 101 Switching Protocols", b"Connection: upgrade", *LINES, b"", b""]
)


def handshake(client: Client, upstream: ScriptedUpstream, target: str = "/v1/realtime") -> Request:
    client.request("GET", target, *HANDSHAKE)
    request = upstream.receive().answer(ACCEPTED)
    assert client.head().status == 101
    return request
