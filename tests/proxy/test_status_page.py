"""The status page: its shell, its data, who gets them, and what a real browser shows."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import client_snippets
import pytest
from browser import Browser
from proxy_process import ProxyProcess
from sandbox import Sandbox, until
from scripted_upstream import ScriptedUpstream

from xaiproxy import client_keys, config, quota, refresher_status, tokens
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.history import History
from xaiproxy.proxy.numbers import Numbers
from xaiproxy.proxy.status import Status
from xaiproxy.proxy.usage import Usage
from xaiproxy.quota import Quota
from xaiproxy.token_store import TokenStore

KEY = "xaip_of-the-laptop"
HTML = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"
CHROMIUM = "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = "Connection: Upgrade", "Upgrade: websocket"
REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"


@pytest.fixture
def start(tmp_path: Path, upstream: ScriptedUpstream) -> Iterator[Any]:
    """Start a proxy of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(*keys: str, **settings: Any) -> ProxyProcess:
            lines = [f"laptop {client_keys.digest(key)}\n" for key in keys]
            if keys:
                (tmp_path / "client-keys").write_text("".join(lines))
            proxy = ProxyProcess(tmp_path, upstream=upstream.origin, **settings)
            return stack.enter_context(proxy)

        yield start


def data(proxy: ProxyProcess, *fields: str) -> dict[str, Any]:
    answer = proxy.ask("GET", "/status.json", *fields)
    assert (answer.status, answer.value("Content-Type")) == (200, "application/json")
    return json.loads(answer.body)


# The shell


