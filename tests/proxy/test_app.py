"""The proxy's own endpoints: health, readiness, and the errors for unknown paths."""

import contextlib
import json
import os
import re
import select
import time

import pytest
from proxy_process import ProxyProcess
from scripted_upstream import ScriptedUpstream

from xaiproxy import client_keys, config, token_store
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy import access, app, forward

NOW = 1_800_000_000
KEY = "xaip_of-the-laptop"
LISTED = "https://chat.example"


# the nearest valid path


@pytest.mark.parametrize(
    "path, meant",
    [
        ("/models", "/v1/models"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/models/", "/v1/models/"),
        ("/api/v1/models", "/v1/models"),
        ("//v1/models", "/v1/models"),
        ("/openai/v2/x/y", "/v2/x/y"),
        ("/api.x.ai/v1/a%2Fb:c", "/v1/a%2Fb:c"),
        ("/v1models", "/v1"),
        ("/%76%31/models", "/v1/"),
    ],
)
def test_the_hint_names_the_nearest_valid_path(path, meant):
    assert f" {meant}" in app.hint(path) and f"there is no {path};" in app.hint(path)


@pytest.mark.parametrize("path", ["/", "/v1", "/v2", "//"])
def test_the_hint_for_the_base_url_itself_is_an_example(path):
    assert (
        app.hint(path)
        == f"there is nothing at {path}; the API begins with /v1/, for instance /v1/models"
    )


def test_the_hint_for_a_long_path_is_short():
    assert len(app.hint("/a" * 30000)) < 600 and len(app.hint("/a/v1/" + "a" * 60000)) < 600


# readiness


@pytest.fixture
def store(tmp_path) -> token_store.TokenStore:
    settings = config.from_environ(
        {"XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json")}, dotenv_path=os.devnull
    )
    return token_store.TokenStore(settings)


def put(store, *, refresher_age: float | None = 1, expires_in: float = 7200, **members) -> None:
    login = {
        "access_token": "the-access-token",
        "refresh_token": "the-refresh-token",
        "expires_at": NOW + expires_in,
    }
    store.path.write_text(json.dumps(login | members))
    store.path.chmod(0o600)
    if refresher_age is not None:
        store.lock_path.touch()
        os.utime(store.lock_path, (NOW - refresher_age,) * 2)


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(NOW + seconds))


def failure(
    terminal: bool = False, description: str = "The issuer gave a reason."
) -> dict[str, object]:
    return {
        "code": "invalid_grant",
        "description": description,
        "at": NOW - 5,
        "terminal": terminal,
        "retry_at": None,
    }


def test_ready_with_a_login_and_a_running_refresher(store):
    put(store)
    assert app.readiness_of(store, NOW) == (True, "signed in")


def test_not_ready_without_a_login(store):
    ready, reason = app.readiness_of(store, NOW)
    assert not ready and "missing" in reason and "xai-login --device" in reason


@pytest.mark.parametrize(
    "members, expected",
    [({"access_token": ""}, "corrupt"), ({"issuer": "https://another.example"}, "foreign")],
)
def test_not_ready_with_an_unusable_login(store, members, expected):
    put(store, **members)
    ready, reason = app.readiness_of(store, NOW)
    assert not ready and expected in reason
    # Everybody may read the reason.
    assert str(store.path) not in reason and "another.example" not in reason


@pytest.mark.parametrize("expires_in, ready", [(0.01, True), (0, False), (-0.01, False)])
def test_ready_until_the_token_expires(store, expires_in, ready):
    put(store, expires_in=expires_in)
    assert app.readiness_of(store, NOW)[0] is ready


@pytest.mark.parametrize(
    "members, expected",
    [
        ({}, f"the access token expired at {utc(-60)} and has not been renewed yet"),
        (
            {"refresh_error": failure()},
            f"the access token expired at {utc(-60)} and cannot be renewed (invalid_grant)",
        ),
        ({"refresh_error": failure(description="")}, "cannot be renewed (invalid_grant)"),
        (
            {"refresh_error": failure(terminal=True)},
            "the login has ended (invalid_grant); run `xai-login --device` to sign in",
        ),
    ],
)
def test_not_ready_with_an_expired_token(store, members, expected):
    put(store, expires_in=-60, **members)
    ready, reason = app.readiness_of(store, NOW)
    assert not ready and expected in reason


