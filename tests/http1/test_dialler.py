"""The connection to upstream: names, addresses, TLS, egress proxies, and the errors of each."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from network import NameServer, black_hole, hosts, refused_port
from proxy_process import Client, ProxyProcess
from raw_connection import TIMEOUT, RawConnection
from scripted_upstream import OK, ScriptedUpstream, make_certificate

from xaiproxy import config
from xaiproxy.http1.dialler import Dialler
from xaiproxy.http1.resolver import THREADS

# Upstream is unreachable


def test_a_refused_connection_is_502(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, upstream=f"http://127.0.0.1:{refused_port()}") as proxy:
        proxy.sign_in()
        answer = proxy.ask()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
        assert b"Connection refused" in answer.body


def test_a_black_hole_is_502_after_the_connect_timeout(tmp_path: Path) -> None:
    with (
        black_hole() as port,
        ProxyProcess(tmp_path, upstream=f"http://127.0.0.1:{port}", connect_timeout=0.5) as proxy,
    ):
        proxy.sign_in()
        start = time.monotonic()
        answer = proxy.ask()
        assert 0.4 < time.monotonic() - start < 3
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
        assert b"within 0.5 s" in answer.body and b"XAI_PROXY_CONNECT_TIMEOUT" in answer.body
        with proxy.client() as client:
            client.request("GET", "/v1/cancelled")
        line = proxy.wait_for_request("/v1/cancelled")
        assert line["ended_by"] == "client" and line["duration_ms"] < 400


def test_a_name_without_an_address_is_502(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, upstream="https://upstream.invalid", connect_timeout=5) as proxy:
        proxy.sign_in()
        answer = proxy.ask()
        assert answer.status == 502 and re.search(
            rb"https://upstream.invalid: .*[Nn]ame", answer.body
        )


# Names and addresses


def reaches(client: Client, upstream: ScriptedUpstream) -> bool:
    """Return whether a request arrives at `upstream`, on a connection of its own."""
    client.request()
    request = upstream.receive().answer()
    assert client.message().body == b"ok"
    upstream.hang_up()
    return request.connection.requests == 1


def test_all_addresses_are_tried(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    # The resolver puts 127.0.0.1 first (RFC 6724, rule 9), where nothing listens.
    with (
        ScriptedUpstream(context, "127.0.0.2") as upstream,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{upstream.port}",
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.1 upstream.test", "127.0.0.2 upstream.test"),
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request()
            request = upstream.receive().answer()
            assert client.message().body == b"ok"
            assert request.value("Host") == f"upstream.test:{upstream.port}"


def test_all_addresses_share_one_connect_timeout(tmp_path: Path) -> None:
    with (
        black_hole("127.0.0.2") as port,
        black_hole("127.0.0.3", port),
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{port}",
            connect_timeout=1,
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test"),
        ) as proxy,
    ):
        proxy.sign_in()
        start = time.monotonic()
        answer = proxy.ask()
        assert answer.status == 502 and 0.9 < time.monotonic() - start < 1.9


def test_a_name_is_looked_up_again_once_its_address_fails(
    tmp_path: Path, certificate: tuple
) -> None:
    authority, context = certificate
    with (
        ScriptedUpstream(context, "127.0.0.2") as first,
        ScriptedUpstream(context, "127.0.0.3", first.port) as second,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{first.port}",
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        assert reaches(client, first)
        # The file is changed in place, because it is mounted.
        (tmp_path / "hosts").write_text("127.0.0.3 upstream.test\n")
        assert reaches(client, first)
        first.close()
        assert reaches(client, second)


def test_a_name_is_looked_up_again_once_its_old_address_is_another_server(
    tmp_path: Path, certificate: tuple
) -> None:
    """That server answers, but cannot prove that it is upstream."""
    authority, context = certificate
    (tmp_path / "other").mkdir()
    _, foreign = make_certificate(tmp_path / "other", "upstream.test")
    with (
        ScriptedUpstream(context, "127.0.0.2") as first,
        ScriptedUpstream(context, "127.0.0.3", first.port) as second,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{first.port}",
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        assert reaches(client, first)
        (tmp_path / "hosts").write_text("127.0.0.3 upstream.test\n")
        first._context = foreign
        client.request("POST", "/v1/x", body=b"{}")
        with pytest.raises(ssl.SSLError):
            first.accept()
        assert second.receive().answer().connection.requests == 1
        assert client.message().body == b"ok"


def test_addresses_are_cached_for_a_minute(tmp_path: Path) -> None:
    with (
        ScriptedUpstream() as current,
        ScriptedUpstream(address="127.0.0.2", port=current.port) as cached,
    ):
        dialler = Dialler(config.from_environ({"HOME": "/", "XAI_PROXY_UPSTREAM": current.origin}))
        dialler.connect().close()
        assert current.accept()
        # The cache holds another address than the resolver has now.
        dialler._target._known = socket.getaddrinfo(
            "127.0.0.2", current.port, type=socket.SOCK_STREAM
        )
        dialler._target._known_at -= 59
        dialler.connect().close()
        assert cached.accept() and current.quiet()
        dialler._target._known_at -= 2
        dialler.connect().close()
        assert current.accept() and cached.quiet()


def test_waiting_requests_share_one_lookup(tmp_path: Path, many_files: None) -> None:
    with (
        NameServer(tmp_path, "127.0.0.2") as names,
        ScriptedUpstream(address="127.0.0.2") as egress,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            connect_timeout=2,
            prefix=names.prefix,
            environ={"HTTPS_PROXY": f"http://egress.test:{egress.port}"},
        ) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        names.delay = 0.5
        clients = [stack.enter_context(proxy.client()).request() for _ in range(100)]
        for _ in clients:
            assert egress.receive().line == "CONNECT upstream.test:443 HTTP/1.1"
        assert names.asked == ["egress\4test"]


def test_the_last_address_that_worked_is_tried_first(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    prefix = hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test")
    with (
        ScriptedUpstream(context, "127.0.0.3") as third,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{third.port}",
            prefix=prefix,
            environ={"SSL_CERT_FILE": str(authority)},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        # Nothing listens on the other address.
        assert reaches(client, third)
        with ScriptedUpstream(context, "127.0.0.2", third.port) as second:
            assert reaches(client, third) and second.quiet()
            third.close()
            assert reaches(client, second)


# Lookups: more than gevent's pool has threads.
HUNG = 12


@pytest.mark.parametrize("egress", [False, True])
def test_hung_lookups_do_not_block_later_ones(
    tmp_path: Path, certificate: tuple, egress: bool
) -> None:
    with (
        NameServer(tmp_path, "127.0.0.2") as names,
        ScriptedUpstream(None if egress else certificate[1], "127.0.0.2") as upstream,
    ):
        settings = {"upstream": f"https://upstream.test:{upstream.port}"}
        environ = {"SSL_CERT_FILE": str(certificate[0])}
        if egress:
            settings, environ = (
                {"upstream": "https://x.test"},
                {"HTTPS_PROXY": f"http://upstream.test:{upstream.port}"},
            )
        with (
            ProxyProcess(
                tmp_path, connect_timeout=1, prefix=names.prefix, environ=environ, **settings
            ) as proxy,
            contextlib.ExitStack() as stack,
        ):
            proxy.sign_in()
            names.silent = True
            clients = [stack.enter_context(proxy.client()).request() for _ in range(HUNG)]
            for client in clients:
                answer = client.message()
                assert answer.status == 502 and b"within 1 s" in answer.body
            assert len(names.asked) < HUNG
            names.silent = False
            clients[0].request()
            assert upstream.receive().method == ("CONNECT" if egress else "GET")


def test_the_number_of_hung_lookups_is_bounded(tmp_path: Path) -> None:
    with (
        NameServer(tmp_path, "127.0.0.2") as names,
        ProxyProcess(
            tmp_path, upstream="https://upstream.test", connect_timeout=0.1, prefix=names.prefix
        ) as proxy,
    ):
        proxy.sign_in()
        names.silent = True

        def threads() -> int:
            return len(os.listdir(f"/proc/{proxy.process.pid}/task"))

        before = threads()
        with proxy.client() as client:
            for _ in range(THREADS + 5):
                assert client.ask().status == 502
        assert before < threads() <= before + THREADS


def test_cached_addresses_are_used_while_lookups_hang(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    with (
        NameServer(tmp_path, "127.0.0.2", "127.0.0.3") as names,
        ScriptedUpstream(context, "127.0.0.3") as third,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{third.port}",
            prefix=names.prefix,
            environ={"SSL_CERT_FILE": str(authority)},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        with ScriptedUpstream(context, "127.0.0.2", third.port) as second:
            assert reaches(client, second)
        names.silent = True
        asked = len(names.asked)
        # The first request finds that the address fails and starts a lookup.
        for _ in range(3):
            assert reaches(client, third)
        assert len(names.asked) > asked


def test_cached_addresses_are_used_while_lookups_fail(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    with (
        ScriptedUpstream(context, "127.0.0.3") as third,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{third.port}",
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        with ScriptedUpstream(context, "127.0.0.2", third.port) as second:
            assert reaches(client, second)
        (tmp_path / "hosts").write_text("")
        for _ in range(3):
            assert reaches(client, third)


# Several addresses and one time limit (RFC 8305)


def test_a_black_hole_address_does_not_use_up_the_connect_timeout(
    tmp_path: Path, certificate: tuple
) -> None:
    authority, context = certificate
    with (
        ScriptedUpstream(context, "127.0.0.3") as upstream,
        black_hole("127.0.0.2", upstream.port),
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{upstream.port}",
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        took = []
        for _ in range(4):
            start = time.monotonic()
            assert reaches(client, upstream)
            took.append(time.monotonic() - start)
        assert max(took) < 4
        # The address that failed is tried last.
        assert min(took[1:]) < 0.25


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_the_addresses_of_an_egress_proxy_share_the_connect_timeout(
    tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("socks", reason="PySocks, of the extra socks, is not installed")
    with (
        ScriptedUpstream(address="127.0.0.3") as egress,
        black_hole("127.0.0.2", egress.port),
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            environ={"ALL_PROXY": f"{scheme}://egress.test:{egress.port}"},
            prefix=hosts(tmp_path, "127.0.0.2 egress.test", "127.0.0.3 egress.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        client.request()
        start = time.monotonic()
        assert egress.accept().exactly(3) == (b"CON" if scheme == "http" else b"\5\1\0")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("scheme", ["socks5", "socks4"])
def test_a_socks_proxy_without_name_lookup_gets_addresses(tmp_path: Path, scheme: str) -> None:
    """It gets the next address after the first one failed."""
    pytest.importorskip("socks", reason="PySocks, of the extra socks, is not installed")
    with (
        ScriptedUpstream() as egress,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test:444",
            environ={"ALL_PROXY": f"{scheme}://{egress.authority}"},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        for last in (b"\2", b"\3"):
            client.request()
            tunnel = egress.accept()
            if scheme == "socks5":
                assert tunnel.exactly(3) == b"\5\1\0"
                tunnel.send(b"\5\0")
                assert tunnel.exactly(10) == b"\5\1\0\1\x7f\0\0" + last + b"\1\xbc"
                tunnel.send(b"\5\5\0\1" + bytes(6))
            else:
                assert tunnel.exactly(9) == b"\4\1\1\xbc\x7f\0\0" + last + b"\0"
                tunnel.send(b"\0\x5b" + bytes(6))
            answer = client.message()
            assert (
                answer.status == 502 and b"rejected" in answer.body
            ) or b"refused" in answer.body


def test_the_next_address_is_tried_after_a_failed_tls_handshake(
    tmp_path: Path, certificate: tuple
) -> None:
    """A handshake that times out counts as failed, within the same timeout.

    Its address is tried last from then on.
    """
    authority, context = certificate
    with (
        ScriptedUpstream(None, "127.0.0.2") as second,
        ScriptedUpstream(context, "127.0.0.3", second.port) as third,
        ProxyProcess(
            tmp_path,
            upstream=f"https://upstream.test:{third.port}",
            # The silent address uses up half of it; the rest must suffice for a handshake.
            connect_timeout=4,
            environ={"SSL_CERT_FILE": str(authority)},
            prefix=hosts(tmp_path, "127.0.0.2 upstream.test", "127.0.0.3 upstream.test"),
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        client.request()
        # The server accepts and stays silent.
        with second.accept():
            assert third.receive().answer().connection.requests == 1
            assert client.message().body == b"ok"
        third.connections.pop().close()
        assert reaches(client, third) and second.quiet()
        third._context = None
        client.request("POST", "/v1/x", body=b"{}")
        # The proxy tries with a session, and then without one.
        for _ in range(2):
            third.accept().close()
        second._context = context
        assert second.receive().answer().connection.requests == 1
        assert client.message().body == b"ok"


# TLS


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_tls_session_is_resumed(tmp_path: Path, version: ssl.TLSVersion) -> None:
    authority, context = make_certificate(tmp_path, "127.0.0.1")
    context.maximum_version = context.minimum_version = version
    with (
        ScriptedUpstream(context) as upstream,
        ProxyProcess(
            tmp_path, upstream=upstream.origin, environ={"SSL_CERT_FILE": str(authority)}
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        reused = []
        for _ in range(3):
            client.request()
            request = upstream.receive().answer()
            reused.append(request.connection.sock.session_reused)
            assert client.message().body == b"ok"
            upstream.hang_up()
        assert reused == [False, True, True]
        # As after a restart, the new context knows none of the sessions.
        upstream._context = new_context(tmp_path, version)
        assert reaches(client, upstream)


def new_context(folder: Path, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = context.minimum_version = version
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


# SSL_OP_NO_EXTENDED_MASTER_SECRET of OpenSSL 3, for which Python has no name. A server that sets it
# cannot resume older sessions (RFC 7627 section 5.3).
NO_EXTENDED_MASTER_SECRET = 1


@pytest.mark.parametrize("egress", [False, True], ids=["direct", "tls in tls"])
def test_a_tls_session_that_upstream_rejects_is_dropped(
    tmp_path: Path, certificate: tuple, egress: bool
) -> None:
    authority, outer = certificate
    (tmp_path / "upstream").mkdir()
    _, context = make_certificate(tmp_path / "upstream", "127.0.0.1", "upstream.test")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(authority.read_text() + (tmp_path / "upstream" / "ca.pem").read_text())
    environ = {"SSL_CERT_FILE": str(bundle)}
    with ScriptedUpstream(outer if egress else context) as upstream:
        if egress:
            environ["HTTPS_PROXY"] = upstream.origin
        with (
            ProxyProcess(
                tmp_path,
                upstream="https://upstream.test" if egress else upstream.origin,
                environ=environ,
            ) as proxy,
            proxy.client() as client,
        ):
            proxy.sign_in()

            def accept() -> RawConnection:
                if not egress:
                    return upstream.accept()
                tunnel = upstream.receive().answer(GO_ON)
                return RawConnection(TLSInTLS(tunnel.connection.sock, context))

            def reaches_in_full() -> bool:
                with accept() as connection:
                    assert connection.message().method == "POST"
                    reused = connection.sock.session_reused
                    connection.send(OK)
                    assert client.message().body == b"ok"
                return not reused

            for in_full in (True, False):
                client.request("POST", "/v1/x", body=b"{}")
                assert reaches_in_full() == in_full
            context.options |= NO_EXTENDED_MASTER_SECRET
            client.request("POST", "/v1/x", body=b"{}")
            with pytest.raises(ssl.SSLError):
                accept()
            for in_full in (True, False):
                assert reaches_in_full() == in_full
                client.request("POST", "/v1/x", body=b"{}")
            assert not reaches_in_full()


@pytest.mark.parametrize("end", [RawConnection.close, RawConnection.reset, None])
def test_a_handshake_that_fails_with_a_session_is_retried_without_it(
    tmp_path: Path, certificate: tuple, end: Callable[[RawConnection], None] | None
) -> None:
    """Silence during the handshake counts as a failure, within the same timeout."""
    authority, context = certificate
    with (
        ScriptedUpstream(context) as upstream,
        ProxyProcess(
            tmp_path,
            upstream=upstream.origin,
            connect_timeout=2,
            environ={"SSL_CERT_FILE": str(authority)},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        assert reaches(client, upstream)
        client.request("POST", "/v1/x", body=b"{}")
        upstream._context = None
        with upstream.accept() as connection:
            if end:
                connection.exactly(5)
                end(connection)
            upstream._context = context
            upstream.connections.clear()
            request = upstream.receive().answer()
            assert not request.connection.sock.session_reused
            assert client.message().body == b"ok"
        upstream.hang_up()
        assert reaches(client, upstream)
        upstream._context = None
        client.request("POST", "/v1/x", body=b"{}")
        # The proxy retries once.
        for _ in range(2):
            upstream.accept().close()
        assert client.message().status == 502 and upstream.quiet()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {},
            b"its certificate is not trusted (unable to get local issuer certificate); if a proxy of your network "
            b"answers in its place, set SSL_CERT_FILE",
        ),
        (
            {"host": "127.0.0.2"},
            b"its certificate is not trusted (IP address mismatch, certificate is not valid for '127.0.0.2'); "
            b"another server, or a proxy of your network, answers in its place",
        ),
    ],
)
def test_an_untrusted_certificate_is_502(
    tmp_path: Path, certificate: tuple, settings: dict, sentence: bytes
) -> None:
    authority, context = certificate
    # Without a value, the certificates are those of certifi.
    environ = {"SSL_CERT_FILE": str(authority) if settings else ""}
    listener = socket.create_server((settings.get("host", "127.0.0.1"), 0))
    with (
        listener,
        ProxyProcess(
            tmp_path, upstream="https://{}:{}".format(*listener.getsockname()), environ=environ
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request()
            with pytest.raises(OSError):
                context.wrap_socket(listener.accept()[0], server_side=True).recv(1)
            answer = client.message()
            assert answer.status == 502 and sentence in answer.body


@pytest.mark.parametrize("sent", [b"HTTP/1.1 400 Bad Request\r\n\r\n", None])
def test_an_upstream_without_tls_is_502(tmp_path: Path, sent: bytes | None) -> None:
    """It answers in plain text, or is silent: the connect timeout includes the handshake."""
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(
            tmp_path, upstream=upstream.origin.replace("http", "https"), connect_timeout=0.5
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request()
            connection = upstream.accept()
            if sent:
                connection.send(sent)
            answer = client.message()
            assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (
                502,
                "upstream_unreachable",
            )
            assert (b"TLS" if sent else b"within 0.5 s") in answer.body


# Egress proxies


def test_https_goes_through_a_connect_proxy(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    with (
        ScriptedUpstream() as egress,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            environ={
                "SSL_CERT_FILE": str(authority),
                "HTTPS_PROXY": f"http://me:secret@{egress.authority}",
            },
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request("GET", "/v1/models?x")
            tunnel = egress.receive()
            assert tunnel.line.split()[:2] == ["CONNECT", "upstream.test:443"]
            assert (
                tunnel.value("Proxy-Authorization") == "Basic bWU6c2VjcmV0" and tunnel.token == ""
            )
            tunnel.answer(b"HTTP/1.1 200 Go on\r\n\r\n")
            with RawConnection(
                context.wrap_socket(tunnel.connection.sock, server_side=True)
            ) as inside:
                request = inside.message()
                assert request.line == "GET /v1/models?x HTTP/1.1"
                assert request.value("Host") == "upstream.test"
                assert request.token == "the-token" and request.value("Proxy-Authorization") is None
                inside.send(OK)
                assert client.message().body == b"ok"
                # This request uses the same tunnel.
                client.request()
                assert inside.message().line == "GET /v1/models HTTP/1.1"
                inside.send(OK)
                assert client.message().body == b"ok"


def test_a_connect_proxy_that_refuses_is_502(tmp_path: Path) -> None:
    with (
        ScriptedUpstream() as egress,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            environ={"HTTPS_PROXY": f"http://me:secret@{egress.authority}"},
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request()
            egress.receive().answer(
                b"HTTP/1.1 407 Authentication Required\r\nContent-Length: 0\r\n\r\n"
            )
            answer = client.message()
            assert answer.status == 502 and b"407 Authentication Required" in answer.body
            assert b"secret" not in answer.body


def test_loopback_is_never_proxied(tmp_path: Path) -> None:
    with (
        ScriptedUpstream() as egress,
        ScriptedUpstream() as upstream,
        ProxyProcess(
            tmp_path,
            upstream=upstream.origin,
            environ=dict.fromkeys(
                ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "http_proxy"), egress.origin
            ),
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            client.request()
            upstream.receive().answer()
            assert client.message().body == b"ok" and egress.quiet()


GO_ON = b"HTTP/1.1 200 Go on\r\n\r\n"


@pytest.fixture(scope="module")
def egress() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as running:
        yield running


def start_proxy_with_egress(
    egress: ScriptedUpstream, certificate: tuple, folder: Path
) -> ProxyProcess:
    return ProxyProcess(
        folder,
        upstream="https://upstream.test",
        connect_timeout=0.5,
        environ={"SSL_CERT_FILE": str(certificate[0]), "HTTPS_PROXY": egress.origin},
    )


@pytest.fixture(scope="module")
def proxy_with_egress(
    egress: ScriptedUpstream, certificate: tuple, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    with start_proxy_with_egress(egress, certificate, tmp_path_factory.mktemp("egress")) as proxy:
        proxy.sign_in()
        yield proxy


@pytest.fixture(scope="module")
def never_connected(
    egress: ScriptedUpstream, certificate: tuple, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    """A proxy that has no TLS session to resume."""
    with start_proxy_with_egress(egress, certificate, tmp_path_factory.mktemp("never")) as proxy:
        proxy.sign_in()
        yield proxy


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + GO_ON,
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 199 \r\n\r\n" + GO_ON,
        b"HTTP/1.0 200 Connection established\r\n\r\n",
        b"HTTP/1.1 204 Fine\r\n\r\n",
        # RFC 9110 section 9.3.6: the Content-Length is ignored.
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_any_2xx_response_opens_the_tunnel(
    proxy_with_egress: ProxyProcess, egress: ScriptedUpstream, certificate: tuple, sent: bytes
) -> None:
    with proxy_with_egress.client() as client:
        client.request()
        tunnel = egress.receive()
        for byte in sent:
            tunnel.answer(bytes([byte]))
        egress.connections.remove(tunnel.connection)
        with RawConnection(
            certificate[1].wrap_socket(tunnel.connection.sock, server_side=True)
        ) as inside:
            assert inside.message().token == "the-token"
            inside.send(OK)
            assert client.message().body == b"ok"


@pytest.mark.parametrize(
    "sent, end, sentence",
    [
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 13\r\n\r\nsecret-reason",
            None,
            b"the egress proxy responded 403 Forbidden",
        ),
        (
            b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsecret",
            None,
            b"responded 502 Bad Gateway",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: /secret\r\n\r\n", None, b"responded 302 Found"),
        (b"SSH-2.0-dropbear\r\n\r\n", None, b"is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\n\n", None, b"is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 12000, None, b"is longer than 65536 bytes"),
        (b"", RawConnection.close, b"it closed the connection"),
        (b"HTTP/1.1 200 O", RawConnection.close, b"it closed the connection"),
        (b"HTTP/1.1 200 OK\r\n", RawConnection.reset, b"reset by peer"),
        # The connection ends during the TLS handshake.
        (
            GO_ON,
            RawConnection.close,
            b"no connection to https://upstream.test: ",
        ),
        (GO_ON + b"220 smtp.example\r\n", None, b"TLS failed"),
        (b"", None, b"within 0.5 s"),
        (b"HTTP/1.1 200", None, b"within 0.5 s"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", None, b"within 0.5 s"),
        (GO_ON, None, b"within 0.5 s"),
    ],
)
def test_a_failed_tunnel_is_502(
    never_connected: ProxyProcess,
    egress: ScriptedUpstream,
    sent: bytes,
    end: Callable[[RawConnection], None] | None,
    sentence: bytes,
) -> None:
    with never_connected.client() as client:
        client.request("POST", "/v1/x", body=b"{}")
        start = time.monotonic()
        tunnel = egress.receive()
        assert tunnel.line == "CONNECT upstream.test:443 HTTP/1.1" and tunnel.token == ""
        # The proxy may close the connection before it has read everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            tunnel.answer(sent)
        if end:
            if sent == GO_ON:
                # This is the beginning of a TLS record.
                tunnel.connection.exactly(5)
            end(tunnel.connection)
        answer = client.message()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
        assert (
            sentence in answer.body
            and b"secret" not in answer.body
            and time.monotonic() - start < 2
        )
        if not end:
            tunnel.connection.sock.settimeout(1)
            with contextlib.suppress(ConnectionResetError):
                # A ClientHello arrives, and then EOF.
                while tunnel.connection.sock.recv(65536):
                    pass
        assert egress.quiet()


class TLSInTLS:
    """The server's side of TLS inside TLS, with the socket methods that RawConnection needs."""

    def __init__(self, outer: ssl.SSLSocket, context: ssl.SSLContext):
        self._outer = outer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._do(self._tls.do_handshake)
        self.settimeout, self.setsockopt, self.close = (
            outer.settimeout,
            outer.setsockopt,
            outer.close,
        )
        self.session_reused = self._tls.session_reused

    def _do(self, step: Callable[..., Any], *arguments: object) -> Any:
        while True:
            try:
                return step(*arguments)
            except ssl.SSLWantReadError:
                self._outer.sendall(self._out.read())
                self._in.write(self._outer.recv(65536))
            finally:
                self._outer.sendall(self._out.read())

    def recv(self, size: int) -> bytes:
        return self._do(self._tls.read, size)

    def sendall(self, data: bytes) -> None:
        for start in range(0, len(data), 16384):
            self._do(self._tls.write, data[start : start + 16384])


