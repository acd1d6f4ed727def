"""A request's access token: its choice, its refusal by xAI, and the errors without one."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import resource
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import KEPT, TIMEOUT, Message, readable
from sandbox import Sandbox
from scripted_upstream import Request, ScriptedUpstream

from xaiproxy import errors, tokens
from xaiproxy.proxy.forward import check_path
from xaiproxy.sandbox.xai_errors import ERRORS

NEW = b'{"code":"unauthenticated:bad-credentials","error":"The OAuth2 access token could not be validated."}'
OLD = (
    b'{"code":"The caller does not have permission to execute the specified operation",'
    b'"error":"The OAuth2 access token could not be validated. [WKE=unauthenticated:bad-credentials]"}'
)


def answer(status: int, body: bytes, *fields: bytes) -> bytes:
    lines = [
        b"HTTP/1.1 %d X" % status,
        b"Date: then",
        *fields,
        b"Content-Length: %d" % len(body),
        b"",
        b"",
    ]
    return b"\r\n".join(lines) + body


def chunked(status: int, *chunks: bytes) -> bytes:
    return (
        b"HTTP/1.1 %d X\r\nDate: then\r\nTransfer-Encoding: chunked\r\n\r\n" % status
        + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        + b"0\r\n\r\n"
    )


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


REFUSED = answer(403, NEW)
REFUSALS = {
    "plain": REFUSED,
    "old": answer(403, OLD),
    "chunked": chunked(403, NEW[:20], NEW[20:]),
    "gzip": answer(403, gzip.compress(NEW), b"Content-Encoding: gzip"),
    "old, gzip": answer(403, gzip.compress(OLD), b"content-encoding: GZIP"),
    "zlib": answer(403, zlib.compress(NEW), b"Content-Encoding: deflate"),
    "deflate": answer(403, deflated(NEW), b"Content-Encoding: deflate"),
    "401": answer(401, b""),
    "401, text": answer(401, b"No credentials presented."),
}


@pytest.fixture
def proxy(running: ProxyProcess, upstream: ScriptedUpstream) -> ProxyProcess:
    return signed_in(running)


@pytest.fixture
def low_replay_proxy(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> ProxyProcess:
    """A proxy with little replay memory: 10 bytes per request, 15 in total."""
    return signed_in(start_proxy(replay_limit=10, replay_memory=15))


@pytest.fixture
def client(proxy: ProxyProcess) -> Iterator[Client]:
    with proxy.client() as connection:
        yield connection


def signed_in(proxy: ProxyProcess) -> ProxyProcess:
    """Sign in with an hour-old token, a running refresher, and no report of a refused token."""
    proxy.sign_in("old")
    proxy.refresher_lives()
    with contextlib.suppress(FileNotFoundError):
        note(proxy).unlink()
    return proxy


def note(proxy: ProxyProcess) -> Path:
    return proxy.token_path.with_name("tokens.json.refused")


def wait_for_note(proxy: ProxyProcess, token: str = "old", seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while not note(proxy).exists():
        assert time.monotonic() < deadline, "the token was not reported to the refresher"
        time.sleep(0.01)
    assert note(proxy).read_text() == tokens.fingerprint(token)


def assert_refusal(message: Message, status: int, code: str, *words: str) -> None:
    """Assert that this is an error of the proxy's own, in their common format."""
    assert (message.status, message.value("X-XAI-Proxy-Error")) == (status, code)
    assert message.value("Content-Type") == "application/json"
    error = json.loads(message.body)["error"]
    assert set(error) == {"message", "type", "code"} and error["code"] == code
    for word in words:
        assert word in error["message"]


def assert_as_it_came(message: Message, sent: bytes) -> None:
    assert message.head.replace(KEPT, b"") + (b"" if message.chunks else message.body) == (
        sent if not message.chunks else sent.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    )


# These requests wait for 10 s while the other tests run


@pytest.fixture(scope="module")
def waiting_requests(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ProxyProcess, Client, Client]]:
    """A refused request and one with an expired token, which both wait for an idle refresher."""
    folder = tmp_path_factory.mktemp("waiting_requests")
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(folder, upstream=upstream.origin) as proxy,
        proxy.client() as refused,
        proxy.client() as late,
    ):
        signed_in(proxy)
        refused.request("GET", "/v1/refused")
        upstream.receive().answer(REFUSED)
        wait_for_note(proxy)
        proxy.sign_in("old", expires_in=-1)
        late.request("GET", "/v1/late")
        yield proxy, refused, late
        assert upstream.quiet()


