"""oauth/session.py against servers that misbehave as an issuer, or a proxy before it, can."""

from __future__ import annotations

import base64
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkout import ROOT
from network import black_hole, hosts
from scripted_server import ScriptedServer, answer, read_request

from xaiproxy import __version__, config, errors
from xaiproxy.oauth.causes import BODY_LIMIT
from xaiproxy.oauth.session import Answer, Session, _Body, parse_retry_after

FORM = {"grant_type": "refresh_token", "refresh_token": "rt-1+/="}


def session(**environ: str) -> Session:
    return Session(config.from_environ(environ))


def unavailable(call) -> errors.IssuerUnavailable:
    with pytest.raises(errors.IssuerUnavailable) as caught:
        call()
    return caught.value


def test_a_form_is_sent_as_one_post_with_few_headers():
    with ScriptedServer(answer(200, {"a": 1}, Set_Cookie="id=1; Path=/")) as server:
        web = session()
        assert web.get(server.url + "/x?y=z").json() == {"a": 1}
        assert web.post(server.url + "/token", FORM).status == 200
    head, body = [request.decode().split("\r\n\r\n") for request in server.requests][1]
    assert head.split("\r\n")[0] == "POST /token HTTP/1.1"
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    assert fields == {
        "Host": server.url.removeprefix("http://"),
        "User-Agent": f"xaiproxy/{__version__}",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/x-www-form-urlencoded",
        "Content-Length": str(len(body)),
    }
    assert body == "grant_type=refresh_token&refresh_token=rt-1%2B%2F%3D"
    first = server.requests[0].decode()
    assert first.startswith("GET /x?y=z HTTP/1.1\r\n")


def test_a_request_may_add_headers_of_its_own():
    with ScriptedServer(answer(200, {})) as server:
        session().get(server.url, headers={"Authorization": "Bearer t"})
    assert b"\r\nAuthorization: Bearer t\r\n" in server.requests[0]


def test_proxies_and_netrc_of_the_environment_are_ignored(tmp_path: Path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password something\n")
    (tmp_path / "netrc").chmod(0o600)
    with ScriptedServer(answer(200, {})) as server:
        subprocess.run(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                "import sys; from xaiproxy import config\n"
                "from xaiproxy.oauth.session import Session\n"
                "assert Session(config.from_environ({})).get(sys.argv[1]).status == 200",
                server.url,
            ],
            env=os.environ
            | {
                "http_proxy": "http://127.0.0.1:1",
                "ALL_PROXY": "http://127.0.0.1:1",
                "NETRC": str(tmp_path / "netrc"),
            },
            check=True,
        )
    assert b"Authorization" not in server.requests[0]


def test_a_redirect_is_not_followed():
    with (
        ScriptedServer(answer(200, {})) as elsewhere,
        ScriptedServer(answer(307, "", Location=elsewhere.url + "/token")) as server,
    ):
        assert session().post(server.url, FORM).status == 307
    assert elsewhere.requests == []


@pytest.mark.parametrize("size, whole", [(BODY_LIMIT, True), (BODY_LIMIT + 1, False)])
def test_a_body_is_read_up_to_a_limit(size: int, whole: bool):
    with ScriptedServer(answer(200, "x" * size)) as server:
        if whole:
            assert len(session().post(server.url, FORM).body) == size
        else:
            assert unavailable(lambda: session().post(server.url, FORM)).sent


def test_a_refused_connection_is_named_and_nothing_was_sent():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    error = unavailable(lambda: session().post(url, FORM))
    assert str(error) == (
        f"{url[7:]} cannot be reached (Connection refused); check the network, or XAI_PROXY_ISSUER"
    )
    assert not error.sent and error.exit_code == 69


def test_a_name_that_does_not_resolve_is_named():
    error = unavailable(lambda: session().post("https://auth.invalid/token", FORM))
    assert "auth.invalid cannot be resolved" in str(error) and not error.sent


def reset(connection: socket.socket) -> None:
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def respond(text: bytes):
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(text)

    return script


