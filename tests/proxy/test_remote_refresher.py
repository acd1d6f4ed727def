"""XAI_PROXY_REFRESHER: a proxy whose token file holds no refresh token asks another machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess
from scripted_upstream import OK, ScriptedUpstream

from xaiproxy import config, tokens
from xaiproxy.proxy.remote_refresher import ASKED_TIME, RETRY_INTERVAL, RemoteRefresher

REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
FAILED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
# Nothing listens there.
NOWHERE = "http://127.0.0.1:1"
ASKED = "asked the refresher at "
CANNOT_ASK = "the refresher at "


@pytest.fixture
def remote() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as remote:
        yield remote


@pytest.fixture
def start(tmp_path: Path, upstream: ScriptedUpstream) -> Iterator[Callable[..., ProxyProcess]]:
    """Start a proxy that holds a login without a refresh token."""
    with contextlib.ExitStack() as stack:

        def start(refresher: str, environ: dict | None = None, **members) -> ProxyProcess:
            proxy = ProxyProcess(
                tmp_path, upstream=upstream.origin, refresher=refresher, environ=environ
            )
            stack.enter_context(proxy)
            proxy.sign_in("old", refresh_token=None, **members)
            return proxy

        yield start


def ready(proxy: ProxyProcess) -> tuple[int, dict[str, str]]:
    answer = proxy.ask("GET", "/readyz")
    return answer.status, json.loads(answer.body)


def refuse(client: Client, upstream: ScriptedUpstream, probe: bytes | None = REFUSED) -> None:
    """Send a request, and let upstream refuse its token.

    `probe`: upstream's response to the proxy's own request with that token, if there is one.
    """
    client.request()
    request = upstream.receive()
    assert request.token == "old"
    request.answer(REFUSED)
    if probe is not None:
        answer_probe(upstream, probe)


def answer_probe(upstream: ScriptedUpstream, answer: bytes) -> None:
    request = upstream.receive()
    assert (request.line, request.token) == ("GET /v1/models HTTP/1.1", "old")
    request.answer(answer)


def assert_unavailable(answer) -> None:
    assert answer.status == 503
    assert json.loads(answer.body)["error"]["code"] == "token_unavailable"
    assert (answer.value("Retry-After"), answer.value("x-should-retry")) == ("45", "true")


def logged(proxy: ProxyProcess, text: str) -> int:
    """Return the number of lines that begin with `text`, once there is one."""
    proxy.wait_for_log(lambda line: line["message"].startswith(text))
    return sum(line["message"].startswith(text) for line in proxy.log_lines())


def test_a_refused_token_is_reported_and_waited_for(start, upstream, remote):
    proxy = start(remote.origin)
    assert ready(proxy) == (200, {"status": "ready", "reason": "signed in"})
    with proxy.client() as client:
        refuse(client, upstream)
        report = remote.receive()
        assert (report.line, report.body) == (
            "POST /refused HTTP/1.1",
            tokens.fingerprint("old").encode(),
        )
        assert not any("old" in value for _, value in report.fields)
        report.answer(ACCEPTED)
        assert_unavailable(client.message())
    # Further requests do not reach upstream, and the proxy stays in the Service.
    assert_unavailable(proxy.ask())
    assert upstream.quiet() and remote.quiet()
    status, members = ready(proxy)
    assert (status, members["reason"]) == (200, "signed in")
    assert "requests get 503 until another one comes" in members["warning"]
    proxy.wait_for_log(lambda line: "requests cannot be served" in line["message"])
    # The new token is used at once.
    proxy.sign_in("new", refresh_token=None)
    with proxy.client() as client:
        client.request()
        request = upstream.receive()
        assert request.token == "new"
        request.answer()
        assert client.message().status == 200
    assert ready(proxy) == (200, {"status": "ready", "reason": "signed in"})
    proxy.wait_for_log(lambda line: "requests can be served again" in line["message"])
    assert logged(proxy, ASKED) == 1


def test_a_refusal_of_one_request_does_not_refuse_the_others(start, upstream, remote):
    """Also upstream's 401 for another cause looks like a refused token."""
    proxy = start(remote.origin)
    with proxy.client() as client:
        refuse(client, upstream, probe=OK)
        assert client.message().status == 401
        # For some seconds, the next ones cost upstream no request of the proxy's own.
        client.request()
        upstream.receive().answer(REFUSED)
        assert client.message().status == 401
        client.request()
        upstream.receive().answer()
        assert client.message().status == 200
    assert ready(proxy) == (200, {"status": "ready", "reason": "signed in"})
    assert upstream.quiet() and remote.quiet()


@pytest.mark.parametrize("probe", [FAILED, None], ids=["503", "closed"])
def test_a_token_is_reported_unless_the_api_accepts_it(start, upstream, remote, probe):
    proxy = start(remote.origin)
    with proxy.client() as client:
        client.request()
        upstream.receive().answer(REFUSED)
        request = upstream.receive()
        if probe is None:
            request.connection.close()
        else:
            request.answer(probe)
        remote.receive().answer(ACCEPTED)
        assert_unavailable(client.message())