def test_both_requests_wait_for_a_token(
    waiting_requests: tuple[ProxyProcess, Client, Client],
) -> None:
    _, refused, late = waiting_requests
    assert refused.silent() and late.silent()


# What is forwarded


@pytest.mark.parametrize(
    "path",
    [
        "/v1/..",
        "/v1/../x",
        "/v1/./x",
        "/v1/x/.",
        "/v1/%2e%2E/x",
        "/v1/x/.%2e",
        "/v1/a%2f..%2Fb",
        "/v1/a\\..\\b",
        "/v1/a%5c%2e%2e%5Cb",
        "/v1/a/..;x=1/b",
        "/v1//../x",
        "/v2/..",
    ],
)
def test_dot_segments_are_refused(path: str) -> None:
    with pytest.raises(errors.BadRequest):
        check_path(path)


@pytest.mark.parametrize(
    "path", ["/v1/...", "/v1/a..b", "/v1/.well-known", "/v1/a.", "/v1/..a/b", "/v1/a;../b", "/v1//"]
)
def test_other_dots_in_a_path_are_accepted(path: str) -> None:
    check_path(path)


def test_a_refused_request_does_not_reach_upstream(
    client: Client, upstream: ScriptedUpstream
) -> None:
    assert_refusal(client.ask("GET", "/v1/../admin"), 400, "bad_request", "dot segment")
    assert_refusal(client.ask("GET", "/v1/v1/models"), 404, "not_found", "/v1/models")
    assert_refusal(client.ask("GET", "/v1/v1"), 404, "not_found", "/v1 is meant")
    assert_refusal(client.ask("GET", "/models"), 404, "not_found", "/v1/models")
    assert_refusal(client.ask("GET", "/V1/models"), 404, "not_found")
    assert_refusal(client.ask("GET", "/%761/models"), 404, "not_found")
    assert_refusal(client.ask("TRACE"), 405, "method_not_allowed", "TRACE")
    assert upstream.quiet()


@pytest.mark.parametrize("cors_field", [b"", b"Access-Control-Allow-Origin: *\r\n"])
def test_a_page_of_a_listed_origin_may_read_the_response(
    tmp_path: Path, upstream: ScriptedUpstream, cors_field: bytes
) -> None:
    origin = "https://chat.example"
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, allowed_origins=origin) as proxy,
        proxy.client() as client,
    ):
        refused = client.ask("GET", "/v1/models", f"Origin: {origin}")
        assert refused.values("Access-Control-Allow-Origin") == [origin]
        proxy.sign_in()
        client.request("GET", "/v1/models", f"Origin: {origin}")
        upstream.receive().answer(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + cors_field + b"\r\nok"
        )
        answer = client.message()
        assert answer.body == b"ok"
        assert answer.values("Access-Control-Allow-Origin") == ["*" if cors_field else origin]


# Repeated heads, whose parsed values are cached