@pytest.mark.parametrize(
    "script, message",
    [
        (
            lambda connection: read_request(connection) and None,
            "closed the connection before its response was complete",
        ),
        (reset, "closed the connection before its response was complete"),
        (
            respond(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"),
            "closed the connection before its response was complete",
        ),
        (
            respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"),
            "closed the connection before its response was complete",
        ),
        (respond(b"nonsense\r\n\r\n"), "closed the connection before its response was complete"),
        (
            respond(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"),
            "could not be read",
        ),
    ],
    ids=["closed", "reset", "short", "short chunk", "nonsense", "not gzip"],
)
def test_an_incomplete_response_is_an_error_after_which_the_form_counts_as_sent(
    script, message: str
):
    with ScriptedServer(script) as server:
        error = unavailable(lambda: session().post(server.url, FORM))
        assert message in str(error) and error.sent
        # A GET spends nothing.
        assert not unavailable(lambda: session().get(server.url)).sent


def drip(text: bytes):
    def script(connection: socket.socket) -> None:
        read_request(connection)
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    return script


@pytest.mark.parametrize(
    "script",
    [
        drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000),
        lambda connection: read_request(connection) and read_request(connection),
    ],
    ids=["head", "body", "silence"],
)
def test_one_deadline_covers_the_whole_request(script):
    with ScriptedServer(script) as server:
        begin = time.monotonic()
        error = unavailable(lambda: session().post(server.url, FORM, deadline=0.3))
        assert 0.3 <= time.monotonic() - begin < 0.9
    assert "sent no complete response within 0.3 s" in str(error) and error.sent


STOPPED = """
import sys
from xaiproxy import config
from xaiproxy.oauth.session import Session
print(Session(config.from_environ({})).post(sys.argv[1], {"a": "b"}, deadline=3).status)
"""


def test_a_response_that_arrived_while_the_process_was_stopped_is_read():
    read, released = threading.Event(), threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        read.set()
        released.wait(10)
        connection.sendall(answer(200, {"refresh_token": "the only copy"}))

    with ScriptedServer(script) as server:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", STOPPED, server.url],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert read.wait(10)
        process.send_signal(signal.SIGSTOP)
        released.set()
        # The deadline passes, and with it the time that a last read has after it.
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=10) == ("200\n", None)


def test_the_end_of_a_body_that_was_sent_may_be_read_after_the_deadline():
    """The process may be stopped between the last byte and the look for another one."""
    body = _Body(b"a=b")
    assert body.read(16384) == b"a=b"
    assert body.abandon() and body.read(16384) == b""
    unsent = _Body(b"a=b")
    assert not unsent.abandon()
    with pytest.raises(TimeoutError):
        unsent.read(16384)


def test_a_late_thread_stops_reading():
    with ScriptedServer(
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000)
    ) as server:
        # The server sends 40 bytes of head, then some of the body.
        unavailable(lambda: session().post(server.url, FORM, deadline=1))
        end_of_late_threads(1)


def end_of_late_threads(seconds: float) -> None:
    """Wait for the threads of calls that timed out."""
    for thread in threading.enumerate():
        if thread.name.startswith("POST "):
            thread.join(seconds)
            assert not thread.is_alive()


def test_a_connection_that_is_not_accepted_times_out():
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.socket() as first,
        socket.socket() as second,
    ):
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        error = unavailable(
            lambda: session().post(f"http://127.0.0.1:{full.getsockname()[1]}", FORM, deadline=0.3)
        )
    assert not error.sent


# TLS and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate and its key for localhost and auth.x.ai, in one file."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            path,
            "-out",
            f"{path}.crt",
            "-subj",
            "/CN=test",
            "-days",
            "2",
            "-addext",
            "subjectAltName=DNS:localhost,DNS:auth.x.ai",
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_self_signed_certificate_is_refused(tls: ssl.SSLContext, certificate: Path):
    with ScriptedServer(answer(200, {}), tls=tls) as server:
        error = unavailable(lambda: session().post(server.url, FORM))
        assert f"the certificate of {server.url[8:]} cannot be verified" in str(error)
        assert "SSL_CERT_FILE" in str(error)
        assert not error.sent and server.requests == []
        assert session(SSL_CERT_FILE=str(certificate)).post(server.url, FORM).status == 200


def test_a_server_without_tls_is_named():
    with ScriptedServer(
        lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    ) as server:
        error = unavailable(lambda: session().post(server.url.replace("http", "https"), FORM))
    assert "the TLS handshake with" in str(error) and not error.sent