def test_the_policy_allows_this_style_and_this_script_alone(running: ProxyProcess):
    answer = running.ask("GET", "/", HTML)
    assert (answer.status, answer.value("Content-Type")) == (200, "text/html; charset=utf-8")
    page = answer.body.decode()
    assert page == client_snippets.PAGE.read_text()

    def hashed(name: str) -> str:
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert answer.value("Content-Security-Policy") == (
        f"default-src 'none'; style-src 'sha256-{hashed('style')}'; "
        f"script-src 'sha256-{hashed('script')}'; connect-src 'self'; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert answer.value("X-Content-Type-Options") == "nosniff"


def test_the_page_loads_nothing_and_has_no_markup_that_its_policy_blocks():
    page = client_snippets.BLOCK.sub("", client_snippets.PAGE.read_text())
    assert not re.search(r"\b(src|href|action)=|url\(|@import|innerHTML|\bon[a-z]+=\"", page)
    assert set(re.findall(r"https?://[^\s\"`]+", page)) == {
        "http://www.w3.org/2000/svg",
        "http://127.0.0.1:9090",
    }


def test_a_browser_asks_again_and_gets_the_page_only_when_it_has_changed(running: ProxyProcess):
    page = running.ask("GET", "/", HTML)
    assert (page.value("Cache-Control"), page.value("Vary")) == ("no-cache", "Accept")
    again = running.ask("GET", "/", HTML, f"If-None-Match: {page.value('ETag')}")
    assert (again.status, again.body) == (304, b"")
    assert running.ask("GET", "/", HTML, 'If-None-Match: "another"').body == page.body
    head = running.ask("HEAD", "/", HTML)
    assert (head.status, head.value("Content-Length")) == (200, page.value("Content-Length"))


@pytest.mark.parametrize("accept", [[HTML], [], ["Accept: */*"], ["Accept: text/html"]])
def test_a_client_that_takes_html_gets_the_page(running: ProxyProcess, accept: list[str]):
    assert running.ask("GET", "/", *accept).body.startswith(b"<!doctype html>")


@pytest.mark.parametrize("accept", ["application/json", "application/json, text/plain, */*"])
def test_an_agent_that_wants_json_gets_a_hint(running: ProxyProcess, accept: str):
    answer = running.ask("GET", "/", f"Accept: {accept}")
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (404, "not_found")
    assert "the API begins with /v1/" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_only_get_and_head_are_answered(running: ProxyProcess, path: str):
    answer = running.ask("POST", path)
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (405, "method_not_allowed")
    assert running.ask("HEAD", path).status == 200


def test_the_page_has_the_clients_of_conf_clients():
    """If not: PYTHONPATH=tests/support python tests/support/client_snippets.py"""
    page = client_snippets.PAGE.read_text()
    assert client_snippets.BLOCK.findall(page) == [client_snippets.block()]
    files = {path.name for path in (client_snippets.ROOT / "conf" / "clients").iterdir()}
    assert {client["file"] for client in json.loads(client_snippets.block())} == files - {
        *("README.md", "launch.ini")
    }


# Who gets them


def test_the_data_needs_a_key_where_there_are_keys(start: Any):
    proxy = start(KEY)
    for fields in ([], ["Authorization: Bearer wrong"]):
        answer = proxy.ask("GET", "/status.json", *fields)
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (401, "client_key_required")
        assert b"expires" not in answer.body and b"hour" not in answer.body
    # Another spelling of the path is no way around it.
    for path in ("//status.json", "/%73tatus.json", "/status%2Ejson"):
        assert proxy.ask("GET", path).status == 401
    assert data(proxy, f"Authorization: Bearer {KEY}")["state"] == "not_serving"
    assert data(proxy, f"X-Api-Key: {KEY}")["state"] == "not_serving"
    assert proxy.ask("GET", "/", HTML).status == 200
    (proxy.token_path.parent / "client-keys").write_text("")
    assert proxy.ask("GET", "/status.json", f"X-Api-Key: {KEY}").status == 401
    assert proxy.ask("GET", "/", HTML).status == 200


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_a_foreign_page_and_a_rebound_name_are_refused(running: ProxyProcess, path: str):
    for field in ("Sec-Fetch-Site: cross-site", "Origin: http://evil.example"):
        answer = running.ask("GET", path, field)
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (403, "origin_not_allowed")
        assert answer.value("Access-Control-Allow-Origin") is None
    with running.client() as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n".encode())
        assert client.message().value("X-XAI-Proxy-Error") == "host_not_allowed"
        client.send(
            f"OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
            "Access-Control-Request-Method: GET\r\n"
            "Access-Control-Request-Headers: x-requested-with\r\n\r\n".encode()
        )
        assert client.message().status == 403


def test_a_browser_on_another_machine_gets_both(running: ProxyProcess):
    """Over plain http, a browser sends neither Origin nor Sec-Fetch-Site there."""

    def ask(path: str, *fields: str) -> int:
        lines = [f"GET {path} HTTP/1.1", "Host: 10.1.2.3:9090", CHROMIUM, *fields, "", ""]
        with running.client() as client:
            client.send("\r\n".join(lines).encode())
            return client.message().status

    assert ask("/", HTML, "Upgrade-Insecure-Requests: 1") == 200
    assert ask("/status.json", "X-Requested-With: xaiproxy") == 200
    # The <img> of any page, and a navigation that it begins.
    assert ask("/status.json", "Accept: image/*") == ask("/", "Accept: image/*") == 403
    assert ask("/status.json", HTML, "Upgrade-Insecure-Requests: 1") == 403
    # Android's WebView adds the name of the app to every request of every page.
    assert ask("/status.json", "X-Requested-With: com.example.app") == 403
    assert ask("/v1/models", "X-Requested-With: com.example.app") == 403


# The data


def test_the_data_has_no_secret_and_no_path_and_is_not_stored(start: Any):
    proxy = start(KEY)
    proxy.sign_in("the-access-token", account="you@example.org")
    answer = proxy.ask("GET", "/status.json", f"X-Api-Key: {KEY}")
    assert answer.value("Cache-Control") == "no-store"
    secrets = (KEY, "the-access-token", "the-refresh-token", "you@example", str(proxy.token_path))
    for secret in (*secrets, os.fspath(proxy.token_path.parent), tokens.fingerprint(KEY)):
        assert secret.encode() not in answer.body


def test_each_state_of_the_login_comes_with_what_to_type(start: Any, upstream: ScriptedUpstream):
    proxy = start()

    def state() -> tuple[str, str, str | None]:
        shown = data(proxy)
        ready = json.loads(proxy.ask("GET", "/readyz").body)["reason"]
        assert shown["sentence"] == f"{ready[0].upper()}{ready[1:]}."
        return shown["state"], shown["verdict"], shown["command"]

    assert state() == ("not_serving", "no_login", "xai-login --device")
    proxy.sign_in()
    assert state() == ("attention", "no_refresher", "xai-refresher")
    proxy.refresher_lives()
    assert state() == ("serving", "good", None)
    failure = {"code": "unreachable", "description": "no route", "at": time.time()}
    proxy.sign_in(refresh_error=failure)
    assert state() == ("attention", "failing", "xai-login --doctor")
    proxy.sign_in(refresh_error={**failure, "code": "invalid_grant", "terminal": True})
    assert state() == ("attention", "ended", "xai-login --device")
    proxy.sign_in(expires_in=-1)
    assert state() == ("not_serving", "expired", "xai-login --doctor")
    proxy.token_path.write_text("{half")
    assert state() == ("not_serving", "unusable", "xai-login --device")


def test_the_token_has_its_times(start: Any):
    proxy = start()
    assert data(proxy)["token"] is None
    proxy.sign_in(expires_in=3000, age=1000)
    token = data(proxy)["token"]
    assert token["expires_at"] - token["obtained_at"] == pytest.approx(4000, abs=0.1)
    # A fifth of the lifetime before expiry, if there is a refresher.
    assert token["next_refresh_at"] is None and token["refused"] is False
    proxy.refresher_lives()
    token = data(proxy)["token"]
    assert token["next_refresh_at"] == pytest.approx(token["expires_at"] - 800, abs=0.1)


def test_a_refused_token_is_shown(start: Any, upstream: ScriptedUpstream):
    proxy = start()
    proxy.sign_in(age=10, refresh_token=None)
    with proxy.client() as client:
        client.request()
        upstream.receive().answer(REFUSED)
        upstream.receive().answer(REFUSED)
        assert client.message().status == 401
    shown = data(proxy)
    assert (shown["state"], shown["token"]["refused"]) == ("not_serving", True)


def test_requests_are_shown_now_and_in_the_hour(start: Any, upstream: ScriptedUpstream):
    proxy = start(max_connections=100)
    proxy.sign_in()
    assert data(proxy)["now"] == {
        "in_flight": 0,
        "streams": 0,
        "websockets": 0,
        "connections": 1,
        "connections_limit": 100,
    }
    with proxy.client() as stream, proxy.client() as tunnel:
        stream.request()
        upstream.receive().answer(STREAM)
        stream.head()
        tunnel.request("GET", "/v1/realtime", *UPGRADE, "Sec-WebSocket-Key: a")
        switched = upstream.receive().answer(SWITCHED)
        tunnel.head()
        now = data(proxy)["now"]
        assert [now[name] for name in ("in_flight", "streams", "websockets")] == [2, 1, 1]
        switched.connection.close()
    with proxy.client() as client:
        client.request()
        upstream.receive().answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
        client.message()

    def busy_minutes() -> list[dict[str, Any]]:
        minutes = data(proxy)["hour"]
        assert len(minutes) == 60
        # Requests of the page itself do not count.
        sums = [sum(minute[name] for minute in minutes) for name in ("requests", "errors")]
        return [minute for minute in minutes if minute["requests"]] if sums == [3, 1] else []

    assert all(minute["first_byte_p50"] > 0 for minute in until(busy_minutes))


def test_when_all_connections_are_in_use_the_page_is_served(start: Any, upstream: ScriptedUpstream):
    proxy = start(max_connections=2)
    proxy.sign_in()
    proxy.refresher_lives()
    with proxy.client() as first, proxy.client() as second:
        for client in (first, second):
            client.request()
            upstream.receive().answer(STREAM)
            client.head()
        assert proxy.ask("GET", "/", HTML).status == 200
        shown = data(proxy)
        assert shown["state"] == "saturated" and "All 2 connections" in shown["sentence"]
        assert shown["now"]["in_flight"] == shown["now"]["connections_limit"] == 2
        assert proxy.ask("GET", "/v1/models").value("X-XAI-Proxy-Error") == "too_many_connections"
    until(lambda: data(proxy)["state"] == "serving")


def test_tokens_and_rate_limits_of_responses_are_shown(start: Any, upstream: ScriptedUpstream):
    proxy = start(KEY)
    proxy.sign_in()
    key = f"Authorization: Bearer {KEY}"
    shown = data(proxy, key)
    assert (shown["tokens_today"], shown["rate_limits"]) == ([], {})
    usage = {"input_tokens": 7, "output_tokens": 5}
    content = json.dumps({"model": "grok-4.5", "usage": usage}).encode()
    with proxy.client() as client:
        client.request("POST", "/v1/responses", key, body=b"{}")
        upstream.receive().answer(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"x-ratelimit-limit-requests: 7200\r\nx-ratelimit-remaining-requests: 7199\r\n"
            b"x-ratelimit-limit-tokens: 50000000\r\nx-ratelimit-remaining-tokens: 49999999\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
        )
        assert client.message().status == 200
    until(lambda: data(proxy, key)["tokens_today"])
    shown = data(proxy, key)
    counted = {"input": 7, "cached_input": 0, "output": 5, "reasoning": 0}
    assert shown["tokens_today"] == [{"model": "grok-4.5", "key": "laptop", **counted}]
    limits = shown["rate_limits"]
    assert (limits["requests"]["limit"], limits["requests"]["remaining"]) == (7200, 7199)
    assert limits["tokens"]["remaining"] == 49999999


def test_the_quota_is_the_one_last_asked_for(start: Any, upstream: ScriptedUpstream):
    proxy = start()
    proxy.sign_in()
    assert data(proxy)["quota"] is None and data(proxy)["asks_quota"] is True
    settings = {
        "XAI_PROXY_TOKEN_PATH": str(proxy.token_path),
        "XAI_PROXY_ISSUER": "http://127.0.0.1:1",
        "XAI_PROXY_UPSTREAM": upstream.origin,
    }
    store = TokenStore(config.from_environ(settings, dotenv_path=os.devnull))
    quota.write(store, store.load(), Quota(1.8e9, 42.5, "weekly", resets_at=1.9e9))
    shown = data(proxy)["quota"]
    assert [shown[name] for name in ("used_percent", "period", "asked_at", "resets_at")] == [
        42.5,
        "weekly",
        1.8e9,
        1.9e9,
    ]


def test_the_data_of_a_full_day_takes_the_event_loop_less_than_2_ms(tmp_path: Path):
    settings = config.from_environ(
        {"XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json")}, dotenv_path=os.devnull
    )
    store, history, now = TokenStore(settings), History(), time.time()
    login = {"access_token": "a", "refresh_token": "b", "expires_at": now + 999}
    store.path.write_text(json.dumps(login))
    refresher_status.write(store, refresher_status.Status(now, login=tokens.fingerprint("a")))
    quota.write(store, store.load(), Quota(now, 1))
    record = RequestRecord(
        *("POST", "/v1/responses", now, 200, 1, 1, 0.1, 0, None, "done", None, "", "", ""),
        *(None, None, None, "", None),
    )
    for minute in range(60):
        for step in range(50):
            times = {"started_at": now - 60 * minute, "first_byte": 0.01 * 1.1**step}
            history.add(record._replace(**times))
    for key in range(100):
        history.add_usage(now, "grok-4.5", f"key-{key}", Usage("grok-4.5", 1, 1, 1, 1))
    gauges = dict.fromkeys(
        ("in_flight", "streams", "websockets", "connections", "connections_limit"), 0.0
    )
    status = Status(store, lambda: Numbers(history=history, gauges=gauges))

    def seconds() -> float:
        begin = time.thread_time()
        json.dumps(status.members(now))
        return time.thread_time() - begin

    assert len(status.members(now)["tokens_today"]) == 100
    assert min(seconds() for _ in range(20)) < 0.002


