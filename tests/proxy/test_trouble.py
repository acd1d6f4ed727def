"""What is wrong although the login is good, as /readyz, the page and --status name it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from proxy_process import ProxyProcess
from sandbox import until
from scripted_upstream import OK, ScriptedUpstream

from xaiproxy import config, errors
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.http1.response_head import Head
from xaiproxy.login import command as login
from xaiproxy.login import output
from xaiproxy.proxy.trouble import DROP_TIME, FAILURE_TIME, KINDS, Trouble, Upstream
from xaiproxy.token_store import TokenStore

RECORD = RequestRecord(
    *("POST", "/v1/responses", 1.8e9, 200, 1, 1, 0.1, 0, None, "done", None, "", "", ""),
    *(None, None, None, "", None),
)
UNREACHABLE = RECORD._replace(status=502, refusal=errors.UpstreamUnreachable("no", kind="dns"))


def answer(status: int) -> RequestRecord:
    return RECORD._replace(status=status, upstream=Head(status, "", [], {}))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def upstream_state(clock: Clock) -> Upstream:
    return Upstream(clock)


def test_a_single_failure_is_no_trouble(upstream_state: Upstream) -> None:
    upstream_state.add(UNREACHABLE)
    assert upstream_state.sentence() == ""
    upstream_state.add(UNREACHABLE)
    assert upstream_state.sentence().startswith(
        f"the last requests to the API failed: {KINDS['dns']}; "
    )


@pytest.mark.parametrize("status", [101, 200, 404, 429])
def test_any_answer_but_a_5xx_ends_it(upstream_state: Upstream, status: int) -> None:
    for record in (UNREACHABLE, UNREACHABLE, answer(status), UNREACHABLE):
        upstream_state.add(record)
    assert upstream_state.sentence() == ""


def test_a_request_that_did_not_reach_upstream_changes_nothing(upstream_state: Upstream) -> None:
    refused = RECORD._replace(status=401, refusal=errors.ClientKeyRequired("no"))
    for record in (UNREACHABLE, refused, UNREACHABLE):
        upstream_state.add(record)
    assert "the last requests" in upstream_state.sentence()


def test_5xx_and_broken_responses_are_failures(upstream_state: Upstream) -> None:
    upstream_state.add(answer(503))
    upstream_state.add(answer(503))
    assert "it answers 503" in upstream_state.sentence()
    upstream_state.add(answer(200)._replace(broken=errors.UpstreamBroken("cut")))
    assert f"the last requests to the API failed: {KINDS['reset_in_answer']}" in (
        upstream_state.sentence()
    )


def test_old_failures_do_not_count(upstream_state: Upstream, clock: Clock) -> None:
    upstream_state.add(UNREACHABLE)
    upstream_state.add(UNREACHABLE)
    clock.now += FAILURE_TIME + 1
    assert upstream_state.sentence() == ""


def test_dropped_log_lines_are_trouble_for_a_while(upstream_state: Upstream, clock: Clock) -> None:
    numbers = [0, 7, 7, 7]
    trouble = Trouble(upstream_state, lambda: numbers.pop(0), clock)
    trouble.server = SimpleNamespace(in_flight=lambda: 0, connections=9)
    assert trouble.sentence() == ""
    assert trouble.sentence().startswith("log lines were dropped")
    clock.now += DROP_TIME
    assert trouble.sentence().startswith("log lines were dropped")
    clock.now += 1
    assert trouble.sentence() == ""


# Of a running proxy


class Reports:
    def __init__(self, proxy: ProxyProcess, origin: str):
        self.proxy = proxy
        port = proxy.port
        settings = {
            "XAI_PROXY_TOKEN_PATH": str(proxy.token_path),
            "XAI_PROXY_ISSUER": "http://127.0.0.1:1",
            "XAI_PROXY_UPSTREAM": origin,
            "XAI_PROXY_PORT": str(port),
        }
        self._store = TokenStore(config.from_environ(settings, dotenv_path=os.devnull))

    def ready(self) -> tuple[int, dict[str, Any]]:
        message = self.proxy.ask("GET", "/readyz")
        return message.status, json.loads(message.body)

    def page(self) -> dict[str, Any]:
        return json.loads(self.proxy.ask("GET", "/status.json").body)

    def headline(self) -> str:
        printed = io.StringIO()
        assert login.status(self._store, output.Output(False, printed, printed)) == 0
        return printed.getvalue().splitlines()[0]


def test_an_upstream_without_a_listener_is_named(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, upstream="http://127.0.0.1:1") as proxy:
        proxy.sign_in()
        proxy.refresher_lives()
        reports = Reports(proxy, "http://127.0.0.1:1")
        for _ in range(2):
            assert proxy.ask("GET", "/v1/models").status == 502
        sentence = "the last requests to the API failed: no connection to it can be opened; "
        until(lambda: reports.ready()[1].get("warning", "").startswith(sentence))
        status, members = reports.ready()
        assert (status, members["status"], members["reason"]) == (200, "ready", "signed in")
        page = reports.page()
        assert (page["state"], page["verdict"]) == ("attention", "good")
        assert page["sentence"].startswith(sentence.capitalize().replace("api", "API"))
        assert reports.headline().startswith("Serving http://127.0.0.1:")
        assert sentence in reports.headline()


def test_connections_without_room_are_named(tmp_path: Path) -> None:
    stream = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=1) as proxy,
    ):
        proxy.sign_in()
        proxy.refresher_lives()
        reports = Reports(proxy, upstream.origin)
        with proxy.client() as client:
            client.request()
            upstream.receive().answer(stream)
            client.head()
            assert "all 1 connections have a request" in reports.headline()
            assert reports.page()["state"] == "saturated"
        until(lambda: "warning" not in reports.ready()[1])


def test_a_served_request_leaves_no_warning(tmp_path: Path) -> None:
    with ScriptedUpstream() as upstream, ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        proxy.refresher_lives()
        with proxy.client() as client:
            client.request()
            upstream.receive().answer(OK)
            assert client.message().status == 200
        assert "warning" not in Reports(proxy, upstream.origin).ready()[1]