def tunnel(tls: ssl.SSLContext, received: list[bytes], pace: float = 0):
    """A proxy that is also the server at the end of its tunnel."""

    def script(connection: socket.socket) -> None:
        received.append(read_request(connection))
        for byte in b"HTTP/1.1 200 Connected\r\n\r\n":
            connection.sendall(bytes([byte]))
            time.sleep(pace)
        with tls.wrap_socket(connection, server_side=True) as tunnelled:
            received.append(b"")
            try:
                while more := tunnelled.recv(65536):
                    received[1] += more
                    if received[1].endswith(b"%2F%3D"):
                        tunnelled.sendall(answer(200, {"through": "the proxy"}))
                        return
            except OSError:
                pass

    return script


def test_a_request_goes_through_the_proxy(tls: ssl.SSLContext, certificate: Path):
    received: list[bytes] = []
    with ScriptedServer(tunnel(tls, received)) as proxy:
        web = session(
            HTTPS_PROXY=f"http://user:pass-word@127.0.0.1:{proxy.port}",
            SSL_CERT_FILE=str(certificate),
        )
        assert web.post("https://auth.x.ai/oauth2/token", FORM).json() == {"through": "the proxy"}
    assert received[0].startswith(b"CONNECT auth.x.ai:443 HTTP/1.")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:pass-word") in received[0]
    assert (
        received[1].startswith(b"POST /oauth2/token HTTP/1.1\r\n")
        and b"Proxy-Auth" not in received[1]
    )


def test_a_form_is_never_sent_after_a_timeout(tls: ssl.SSLContext, certificate: Path):
    """After `sent=False` the caller sends the refresh token again; sent twice, it is revoked."""
    received: list[bytes] = []
    # The 26 bytes of the proxy's response take longer than the deadline.
    with ScriptedServer(tunnel(tls, received, pace=0.03)) as proxy:
        web = session(HTTPS_PROXY=proxy.url, SSL_CERT_FILE=str(certificate))
        assert not unavailable(
            lambda: web.post("https://auth.x.ai/oauth2/token", FORM, deadline=0.4)
        ).sent
        end_of_late_threads(5)
    assert received[1].startswith(b"POST /oauth2/token") and b"refresh_token" not in received[1]


@pytest.mark.parametrize(
    "script, message",
    [
        (answer(407), "could not reach auth.x.ai through the proxy {} (HTTP 407)"),
        (
            lambda connection: None,
            "auth.x.ai (through the proxy {}) closed the connection before its response was "
            "complete",
        ),
    ],
)
def test_a_proxy_that_refuses_is_named(script, message: str):
    with ScriptedServer(script) as proxy:
        web = session(HTTPS_PROXY=f"http://user:pass-word@127.0.0.1:{proxy.port}")
        error = unavailable(lambda: web.post("https://auth.x.ai/oauth2/token", FORM))
    assert message.format(f"127.0.0.1:{proxy.port}") in str(error) and not error.sent
    assert "pass-word" not in str(error) and "user" not in str(error)


# several addresses

POST = """
import os, sys
from xaiproxy import config
from xaiproxy.oauth.session import Session
session = Session(config.from_environ(os.environ))
print(session.post(sys.argv[1], {"refresh_token": "rt-1+/="}, deadline=4).status)
"""


def status_of_post(folder: Path, url: str, names: dict[str, str], **environ: str) -> str:
    """The output of a process for which `names` resolve to these addresses, in this order."""
    prefix = hosts(folder, *(f"{address} {name}" for address, name in names.items()))
    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", POST, url],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
    ).stdout


def test_a_black_hole_address_does_not_use_up_the_deadline(tmp_path: Path):
    with (
        ScriptedServer(answer(200, {}), address="127.0.0.3") as server,
        black_hole("127.0.0.2", server.port),
    ):
        names = {"127.0.0.2": "issuer.test", "127.0.0.3": "issuer.test"}
        assert status_of_post(tmp_path, f"http://issuer.test:{server.port}/token", names) == "200\n"
    assert len(server.requests) == 1