@pytest.mark.parametrize("pipelined", [False, True])
def test_equal_heads_with_different_lengths_are_distinguished(
    client: Client, upstream: ScriptedUpstream, pipelined: bool
) -> None:
    bodies = [
        b"one",
        b"three",
        b"",
        b"x" * 100000,
        b"one",
        b"GET /v1/evil HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
    head = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nX-a: 1\r\nContent-Length: %d\r\n\r\n"
    sent = [head % len(body) + body for body in bodies]
    if pipelined:
        client.send(b"".join(sent))
    for one, body in zip(sent, bodies):
        if not pipelined:
            client.send(one)
        request = upstream.receive()
        assert (request.line, request.body) == ("POST /v1/x HTTP/1.1", body)
        assert request.values("Content-Length") == [str(len(body))] and request.values("X-a") == [
            "1"
        ]
        request.answer(answer(200, body))
        assert client.message().body == body
    assert upstream.quiet()


def test_equal_heads_on_several_connections_keep_their_lengths(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(10)]
        requests: list[Request] = []
        for number, client in enumerate(clients):
            client.request("POST", "/v1/x", f"Content-Length: {number + 1}")
            requests.append(upstream.receive(body=False))
            assert requests[-1].values("Content-Length") == [str(number + 1)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number * (number + 1))
            assert requests[number].connection.exactly(number + 1) == b"%d" % number * (number + 1)
            requests[number].answer(answer(200, b"%d" % number))
            assert client.message().body == b"%d" % number


def ask_twice(client: Client, upstream: ScriptedUpstream) -> str:
    """Return the token of two equal requests, the second of which uses every cache."""
    seen = set()
    for _ in range(2):
        client.request("GET", "/v1/x", "X-a: 1")
        request = upstream.receive().answer()
        assert client.message().body == b"ok"
        seen.add(request.token)
    assert len(seen) == 1
    return seen.pop()


def test_a_changed_token_file_applies_to_the_next_request(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    assert ask_twice(client, upstream) == "old"
    for number in range(10):
        proxy.sign_in(f"new-{number}")
        assert ask_twice(client, upstream) == f"new-{number}"
    proxy.token_path.unlink()
    assert_refusal(client.ask("GET", "/v1/x", "X-a: 1"), 401, "login_required")
    proxy.sign_in("again")
    assert ask_twice(client, upstream) == "again"
    proxy.sign_in("again", refresh_token=None, expires_in=-1)
    assert_refusal(client.ask("GET", "/v1/x", "X-a: 1"), 503, "token_unavailable")
    assert upstream.quiet()


def test_changed_client_keys_apply_to_the_next_request(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    keys = tmp_path / "client-keys"

    def admit(*names: str) -> None:
        keys.with_suffix(".new").write_text(
            "".join(
                f"{name} {hashlib.sha256(f'key-of-{name}'.encode()).hexdigest()}\n"
                for name in names
            )
            or "# no keys\n"
        )
        keys.with_suffix(".new").replace(keys)

    def is_admitted(client: Client, name: str) -> bool:
        client.request("GET", "/v1/x", f"Authorization: Bearer key-of-{name}")
        if client.sock in readable(
            [client.sock, upstream.listener, *(one.sock for one in upstream.connections)], TIMEOUT
        ):
            assert_refusal(client.message(), 401, "client_key_required")
            return False
        upstream.receive().answer()
        assert client.message().body == b"ok"
        return True

    admit("ann", "bob")
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
        proxy.client() as first,
        proxy.client() as second,
    ):
        proxy.sign_in()
        for admitted in (("ann", "bob"), ("bob",), ("bob", "ann"), (), ("ann",)):
            admit(*admitted)
            for _ in range(2):
                assert is_admitted(first, "ann") is ("ann" in admitted)
                assert is_admitted(second, "bob") is ("bob" in admitted)
        # The file is gone, a folder, a link to itself, or without keys.
        for spoil in (
            lambda: None,
            keys.mkdir,
            lambda: keys.symlink_to(keys),
            lambda: keys.write_text("nonsense"),
        ):
            admit("ann")
            assert is_admitted(first, "ann")
            keys.unlink()
            spoil()
            assert not is_admitted(first, "ann") and not is_admitted(first, "ann")
            if keys.is_dir():
                keys.rmdir()


# A refused token


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_request_is_retried_with_a_newer_token(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, refusal: str
) -> None:
    client.request(
        "POST", "/v1/chat/completions?a=%2F", "X-a: 1", "Accept-Encoding: gzip", body=b"{}"
    )
    first = upstream.receive()
    proxy.sign_in("new")
    first.answer(REFUSALS[refusal])
    second = upstream.receive()
    assert second.head == first.head.replace(b"Bearer old", b"Bearer new") and second.body == b"{}"
    second.answer()
    assert client.message().body == b"ok"
    assert not note(proxy).exists()


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_request_is_retried_once(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, refusal: str
) -> None:
    client.request()
    first = upstream.receive()
    proxy.sign_in("new")
    first.answer(REFUSALS[refusal])
    second = upstream.receive()
    proxy.sign_in("newer")
    second.answer(REFUSALS[refusal])
    assert_as_it_came(client.message(), REFUSALS[refusal])
    assert upstream.quiet()


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, (status, *_) in ERRORS.items()
        if status not in (200, 401) and not name.startswith("bad_credentials")
    ),
)
def test_no_other_error_of_xai_is_retried_or_changed(
    sandbox: Sandbox, for_sandbox: ProxyProcess, name: str
) -> None:
    sandbox.set(answers=[{"path": "/v1/models", "error": name}], gzip="all")
    answers = []
    for port, token in ((sandbox.port, for_sandbox.token), (for_sandbox.port, None)):
        with Client(port) as client:
            host = f"127.0.0.1:{port}"
            fields = [f"Authorization: Bearer {token}"] if token else []
            client.send(
                "\r\n".join(
                    [
                        "GET /v1/models HTTP/1.1",
                        f"Host: {host}",
                        "User-Agent: tests",
                        *fields,
                        "Accept-Encoding: gzip",
                        "",
                        "",
                    ]
                ).encode()
            )
            answers.append(client.message())
    direct, proxied = answers
    assert proxied.status == direct.status >= 400
    assert gzip.decompress(proxied.body) == gzip.decompress(direct.body)
    volatile = {
        "date",
        "x-request-id",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "content-length",
    }
    assert [field for field in proxied.fields if field[0].lower() not in volatile] == [
        field for field in direct.fields if field[0].lower() not in volatile | {"set-cookie"}
    ]
    assert len(sandbox.requests("/v1/models")) == 2