# In a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"there is no {program} here")
    with contextlib.closing(Browser(tmp_path / "browser")) as browser:
        yield browser


def test_a_browser_shows_the_verdict_and_what_to_copy(
    browser: Browser, sandbox: Sandbox, tmp_path: Path
):
    with ProxyProcess(tmp_path, issuer=sandbox.url, upstream=sandbox.url) as proxy:
        browser.open(proxy.url)
        shown = lambda: browser.text("#verdict")  # noqa: E731
        until(lambda: shown().startswith("Not serving"), 20)
        assert browser.text("#command code") == "xai-login --device"

        # Without a reload, the next polls show the login and the requests.
        sandbox.write_login(proxy.token_path)
        proxy.refresher_lives()
        until(lambda: shown() == "Serving\nSigned in.", 20)
        assert browser.text("#address code") == f"{proxy.url}/v1"
        assert proxy.ask("GET", "/v1/models").status == 200
        until(lambda: "1 request\n" in browser.text("#hour"), 20)
        assert "valid for" in browser.text("#token")

        browser.click(".chips button:nth-child(5)")
        assert f'base_url = "{proxy.url}/v1"' in browser.text("#clients pre")
        browser.click("#clients .row button")
        until(lambda: browser.text("#clients .row button") == "Copied")

        width = "return document.documentElement.scrollWidth - innerWidth"
        browser.command("POST", "/window/rect", {"width": 500, "height": 900})
        assert browser.run(width) <= 0
        assert browser.console() == []
        folder, port = proxy.token_path.parent, proxy.port
    until(lambda: shown().startswith("No connection"), 20)

    # After a restart with a client key the page asks for it.
    (folder / "client-keys").write_text(f"laptop {client_keys.digest(KEY)}\n")
    with ProxyProcess(folder, issuer=sandbox.url, upstream=sandbox.url, port=port) as proxy:
        proxy.refresher_lives()
        until(lambda: shown().startswith("Client key needed"), 40)
        browser.type("#key", "wrong")
        browser.click("#unlock button")
        until(lambda: "does not know this key" in browser.text("#unlock"), 20)
        browser.type("#key", KEY)
        browser.click("#unlock button")
        until(lambda: shown() == "Serving\nSigned in.", 20)
        assert browser.run("return Object.values(sessionStorage)") == [KEY]
        assert browser.run("return localStorage.length + document.cookie.length") == 0
        browser.open(proxy.url)
        until(lambda: shown() == "Serving\nSigned in.", 20)
        # Nothing but failed requests.
        assert all("Failed to load resource" in line for line in browser.console())