def test_many_refused_requests_make_one_report(start, upstream, remote):
    proxy = start(remote.origin)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(20)]
        for client in clients:
            client.request()
        for request in [upstream.receive() for _ in clients]:
            request.answer(REFUSED)
        answer_probe(upstream, REFUSED)
        remote.receive().answer(ACCEPTED)
        for client in clients:
            assert_unavailable(client.message())
    assert remote.quiet() and logged(proxy, ASKED) == 1


@pytest.mark.parametrize(
    "answer",
    [None, FAILED, b"nonsense\r\n\r\n", b""],
    ids=["hangs", "503", "no HTTP", "closes"],
)
def test_a_refresher_that_does_not_accept_is_as_none(start, upstream, remote, answer):
    proxy = start(remote.origin)
    with proxy.client() as client:
        refuse(client, upstream)
        report = remote.receive()
        if answer is not None:
            report.answer(answer).connection.close()
        assert client.message().body == b"no"
        status, members = ready(proxy)
        assert status == 503 and "the API refuses the access token" in members["reason"]
        # It delays no further request, and costs upstream none.
        refuse(client, upstream, probe=None)
        assert client.message().body == b"no"
    assert upstream.quiet() and remote.quiet()
    assert logged(proxy, CANNOT_ASK) == 1


def test_a_refresher_that_cannot_be_reached_is_as_none(start, upstream):
    proxy = start(NOWHERE)
    with proxy.client() as client:
        refuse(client, upstream)
        assert client.message().body == b"no"
    line = proxy.wait_for_log(lambda line: line["message"].startswith(CANNOT_ASK))
    assert line["message"].endswith("cannot be asked for another access token: Connection refused")
    assert ready(proxy)[0] == 503


def test_a_refresher_over_https_is_verified(start, upstream, certificate):
    ca, context = certificate
    with ScriptedUpstream(context) as remote:
        proxy = start(remote.origin, environ={"SSL_CERT_FILE": str(ca)})
        with proxy.client() as client:
            refuse(client, upstream)
            report = remote.receive()
            assert report.body == tokens.fingerprint("old").encode()
            report.answer(ACCEPTED)
            assert_unavailable(client.message())


def test_a_young_token_is_reported_when_it_is_refused_twice(start, upstream, remote):
    proxy = start(remote.origin, age=10)
    with proxy.client() as client:
        refuse(client, upstream)
        again = upstream.receive()
        assert again.token == "old" and remote.quiet()
        again.answer(REFUSED)
        remote.receive().answer(ACCEPTED)
        assert_unavailable(client.message())
    assert ready(proxy)[0] == 200


def test_a_login_that_has_ended_is_not_asked_for(start, upstream, remote):
    ended = {"code": "invalid_grant", "description": "", "at": time.time(), "terminal": True}
    proxy = start(remote.origin, refresh_error=ended)
    with proxy.client() as client:
        refuse(client, upstream, probe=None)
        answer = client.message()
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (401, "login_required")
    assert remote.quiet()


def test_the_end_of_the_login_ends_the_wait_for_a_token(start, upstream, remote):
    proxy = start(remote.origin)
    with proxy.client() as client:
        refuse(client, upstream)
        remote.receive().answer(ACCEPTED)
        assert_unavailable(client.message())
    ended = {"code": "invalid_grant", "description": "", "at": time.time(), "terminal": True}
    proxy.sign_in("old", refresh_token=None, refresh_error=ended)
    assert proxy.ask().value("X-XAI-Proxy-Error") == "login_required"


def test_a_login_with_a_refresh_token_has_its_refresher_here(start, upstream, remote):
    proxy = start(remote.origin)
    proxy.sign_in("old")
    proxy.refresher_lives()
    with proxy.client() as client:
        refuse(client, upstream, probe=None)
        note = proxy.token_path.with_name("tokens.json.refused")
        while not note.exists():
            time.sleep(0.02)
        proxy.sign_in("new")
        upstream.receive().answer()
        assert client.message().status == 200
    assert remote.quiet()


def test_an_expired_token_is_unavailable_until_the_file_has_another(start, upstream, remote):
    proxy = start(remote.origin, expires_in=-1)
    assert_unavailable(proxy.ask())
    assert ready(proxy)[0] == 503
    proxy.sign_in("new", refresh_token=None)
    with proxy.client() as client:
        client.request()
        upstream.receive().answer()
        assert client.message().status == 200
    assert remote.quiet()


def test_the_wait_for_a_token_ends_and_the_refresher_is_asked_again(remote):
    now = 0.0
    environ = {"XAI_PROXY_REFRESHER": remote.origin}
    asking = RemoteRefresher(config.from_environ(environ, dotenv_path=os.devnull), lambda: now)
    login = tokens.Login("old", 1e10)

    def is_accepted(answer: bytes = ACCEPTED) -> bool:
        """Whether the refresher is asked, answers so, and has then been asked."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(lambda: remote.receive().answer(answer))
            return asking.ask(login)

    assert not is_accepted(FAILED) and not asking.is_asked(login)
    now += RETRY_INTERVAL
    assert is_accepted() and asking.is_asked(login)
    now += ASKED_TIME - 1
    # Without another report.
    assert asking.ask(login) and asking.is_asked(login)
    assert not asking.is_asked(tokens.Login("new", 1e10))
    now += 1
    assert not asking.is_asked(login)
    assert is_accepted() and asking.is_asked(login)