@pytest.fixture(scope="module")
def for_sandbox(
    shared_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    with ProxyProcess(
        tmp_path_factory.mktemp("sandboxed"), upstream=shared_sandbox.url, issuer=shared_sandbox.url
    ) as proxy:
        proxy.token = shared_sandbox.write_login(proxy.token_path)["access_token"]
        yield proxy


@pytest.mark.parametrize(
    "knobs", [{}, {"gzip": "all"}, {"old_shape": True}, {"dead_token_status": 401}]
)
def test_a_request_with_a_revoked_token_is_retried_after_the_refresh(
    sandbox: Sandbox, tmp_path: Path, for_sandbox: ProxyProcess, knobs: dict[str, Any]
) -> None:
    """The token is revoked at the issuer and refused as xAI does, and another process refreshes it."""
    sandbox.set(**knobs)
    sandbox.write_login(for_sandbox.token_path, obtained_at=0)
    sandbox.kill()
    for_sandbox.refresher_lives()
    with for_sandbox.client() as client:
        client.request(
            "POST",
            "/v1/chat/completions",
            "Content-Type: application/json",
            "Accept-Encoding: gzip",
            body=b'{"model":"grok-4.5","messages":[]}',
        )
        sandbox.wait(lambda counters: counters["refused_tokens"] == 1)
        sandbox.write_login(tmp_path / "tokens.json")
        os.replace(tmp_path / "tokens.json", for_sandbox.token_path)
        assert client.message().status == 200
    assert sandbox.counters()["refused_tokens"] == 1


def test_a_request_with_a_refused_young_token_is_retried_after_a_second(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    proxy.sign_in("young", age=100)
    client.request()
    start = time.monotonic()
    upstream.receive().answer(REFUSED)
    second = upstream.receive()
    assert 0.95 < time.monotonic() - start < 3 and second.token == "young"
    second.answer(REFUSED)
    assert_as_it_came(client.message(), REFUSED)
    assert upstream.quiet() and not note(proxy).exists()


def test_a_refused_older_token_is_reported_to_the_refresher(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    proxy.sign_in("old", age=121)
    client.request()
    upstream.receive().answer(REFUSED)
    wait_for_note(proxy)
    assert oct(note(proxy).stat().st_mode)[-3:] == "600" and client.silent() and upstream.quiet()
    proxy.sign_in("new", age=0)
    second = upstream.receive(seconds=3)
    assert second.token == "new"
    second.answer()
    assert client.message().body == b"ok"
    assert sorted(path.name for path in proxy.token_path.parent.iterdir()) == [
        "tokens.json",
        "tokens.json.lock",
        "tokens.json.refused",
    ]


def test_fifty_refused_requests_wait_for_one_refresh(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(proxy.client()).request(
                "POST", f"/v1/{number}", body=b"%d" % number
            )
            for number in range(50)
        ]
        for request in [upstream.receive() for _ in clients]:
            request.answer(REFUSED)
        wait_for_note(proxy)
        proxy.sign_in("new")
        for _ in clients:
            request = upstream.receive()
            assert request.token == "new" and request.target == f"/v1/{request.body.decode()}"
            request.answer(answer(200, request.body))
        for number, client in enumerate(clients):
            assert client.message().body == b"%d" % number
    assert upstream.quiet()


def record_failure(proxy: ProxyProcess, **error: Any) -> None:
    """Record a failed refresh, as the refresher does."""
    proxy.sign_in(
        "old",
        refresh_error={
            "code": "temporarily_unavailable",
            "description": "The issuer is down.",
            "at": time.time(),
            "terminal": False,
            **error,
        },
    )


@pytest.mark.parametrize(
    "end", [record_failure, lambda proxy: proxy.refresher_lives(False)], ids=["fails", "dies"]
)
def test_the_wait_ends_when_the_refresher_fails(
    client: Client,
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    end: Callable[[ProxyProcess], None],
) -> None:
    client.request()
    upstream.receive().answer(REFUSED)
    wait_for_note(proxy)
    end(proxy)
    start = time.monotonic()
    assert_as_it_came(client.message(), REFUSED)
    assert time.monotonic() - start < 3 and upstream.quiet()


def test_the_wait_ends_when_the_client_closes(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/left", body=b"{}")
    request = upstream.receive().answer(b"HTTP/1.1 401 X\r\nContent-Length: 5\r\n\r\nno")
    wait_for_note(proxy)
    client.close()
    assert request.connection.closed_within(1)
    assert proxy.wait_for_request("/v1/left", 1)["ended_by"] == "client"
    proxy.sign_in("new")
    assert upstream.quiet()


def test_the_wait_ends_when_the_login_has_ended(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request()
    upstream.receive().answer(REFUSED)
    wait_for_note(proxy)
    record_failure(proxy, code="invalid_grant", terminal=True)
    start = time.monotonic()
    assert_refusal(client.message(), 401, "login_required", "invalid_grant", "xai-login --device")
    assert time.monotonic() - start < 3 and upstream.quiet()


def test_the_wait_ends_when_the_login_is_removed(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request()
    upstream.receive().answer(REFUSED)
    wait_for_note(proxy)
    proxy.token_path.unlink()
    assert_refusal(client.message(), 401, "login_required", "xai-login --device")


@pytest.mark.parametrize(
    "arrange",
    [
        lambda proxy: proxy.refresher_lives(False),
        lambda proxy: proxy.token_path.with_name("tokens.json.lock").unlink(),
        lambda proxy: proxy.sign_in("old", refresh_token=None),
        lambda proxy: record_failure(proxy, retry_at=time.time() + 60),
    ],
    ids=["dead refresher", "never a refresher", "no refresh token", "no try for a minute"],
)
def test_a_refused_request_does_not_wait_for_a_refresh_that_cannot_succeed(
    client: Client,
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    arrange: Callable[[ProxyProcess], None],
) -> None:
    arrange(proxy)
    client.request()
    start = time.monotonic()
    upstream.receive().answer(REFUSED)
    assert_as_it_came(client.message(), REFUSED)
    assert time.monotonic() - start < 3 and upstream.quiet()
    # A refresher that is started again will read the report. Without a refresh token there is none.
    assert note(proxy).exists() is (
        json.loads(proxy.token_path.read_text())["refresh_token"] is not None
    )


def test_a_refused_token_of_an_ended_login_is_401(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    record_failure(proxy, code="invalid_grant", terminal=True)
    # The request is served as long as xAI accepts the token.
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"
    client.request()
    upstream.receive().answer(REFUSED)
    assert_refusal(client.message(), 401, "login_required", "invalid_grant", "xai-login --device")


def test_a_read_only_token_folder_does_not_delay_a_refusal(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    mount = f'mount --bind "{tmp_path}" "{tmp_path}" && mount -o remount,bind,ro "{tmp_path}"'
    read_only = ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if subprocess.run([*read_only, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not available here")
    with ProxyProcess(tmp_path, upstream=upstream.origin, prefix=read_only) as proxy:
        signed_in(proxy)
        with proxy.client() as client:
            client.request()
            start = time.monotonic()
            upstream.receive().answer(REFUSED)
            assert_as_it_came(client.message(), REFUSED)
            assert time.monotonic() - start < 3
        line = proxy.wait_for_log(lambda line: "tokens.json.refused" in line["message"])
        assert line["level"] == "warning" and "Read-only file system" in line["message"]


# The replay of a body


def test_a_chunked_body_is_replayed(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    body = bytes(range(256)) * 2000
    client.request("POST", "/v1/files", "Transfer-Encoding: chunked")
    for start in range(0, len(body), 100000):
        part = body[start : start + 100000]
        client.send(b"%x\r\n%b\r\n" % (len(part), part))
    client.send(b"0\r\n\r\n")
    first = upstream.receive()
    proxy.sign_in("new")
    first.answer(REFUSED)
    second = upstream.receive()
    assert second.token == "new" and second.value("Transfer-Encoding") == "chunked"
    assert first.body == second.body == body
    second.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize("ended", [False, True])
def test_a_body_refused_before_its_end_is_replayed(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, ended: bool
) -> None:
    """xAI checks the token before it reads the body.

    The proxy replays what has arrived and then forwards the rest.
    """
    client.request("POST", "/v1/files", "Content-Length: 6").send(b"abc")
    first = upstream.receive(body=False)
    assert first.connection.exactly(3) == b"abc"
    proxy.sign_in("new")
    first.answer(REFUSED)
    if ended:
        first.connection.close()
    # The proxy reads the response before the rest of the body.
    time.sleep(0.1)
    client.send(b"def")
    second = upstream.receive()
    assert (second.token, second.body) == ("new", b"abcdef")
    second.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    "start, rest",
    [
        (b"3\r\nabc", b"\r\n3\r\ndef\r\n0\r\n\r\n"),
        (b"3\r\nabc\r", b"\n3\r\ndef\r\n0\r\n\r\n"),
        (b"3\r\nabc\r\n", b"3\r\ndef\r\n0\r\n\r\n"),
        (b"3\r\nabc\r\n3", b"\r\ndef\r\n0\r\n\r\n"),
        (b"3\r\nabc\r\n0\r\nA: ", b"b\r\n\r\n"),
    ],
)
def test_a_chunked_body_refused_before_its_end_is_replayed(
    client: Client,
    proxy: ProxyProcess,
    ended: bool,
    upstream: ScriptedUpstream,
    start: bytes,
    rest: bytes,
) -> None:
    """The proxy stops parsing the client's chunks at any byte, and later continues there."""
    client.request("POST", "/v1/files", "Transfer-Encoding: chunked").send(start)
    first = upstream.receive(body=False)
    assert first.connection.chunk() == b"abc"
    proxy.sign_in("new")
    first.answer(REFUSED)
    if ended:
        first.connection.close()
    # The proxy reads the response before the rest of the body.
    time.sleep(0.1)
    client.send(rest)
    second = upstream.receive()
    assert (second.token, second.body) == ("new", b"abcdef" if b"def" in rest else b"abc")
    second.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize("size, again", [(10, True), (11, False)])
@pytest.mark.parametrize("by_length", [True, False])
def test_a_body_beyond_the_replay_limit_is_not_replayed(
    low_replay_proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    size: int,
    again: bool,
    by_length: bool,
) -> None:
    body = b"0123456789a"[:size]
    with low_replay_proxy.client() as client:
        if by_length:
            client.request("POST", "/v1/x", body=body)
        else:
            client.request("POST", "/v1/x", "Transfer-Encoding: chunked")
            client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, body))
        first = upstream.receive()
        assert first.body == body
        low_replay_proxy.sign_in("new")
        first.answer(REFUSALS["gzip"])
        if again:
            upstream.receive().answer()
            assert client.message().body == b"ok"
        else:
            assert_as_it_came(client.message(), REFUSALS["gzip"])
            assert upstream.quiet()


def test_a_refused_token_is_reported_even_if_the_body_cannot_be_replayed(
    low_replay_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """Otherwise large uploads alone would be refused until the token expires."""
    with low_replay_proxy.client() as client:
        client.request("POST", "/v1/x", body=b"0123456789a")
        start = time.monotonic()
        upstream.receive().answer(REFUSED)
        assert_as_it_came(client.message(), REFUSED)
        assert time.monotonic() - start < 3
        wait_for_note(low_replay_proxy)
        note(low_replay_proxy).unlink()
        low_replay_proxy.sign_in("young", age=5)
        client.request("POST", "/v1/x", body=b"0123456789a")
        upstream.receive().answer(REFUSED)
        assert_as_it_came(client.message(), REFUSED)
        assert not note(low_replay_proxy).exists() and time.monotonic() - start < 0.95


def test_bodies_beyond_the_replay_memory_are_not_replayed(
    low_replay_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    def refuse(request: Request, client: Client) -> bool:
        """Refuse a request, and return whether it is retried."""
        low_replay_proxy.sign_in("new")
        request.answer(REFUSED)
        came = client.sock not in readable(
            [
                client.sock,
                upstream.listener,
                *(connection.sock for connection in upstream.connections),
            ],
            TIMEOUT,
        )
        if came:
            upstream.receive().answer()
        assert client.message().status == (200 if came else 403)
        low_replay_proxy.sign_in("old")
        return came

    with low_replay_proxy.client() as one, low_replay_proxy.client() as two:
        one.request("POST", "/v1/x", body=b"0123456789")
        first = upstream.receive()
        two.request("POST", "/v1/x", body=b"0123456789")
        # There is no room beside the first body.
        assert not refuse(upstream.receive(), two)
        assert refuse(first, one)
        # There is room again.
        two.request("POST", "/v1/x", body=b"0123456789")
        assert refuse(upstream.receive(), two)
        one.request("POST", "/v1/x", body=b"0123456789")
        stream = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        # The head of the response is enough to free the copy of the first body.
        assert one.head().status == 200
        two.request("POST", "/v1/x", body=b"0123456789")
        assert refuse(upstream.receive(), two)
        stream.answer(b"ok")
        one.exactly(2)
        two.request("POST", "/v1/x", body=b"0123456789")
        cancelled = upstream.receive()
        two.reset()
        assert cancelled.connection.closed_within()
        # The cancelled request has freed its copy.
        one.request("POST", "/v1/x", body=b"0123456789")
        assert refuse(upstream.receive(), one)


# Other 403 responses


@both_ways
def test_a_slow_403_is_forwarded_after_two_seconds(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The client receives everything that has arrived by then."""
    client.request()
    start = time.monotonic()
    request = upstream.receive().answer(b"HTTP/1.1 403 X\r\nContent-Length: 6\r\n\r\n")
    for byte in (b"a", b"b"):
        request.answer(byte)
        time.sleep(0.5)
    assert client.silent()
    assert client.head().status == 403
    assert client.exactly(2) == b"ab" and 1.9 < time.monotonic() - start < 4
    for byte in (b"c", b"d", b"e", b"f"):
        request.answer(byte)
        assert client.exactly(1) == byte
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


@both_ways
@pytest.mark.parametrize("start, again", [(0, True), (60000, True), (70000, False)])
def test_a_large_403_is_forwarded_in_full(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, start: int, again: bool
) -> None:
    """The proxy searches the first 64 KiB for a refused token."""
    body = b"x" * start + NEW + b"y" * 200000
    client.request()
    first = upstream.receive()
    proxy.sign_in("new")
    first.answer(answer(403, body))
    if again:
        upstream.receive().answer(answer(403, body))
    assert_as_it_came(client.message(), answer(403, body))
    assert upstream.quiet()


@both_ways
@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"gzip, gzip"])
def test_a_403_that_cannot_be_decoded_is_forwarded(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, coding: bytes
) -> None:
    sent = answer(403, b"\x1f\x8bnonsense", b"Content-Encoding: " + coding)
    client.request()
    upstream.receive().answer(sent)
    assert_as_it_came(client.message(), sent)
    assert upstream.quiet()


@both_ways
def test_a_truncated_403_is_truncated_for_the_client(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/broken-403")
    request = upstream.receive().answer(b"HTTP/1.1 403 X\r\nContent-Length: 9\r\n\r\nabc")
    request.connection.reset()
    assert client.head().status == 403
    assert client.rest() == b"abc"


@both_ways
def test_other_statuses_are_never_retried(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    for status in (200, 400, 402, 404, 429, 500, 503):
        client.request()
        request = upstream.receive()
        proxy.sign_in(f"after-{status}")
        request.answer(answer(status, NEW))
        assert_as_it_came(client.message(), answer(status, NEW))
    assert upstream.quiet()


# No token


def test_requests_without_a_login_are_401(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    proxy.token_path.unlink()
    assert_refusal(client.ask(), 401, "login_required", "not signed in", "xai-login --device")
    # The running proxy uses the new login.
    proxy.sign_in("first")
    client.request()
    request = upstream.receive()
    assert request.token == "first"
    request.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize(
    "text, word",
    [("{", "not JSON"), ("", "not JSON"), ('{"access_token": "a", "expires_at": 1}', "auth.x.ai")],
)
def test_requests_with_an_unusable_login_are_401(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, text: str, word: str
) -> None:
    proxy.token_path.write_text(text)
    assert_refusal(client.ask(), 401, "login_required", str(proxy.token_path), word)
    assert upstream.quiet()


@contextlib.contextmanager
def no_descriptor(proxy: ProxyProcess) -> Iterator[None]:
    """Let the proxy open no file; open ones keep working."""
    limits = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, limits)


def token_of_next(client: Client, upstream: ScriptedUpstream) -> str:
    client.request()
    token = upstream.receive().answer().token
    assert client.message().body == b"ok"
    return token


def test_the_previous_token_serves_while_the_file_cannot_be_read(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The new token serves as soon as it can be read."""
    with proxy.client() as client, proxy.client() as probe:
        # Its connection to upstream is pooled.
        assert token_of_next(client, upstream) == "old"
        assert probe.ask("GET", "/readyz").status == 200
        with no_descriptor(proxy):
            proxy.sign_in("new")
            assert token_of_next(client, upstream) == token_of_next(client, upstream) == "old"
            assert probe.ask("GET", "/readyz").status == 200
        assert token_of_next(client, upstream) == "new"
        assert probe.ask("GET", "/readyz").status == 200


def test_a_refused_token_is_503_while_the_file_cannot_be_read(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    assert token_of_next(client, upstream) == "old"
    with no_descriptor(proxy):
        proxy.sign_in("new")
        client.request()
        upstream.receive().answer(REFUSED)
        unread = client.message()
    assert_refusal(unread, 503, "token_unavailable", "Too many open files")
    assert (unread.value("Retry-After"), unread.value("x-should-retry")) == ("1", "true")
    client.request()
    assert upstream.receive().answer().token == "new" and client.message().body == b"ok"


def test_a_first_login_that_cannot_be_read_is_503(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as client:
        assert_refusal(client.ask(), 401, "login_required")
        assert client.ask("GET", "/readyz").status == 503
        with no_descriptor(proxy):
            proxy.sign_in("first")
            unread = client.ask()
            assert_refusal(unread, 503, "token_unavailable", "Too many open files")
            assert (unread.value("Retry-After"), unread.value("x-should-retry")) == ("1", "true")
            unready = client.ask("GET", "/readyz")
            assert unready.status == 503 and b"cannot be read at the moment" in unready.body
        assert token_of_next(client, upstream) == "first"


def test_a_request_with_an_expired_token_waits_for_the_refresh(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    proxy.sign_in("old", expires_in=-1)
    client.request("POST", "/v1/x", body=b"{}")
    time.sleep(0.3)
    assert client.silent() and upstream.quiet()
    proxy.sign_in("new")
    request = upstream.receive(seconds=3)
    assert (request.token, request.body) == ("new", b"{}")
    request.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize(
    "retry_in, retry_after", [(None, "1"), (-60, "1"), (0.5, "1"), (4.6, "5"), (300, "10")]
)
def test_an_expired_token_that_cannot_be_refreshed_is_503(
    client: Client,
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    retry_in: float | None,
    retry_after: str,
) -> None:
    error = {
        "code": "temporarily_unavailable",
        "description": "The issuer is down.",
        "at": time.time(),
        "terminal": False,
        "retry_at": retry_in and time.time() + retry_in,
    }
    proxy.sign_in("old", expires_in=-1, refresh_error=error)
    start = time.monotonic()
    message = client.ask()
    assert_refusal(message, 503, "token_unavailable", "The issuer is down.")
    assert (message.value("Retry-After"), message.value("x-should-retry")) == (retry_after, "true")
    assert time.monotonic() - start < 3 and upstream.quiet()


def test_an_expired_token_of_an_ended_login_is_401(client: Client, proxy: ProxyProcess) -> None:
    proxy.sign_in(
        "old",
        expires_in=-1,
        refresh_error={
            "code": "invalid_grant",
            "description": "Refresh token has been revoked",
            "at": time.time(),
            "terminal": True,
        },
    )
    assert_refusal(client.ask(), 401, "login_required", "invalid_grant", "xai-login --device")


@pytest.mark.parametrize(
    "arrange, word",
    [
        (lambda proxy: proxy.refresher_lives(False), "xai-refresher"),
        (lambda proxy: proxy.sign_in("old", expires_in=-1, refresh_token=None), "no refresh token"),
    ],
)
def test_an_expired_token_without_a_refresher_is_503(
    client: Client, proxy: ProxyProcess, word: str, arrange: Callable[[ProxyProcess], None]
) -> None:
    proxy.sign_in("old", expires_in=-1)
    arrange(proxy)
    start = time.monotonic()
    message = client.ask()
    assert_refusal(message, 503, "token_unavailable", "expired", word)
    assert message.value("Retry-After") == "10" and time.monotonic() - start < 3


def test_both_requests_waited_ten_seconds_for_a_token(
    waiting_requests: tuple[ProxyProcess, Client, Client],
) -> None:
    proxy, refused, late = waiting_requests
    for path in ("/v1/refused", "/v1/late"):
        assert 9_900 < proxy.wait_for_request(path, 12)["duration_ms"] < 12_000
    assert_as_it_came(refused.message(), REFUSED)
    message = late.message()
    assert_refusal(message, 503, "token_unavailable", "expired", "10 s")
    assert (message.value("Retry-After"), message.value("x-should-retry")) == ("1", "true")


def test_no_token_is_ever_logged(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    """This checks the log of all tests above."""
    log = str(proxy.log_lines())
    assert "the-refresh-token" not in log and "Bearer" not in log and "validated" not in log