def socks_proxy(tls: ssl.SSLContext, received: list[bytes], replies: dict[bytes, bytes]):
    """A SOCKS proxy that is the server as well. `replies`: its reply to each message, in order."""

    def script(connection: socket.socket) -> None:
        for message, reply in replies.items():
            assert connection.recv(len(message), socket.MSG_WAITALL) == message
            connection.sendall(reply)
        with tls.wrap_socket(connection, server_side=True) as tunnelled:
            received.append(read_request(tunnelled))
            tunnelled.sendall(answer(200, {}))

    return script


# The client's messages, each with the proxy's reply.
PROXIES = {
    "socks5h": {b"\5\1\0": b"\5\0", b"\5\1\0\3\x09auth.x.ai\1\xbb": b"\5\0\0\1" + bytes(6)},
    "socks5": {b"\5\1\0": b"\5\0", b"\5\1\0\1\x7f\0\0\4\1\xbb": b"\5\0\0\1" + bytes(6)},
    "socks4a": {b"\4\1\1\xbb\0\0\0\1\0auth.x.ai\0": b"\0\x5a" + bytes(6)},
    "socks4": {b"\4\1\1\xbb\x7f\0\0\4\0": b"\0\x5a" + bytes(6)},
}


@pytest.mark.parametrize("scheme", ["http", *PROXIES])
def test_a_black_hole_address_of_a_proxy_does_not_use_up_the_deadline(
    tmp_path: Path, tls: ssl.SSLContext, certificate: Path, scheme: str
):
    pytest.importorskip("socks", reason="PySocks, of the extra socks, is not installed")
    received: list[bytes] = []
    script = (
        tunnel(tls, received) if scheme == "http" else socks_proxy(tls, received, PROXIES[scheme])
    )
    with ScriptedServer(script, address="127.0.0.3") as proxy, black_hole("127.0.0.2", proxy.port):
        names = {"127.0.0.2": "proxy.test", "127.0.0.3": "proxy.test", "127.0.0.4": "auth.x.ai"}
        assert (
            status_of_post(
                tmp_path,
                "https://auth.x.ai/token",
                names,
                SSL_CERT_FILE=str(certificate),
                ALL_PROXY=f"{scheme}://proxy.test:{proxy.port}",
            )
            == "200\n"
        )
    assert received[-1].endswith(b"\r\n\r\nrefresh_token=rt-1%2B%2F%3D")


# answers


def test_json_is_an_object_or_nothing():
    for body in (b"", b"<p>", b"[]", b"3", b'"x"', b"{", b"\xff", b"[" * 100000, b"1" * 5000):
        assert Answer(200, {}, body).json() is None
    assert Answer(200, {"Content-Type": "text/plain"}, b' {"a": 1}').json() == {"a": 1}


def test_a_page_is_known_by_its_media_type_or_its_first_bytes():
    assert Answer(403, {"Content-Type": "Text/HTML; charset=utf-8"}, b"").is_html
    assert Answer(403, {}, b"\xef\xbb\xbf\n <!doctype html>").is_html
    assert not Answer(403, {"Content-Type": "text/plain"}, b"error code: 1010").is_html


def test_the_summary_quotes_nothing_but_a_media_type():
    assert (
        Answer(502, {"Content-Type": "text/html; charset=utf-8"}, b"<p>secret").summary
        == "HTTP 502, text/html"
    )
    for headers in ({"Content-Type": "\x1b[31m"}, {}):
        assert Answer(502, headers, b"").summary == "HTTP 502, no media type"


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("7", 7),
        ("0", 0),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10),
        ("Sun Nov  6 08:49:47 1994", 10),
        # A date in the past.
        ("Sun, 06 Nov 1994 08:49:36 GMT", 0),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("9" * 400, None),
        ("Sun, 99 Nov 1994 08:49:47 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None):
    # One second after the date above that is past: Sun, 06 Nov 1994 08:49:37 GMT.
    assert parse_retry_after(text, now=784111777) == seconds


def test_retry_after_counts_from_the_clock_of_the_session():
    with ScriptedServer(answer(429, "", Retry_After="Sun, 06 Nov 1994 08:49:47 GMT")) as server:
        web = Session(config.from_environ({}), now=lambda: 784111777)
        assert web.get(server.url).retry_after == 10