@pytest.mark.parametrize(
    "age, alive",
    [(None, False), (0, True), (59, True), (60, False), (61, False), (-59, True), (-61, False)],
)
def test_ready_without_a_refresher_while_the_token_is_valid(store, age, alive):
    put(store, refresher_age=age)
    expected = "signed in" if alive else f"no refresher; the login lapses at {utc(7200)}"
    assert app.readiness_of(store, NOW) == (True, expected)


def test_ready_without_a_refresh_token_while_the_token_is_valid(store):
    put(store, refresh_token=None, refresher_age=None)
    ready, reason = app.readiness_of(store, NOW)
    assert ready and "no refresh token" in reason and utc(7200) in reason


@pytest.mark.parametrize("terminal", [False, True])
def test_ready_with_a_failing_refresh_while_the_token_is_valid(store, terminal):
    put(store, refresh_error=failure(terminal))
    what = (
        "the login has ended (invalid_grant); run `xai-login --device` to sign in"
        if terminal
        else "its renewal fails (invalid_grant)"
    )
    assert app.readiness_of(store, NOW) == (
        True,
        f"the token is good until {utc(7200)}, but {what}",
    )


@pytest.mark.parametrize("expires_at", [0, 1, 99999999999])
def test_any_expiry_time_can_be_displayed(store, expires_at):
    put(store, expires_at=expires_at, refresher_age=None)
    ready, reason = app.readiness_of(store, NOW)
    assert ready is (expires_at > NOW) and re.search(r" at [0-9]{4}-[0-9-]{5} [0-9:]{5}", reason)


def test_the_reason_contains_no_token(store):
    for how in (
        {},
        {"expires_in": -1},
        {"refresh_error": failure()},
        {"issuer": "http://127.0.0.1:1"},
        {"refresh_token": None},
    ):
        put(store, **how)
        reason = app.readiness_of(store, NOW)[1]
        assert "the-access" not in reason and "the-refresh" not in reason


# over the wire


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> ProxyProcess:
    """A proxy without keys."""
    with ProxyProcess(
        tmp_path_factory.mktemp("proxy"), allowed_hosts="proxy.example", allowed_origins=LISTED
    ) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> ProxyProcess:
    """A proxy with one key."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "client-keys").write_text(f"laptop {client_keys.digest(KEY)}\n")
    with ProxyProcess(folder, allowed_origins=LISTED) as running:
        yield running


def ask(proxy, target, *fields, method="GET", host="localhost"):
    """Send one request with any Host and return the response."""
    with proxy.client() as client:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *fields, "", ""]
        client.send("\r\n".join(lines).encode("latin-1"))
        return client.message(body=method != "HEAD")


def error_of(answer) -> tuple[int, str, str]:
    """Return status, code and message of a response, which must be an error of the proxy's own."""
    error = json.loads(answer.body)["error"]
    assert answer.value("Content-Type") == "application/json"
    assert answer.value("X-XAI-Proxy-Error") == error["code"]
    assert set(error) == {"message", "type", "code"}
    assert answer.value("x-should-retry") == ("false" if answer.status < 500 else None)
    return answer.status, error["code"], error["message"]


def test_healthz_returns_200_while_the_process_runs(proxy, keyed):
    for running in (proxy, keyed):
        answer = running.ask("GET", "/healthz")
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})
        assert answer.value("Content-Type") == "application/json"