def test_an_egress_proxy_may_speak_tls_itself(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    body = bytes(range(256)) * 4096
    with (
        ScriptedUpstream(context) as egress,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            environ={"SSL_CERT_FILE": str(authority), "HTTPS_PROXY": egress.origin},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        sender = threading.Thread(
            target=client.request, args=("POST", "/v1/x"), kwargs={"body": body}
        )
        sender.start()
        tunnel = egress.receive()
        assert tunnel.line == "CONNECT upstream.test:443 HTTP/1.1" and tunnel.token == ""
        tunnel.answer(GO_ON)
        inside = RawConnection(TLSInTLS(tunnel.connection.sock, context))
        request = inside.message()
        sender.join()
        assert request.token == "the-token" and request.body == body
        inside.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.message().body == body
        # Each chunk arrives at once, through the same tunnel.
        for _ in range(3):
            client.request()
            assert inside.message().token == "the-token"
            inside.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.head()
            for chunk in (b"2\r\nok\r\n", b"0\r\n\r\n"):
                inside.send(chunk)
                assert client.chunk() == chunk[3:5].strip()


# SOCKS


@pytest.fixture
def socks(tmp_path: Path, certificate: tuple) -> Iterator[tuple[ProxyProcess, socket.socket]]:
    pytest.importorskip("socks", reason="PySocks, of the extra socks, is not installed")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ProxyProcess(
            tmp_path,
            upstream="https://upstream.test",
            connect_timeout=0.5,
            environ={
                "SSL_CERT_FILE": str(certificate[0]),
                "ALL_PROXY": f"socks5h://me:secret@127.0.0.1:{listener.getsockname()[1]}",
            },
        ) as proxy,
    ):
        listener.settimeout(TIMEOUT)
        proxy.sign_in()
        yield proxy, listener


def accept_socks_request(listener: socket.socket) -> RawConnection:
    """Act as the server of RFC 1928 and 1929, up to its last reply."""
    raw = RawConnection(listener.accept()[0])
    # The client offers authentication with user name and password.
    assert raw.exactly(1) == b"\5" and 2 in raw.exactly(raw.exactly(1)[0])
    raw.send(b"\5\2")
    assert raw.exactly(11) == b"\1\2me\6secret"
    raw.send(b"\1\0")
    # The request names the host, so the SOCKS proxy looks it up.
    assert raw.exactly(20) == b"\5\1\0\3\x0dupstream.test\1\xbb"
    return raw


def test_https_goes_through_a_socks_proxy(socks: tuple, certificate: tuple) -> None:
    proxy, listener = socks
    with proxy.client() as client:
        client.request()
        tunnel = accept_socks_request(listener)
        tunnel.send(b"\5\0\0\1" + bytes(6))
        with RawConnection(certificate[1].wrap_socket(tunnel.sock, server_side=True)) as inside:
            for _ in range(2):
                request = inside.message()
                assert (request.value("Host"), request.token) == ("upstream.test", "the-token")
                inside.send(OK)
                assert client.message().body == b"ok"
                client.request()


@pytest.mark.parametrize(
    "sent, end, sentence",
    [
        (b"\5\5\0\1" + bytes(6), False, b"refused"),
        (b"HTTP/1.1 400 Bad Request", False, b"no connection to"),
        (b"\5\0", True, b"closed"),
        (b"\5\0", False, b"within 0.5 s"),
    ],
    ids=["refused", "garbage", "cut", "silent"],
)
def test_a_socks_proxy_that_does_not_connect_is_502(
    socks: tuple, sent: bytes, end: bool, sentence: bytes
) -> None:
    proxy, listener = socks
    with proxy.client() as client:
        client.request()
        with accept_socks_request(listener) as tunnel:
            start = time.monotonic()
            tunnel.send(sent)
            if end:
                tunnel.close()
            answer = client.message()
            assert answer.status == 502 and sentence in answer.body and b"secret" not in answer.body
            assert time.monotonic() - start < 2 and (end or tunnel.closed_within())
