"""Via (RFC 9110 section 7.6.3): loops of proxies are detected; xAI's servers get no Via."""

from __future__ import annotations

import pathlib
import re
import socket
from collections.abc import Iterator

import pytest
from proxy_process import ProxyProcess
from scripted_server import ScriptedServer, answer, read_request
from scripted_upstream import ScriptedUpstream, make_certificate

MEMBER = "1.1 xaiproxy-[0-9a-f]{16}"
SLOTS = 6


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module", params=[2, 3])
def ring(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ProxyProcess]]:
    """Proxies whose upstream is the next one, and the first one for the last."""
    ports = [free_port() for _ in range(request.param)]
    proxies = []
    for number, port in enumerate(ports):
        upstream = f"http://127.0.0.1:{ports[(number + 1) % len(ports)]}"
        proxies.append(
            ProxyProcess(
                tmp_path_factory.mktemp("proxy"),
                port=port,
                upstream=upstream,
                max_connections=SLOTS,
            )
        )
        proxies[-1].sign_in()
    yield proxies
    for proxy in proxies:
        proxy.terminate()
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize(
    "method, fields",
    [
        ("GET", ()),
        ("POST", ("Via: 1.0 fred, 1.1 nginx",)),
        ("GET", ("Connection: via, close",)),
        ("GET", ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")),
    ],
    ids=["GET", "POST", "Connection names Via", "WebSocket"],
)
def test_a_loop_is_508_at_once_and_occupies_no_slot(
    ring: list[ProxyProcess], method: str, fields: tuple[str, ...]
) -> None:
    start = len(ring[0].log_lines())
    # A slot that a proxy leaked would be missing in the end.
    for _ in range(2 * SLOTS):
        looped = ring[0].ask(method, "/v1/loop", *fields, body=b"{}" if method == "POST" else b"")
        assert looped.status == 508 and b'"loop_detected"' in looped.body
        assert looped.value("x-should-retry") == "false"
    ring[0].wait_for_log(lambda line: line.get("path") == "/v1/loop", start=start)
    assert {
        line["status"] for line in ring[0].log_lines()[start:] if line.get("path") == "/v1/loop"
    } == {508}


def test_a_chain_of_two_proxies_is_no_loop(tmp_path: pathlib.Path) -> None:
    with ScriptedUpstream() as upstream, ProxyProcess(tmp_path, upstream=upstream.origin) as inner:
        inner.sign_in("inner")
        (tmp_path / "outer").mkdir()
        with ProxyProcess(tmp_path / "outer", upstream=inner.url) as outer:
            outer.sign_in("outer")
            with outer.client() as client:
                client.request("GET", "/v1/x", "Via: 1.0 fred (1.1 xaiproxy-0123456789abcdef)")
                request = upstream.receive().answer()
                assert client.message().body == b"ok" and request.token == "inner"
            first, second = re.fullmatch(f"({MEMBER}), ({MEMBER})", request.value("Via")).groups()
            assert first != second


def test_each_process_has_another_name_in_via(tmp_path: pathlib.Path) -> None:
    names = set()
    with ScriptedUpstream() as upstream:
        for _ in range(3):
            with (
                ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
                proxy.client() as client,
            ):
                proxy.sign_in()
                client.request()
                names.add(upstream.receive().answer().value("Via"))
                assert client.message().body == b"ok"
    assert len(names) == 3


@pytest.mark.parametrize(
    "host, expected",
    [
        ("api.x.ai", False),
        ("x.ai", False),
        ("API.X.AI", False),
        ("api-x.ai", True),
        ("x.ai.example", True),
    ],
)
def test_requests_to_xai_have_no_via(tmp_path: pathlib.Path, host: str, expected: bool) -> None:
    authority, context = make_certificate(tmp_path, host.lower())
    came: list[bytes] = []

    def egress(connection: socket.socket) -> None:
        # This is the CONNECT request.
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as tls:
            came.append(read_request(tls))
            tls.sendall(answer(200, {}))

    with ScriptedServer(egress) as server:
        environ = {"HTTPS_PROXY": server.url, "SSL_CERT_FILE": str(authority)}
        with ProxyProcess(tmp_path, upstream=f"https://{host}", environ=environ) as proxy:
            proxy.sign_in()
            assert (
                proxy.ask("GET", "/v1/x", "Via: 1.1 xaiproxy-0123456789abcdef", "CF-Ray: 1").status
                == 200
            )
    assert (b"\r\nVia: " in came[0]) is expected and b"CF-Ray" not in came[0]