def test_readyz_follows_the_login_and_never_calls_upstream(tmp_path):
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(tmp_path, upstream=upstream.origin) as running,
    ):

        def readiness():
            answer = running.ask("GET", "/readyz")
            return answer.status, json.loads(answer.body)

        status, body = readiness()
        assert (status, body["status"]) == (503, "not ready") and "xai-login --device" in body[
            "reason"
        ]
        running.refresher_lives()
        running.sign_in()
        assert readiness() == (200, {"status": "ready", "reason": "signed in"})
        running.refresher_lives(False)
        status, body = readiness()
        assert status == 200
        assert re.fullmatch(
            r"no refresher; the login lapses at [0-9-]{10} [0-9:]{5} UTC", body["reason"]
        )
        running.sign_in(expires_in=-1)
        assert readiness()[0] == 503
        running.token_path.write_text("{")
        assert readiness()[0] == 503
        running.sign_in()
        assert readiness()[0] == 200
        assert select.select([upstream.listener], [], [], 0)[0] == []


@pytest.mark.parametrize(
    "path, status", [("/healthz", 200), ("/healthz?a=b", 200), ("/readyz", 503), ("/readyz?", 503)]
)
def test_health_and_readiness_need_no_authorization(proxy, keyed, path, status):
    for running in (proxy, keyed):
        for host in ("localhost", "evil.example", "10.0.0.1:8080", "", "<&>"):
            assert ask(running, path, host=host).status == status
        another_site = "Origin: http://evil.example", "Sec-Fetch-Site: cross-site"
        assert ask(running, path, *another_site).status == status
        with running.client() as client:
            client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert client.message().status == status


# Only the plain spelling needs no authorization.
@pytest.mark.parametrize(
    "path, status",
    [
        ("/", 200),
        ("/nothing", 404),
        ("/v1", 404),
        ("/v10/models", 404),
        ("/V1/models", 404),
        ("/static/x", 404),
        ("/healthz/", 404),
        ("/healthz%2F", 404),
        ("/healthz;a", 404),
        ("/readyz/x", 404),
        ("//healthz", 404),
        ("/%68ealthz", 404),
    ],
)
def test_every_other_path_refuses_forged_requests(proxy, keyed, path, status):
    for running in (proxy, keyed):
        assert error_of(ask(running, path, host="evil.example"))[:2] == (403, "host_not_allowed")
        assert error_of(ask(running, path, "Origin: http://evil.example"))[:2] == (
            403,
            "origin_not_allowed",
        )
        assert error_of(ask(running, path, "Sec-Fetch-Site: cross-site"))[:2] == (
            403,
            "origin_not_allowed",
        )
        assert ask(running, path).status == status
        assert ask(running, path, f"Origin: {LISTED}").status == status
    assert ask(proxy, path, host="proxy.example:1").status == status
    with_key = ask(
        keyed, path, f"X-Api-Key: {KEY}", "Origin: http://evil.example", host="evil.example"
    )
    assert with_key.status == status


@pytest.mark.parametrize("path", ["/v1/models", "/v2/x", "/v1/", "/v1/../../x", "/v1/v1/models"])
def test_the_api_refuses_forged_requests_and_requires_a_key(proxy, keyed, path):
    assert error_of(ask(proxy, path, host="evil.example"))[:2] == (403, "host_not_allowed")
    assert error_of(ask(proxy, path, "Sec-Fetch-Site: cross-site"))[:2] == (
        403,
        "origin_not_allowed",
    )
    assert error_of(ask(keyed, path))[:2] == (401, "client_key_required")
    assert ask(keyed, path).value("WWW-Authenticate") == 'Bearer realm="xaiproxy"'


def test_the_name_of_the_key_is_logged(keyed):
    ask(keyed, "/right-key", f"X-Api-Key: {KEY}")
    assert keyed.wait_for_request("/right-key")["key"] == "laptop"
    ask(keyed, "/wrong-key", "X-Api-Key: wrong")
    assert keyed.wait_for_request("/wrong-key")["key"] is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1//models", "/v2/"])
def test_the_proxy_answers_preflights_itself(proxy, keyed, path):
    asked = "Access-Control-Request-Method: POST"
    for running in (proxy, keyed):
        answer = ask(running, path, f"Origin: {LISTED}", asked, method="OPTIONS")
        assert (answer.status, answer.value("Access-Control-Allow-Origin")) == (204, LISTED)
        assert answer.value("Content-Length") is None and answer.value("Transfer-Encoding") is None
        refused = ask(running, path, "Origin: http://evil.example", asked, method="OPTIONS")
        assert error_of(refused)[:2] == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    "path, meant",
    [
        ("/models", "/v1/models"),
        ("/api/v1/models?key=x", "/v1/models"),
        ("/v1", "/v1/models"),
        ("/a%2Fb%ff", "/v1/a%2Fb%ff"),
        ("/<b>", "/v1/<b>"),
    ],
)
def test_an_unknown_path_is_a_json_404_that_names_the_nearest_valid_path(proxy, path, meant):
    status, code, message = error_of(proxy.ask("GET", path))
    assert (status, code) == (404, "not_found") and meant in message and "key=x" not in message
    assert error_of(proxy.ask("POST", path, body=b"{}"))[:2] == (404, "not_found")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
def test_another_method_is_a_json_405_with_allow(proxy, method):
    for path in ("/healthz", "/readyz"):
        answer = proxy.ask(method, path)
        assert error_of(answer)[:2] == (405, "method_not_allowed")
        assert answer.value("Allow") == "GET, HEAD"


def test_head_is_answered_without_a_body(proxy):
    with proxy.client() as client:
        for path, status in (("/healthz", 200), ("/readyz", 503), ("/nothing", 404)):
            answer = client.ask("HEAD", path)
            assert answer.status == status and int(answer.value("Content-Length")) > 10
            # No byte of a body precedes this response.
            assert client.ask("GET", "/healthz").status == 200


SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_an_unread_body_closes_the_connection(proxy):
    """Otherwise it would be taken for the next request."""
    with proxy.client() as client:
        client.request("POST", "/nothing", f"Content-Length: {2 * len(SMUGGLED)}").send(SMUGGLED)
        answer = client.message()
        assert (answer.status, answer.value("Connection")) == (404, "close")
        client.send(SMUGGLED)
        assert client.rest() == b""


def test_a_body_that_arrives_with_its_head_is_no_request(proxy):
    with proxy.client() as client:
        client.request("POST", "/nothing", body=SMUGGLED)
        assert client.message().status == 404
        # No response of /healthz precedes this one.
        assert client.ask("GET", "/readyz").status == 503


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 0\r\nContent-Length: 0\r\n",
        "Content-Length: +0\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "X: y\n",
        "X: y\r\n folded\r\n",
        "X : y\r\n",
        "Content_Length: 0\r\n",
        "Host: localhost\r\n",
        "X: " + "a" * 50 + "\0\r\n",
        "X: y\r\n" * 200,
    ],
)
def test_an_ambiguous_request_is_refused_and_closes_the_connection(proxy, lines):
    for path in ("/v1/models", "/healthz"):
        with proxy.client() as client:
            client.send(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n0\r\n\r\n".encode()
                + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            answer = client.message()
            assert (error_of(answer)[1], answer.value("Connection")) == ("bad_request", "close")
            # The proxy may reset, since it has not read the bytes after the head.
            with contextlib.suppress(ConnectionResetError):
                assert client.rest() == b""


def test_a_head_may_arrive_byte_by_byte(proxy):
    with proxy.client() as client:
        for byte in b"\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n":
            client.send(bytes([byte]))
        assert client.message().status == 200 and client.rest() == b""


def test_an_internal_error_is_a_json_500(tmp_path, caplog):
    settings = config.from_environ(
        {"XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json")}, dotenv_path=os.devnull
    )
    store = token_store.TokenStore(settings)
    gate = access.Access(settings, client_keys.ClientKeys(settings.client_keys_file))
    proxy = forward.Proxy(settings, store, gate, Pool(settings))
    flask_app = app.create_app(proxy, store, gate)

    @flask_app.get("/fault")
    def fault():
        raise RuntimeError("of ours")

    answer = flask_app.test_client().get("/fault")
    assert answer.status_code == 500
    assert answer.json["error"]["code"] == "internal_error"
    assert answer.headers["X-XAI-Proxy-Error"] == "internal_error" and "of ours" not in answer.text
    assert "RuntimeError: of ours" in caplog.text
