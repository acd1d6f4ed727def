"""/metrics of a running proxy: each metric, access to it, and that a scrape delays no stream."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from proxy_process import ISSUER, ProxyProcess
from scraped import OPENMETRICS, Scraped, until
from scripted_upstream import ScriptedUpstream
from used_tokens import (
    CHAT,
    CHAT_STREAM,
    MESSAGE,
    MESSAGE_STREAM,
    RESPONSE,
    RESPONSE_STREAM,
)
from websocket_handshake import handshake

import xaiproxy
from xaiproxy import client_keys, config, refresher_status
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import Login

KEY = "xaip_of-alice"
BY_KEY = f"Authorization: Bearer {KEY}"
LIMITS = (
    "x-ratelimit-limit-tokens: 50000000",
    "x-ratelimit-remaining-tokens: 49999000",
    "x-ratelimit-limit-requests: 7200",
    "x-ratelimit-remaining-requests: 7199",
)
CODES = {
    "internal_error",
    "bad_request",
    "login_required",
    "client_key_required",
    "host_not_allowed",
    "origin_not_allowed",
    "not_found",
    "method_not_allowed",
    "client_timeout",
    "upstream_unreachable",
    "token_unavailable",
    "too_many_connections",
    "upstream_timeout",
    "loop_detected",
}
# The type and the labels of each metric.
TABLE = {
    "xaiproxy_requests": ("counter", {"route", "status", "key"}),
    "xaiproxy_requests_ended": ("counter", {"route", "ended_by"}),
    "xaiproxy_request_duration_seconds": ("histogram", {"route", "le"}),
    "xaiproxy_time_to_first_byte_seconds": ("histogram", {"route", "le"}),
    "xaiproxy_overhead_seconds": ("histogram", {"le"}),
    "xaiproxy_requests_in_flight": ("gauge", set()),
    "xaiproxy_streams_open": ("gauge", set()),
    "xaiproxy_websockets_open": ("gauge", set()),
    "xaiproxy_request_bytes": ("counter", {"route"}),
    "xaiproxy_response_bytes": ("counter", {"route"}),
    "xaiproxy_upstream_errors": ("counter", {"kind"}),
    "xaiproxy_upstream_connections": ("gauge", {"state"}),
    "xaiproxy_upstream_connections_opened": ("counter", set()),
    "xaiproxy_tokens_refused": ("counter", {"outcome"}),
    "xaiproxy_rejected_requests": ("counter", {"code"}),
    "xaiproxy_connections": ("gauge", set()),
    "xaiproxy_connections_limit": ("gauge", set()),
    "xaiproxy_connections_accepted": ("counter", set()),
    "xaiproxy_login_required": ("gauge", set()),
    "xaiproxy_access_token_expiry_timestamp_seconds": ("gauge", set()),
    "xaiproxy_access_token_obtained_timestamp_seconds": ("gauge", set()),
    "xaiproxy_refresher_seen_timestamp_seconds": ("gauge", set()),
    "xaiproxy_refresh_next_timestamp_seconds": ("gauge", set()),
    "xaiproxy_refreshes": ("counter", {"result"}),
    "xaiproxy_published_timestamp_seconds": ("gauge", set()),
    "xaiproxy_publish_failures": ("counter", set()),
    "xaiproxy_tokens": ("counter", {"model", "type", "key"}),
    "xaiproxy_usage_unread": ("counter", {"reason"}),
    "xaiproxy_ratelimit_remaining": ("gauge", {"kind"}),
    "xaiproxy_ratelimit_limit": ("gauge", {"kind"}),
    "xaiproxy_event_loop_lag_seconds": ("gauge", set()),
    "xaiproxy_log_lines_dropped": ("counter", set()),
    "xaiproxy_build": ("info", {"version"}),
    "xaiproxy_workers": ("gauge", set()),
    "process_cpu_seconds": ("counter", set()),
    "process_virtual_memory_bytes": ("gauge", set()),
    "process_resident_memory_bytes": ("gauge", set()),
    "process_start_time_seconds": ("gauge", set()),
    "process_open_fds": ("gauge", set()),
    "process_max_fds": ("gauge", set()),
}


@pytest.fixture
def start(tmp_path: Path, upstream: ScriptedUpstream) -> Iterator[Callable[..., ProxyProcess]]:
    """Start a proxy of the test's own, signed in."""
    started: list[ProxyProcess] = []

    def start_one(key: str = "", **settings: Any) -> ProxyProcess:
        if key:
            (tmp_path / "client-keys").write_text(f"alice {client_keys.digest(key)}\n")
        proxy = ProxyProcess(tmp_path, **{"upstream": upstream.origin, **settings})
        started.append(proxy)
        proxy.sign_in()
        return proxy

    yield start_one
    for proxy in started:
        proxy.close()


@pytest.fixture
def proxy(start: Callable[..., ProxyProcess]) -> ProxyProcess:
    return start()


def answer(body: bytes, *fields: str, status: str = "200 OK", media: str = "") -> bytes:
    media = media or "application/json"
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {media}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


def ask(
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    data: bytes,
    path: str = "/v1/chat/completions",
    *fields: str,
) -> None:
    """Send a POST, answer it with `data`, and read the whole response."""
    with proxy.client() as client:
        client.request("POST", path, *fields, body=b"{}")
        upstream.receive().answer(data)
        client.message()


# The page


def test_every_metric_has_its_type_and_labels(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    proxy.refresher_lives()
    ask(proxy, upstream, answer(CHAT, *LIMITS))
    scraped = Scraped(proxy)
    types = {name: family.type for name, family in scraped.families.items()}
    assert types == {name: type for name, (type, _) in TABLE.items()}
    for name, (_, labels) in TABLE.items():
        family = scraped.families[name]
        assert family.documentation and family.samples, name
        assert set().union(*(sample.labels for sample in family.samples)) == labels, name


def test_both_formats_have_the_same_samples(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    ask(proxy, upstream, answer(CHAT, *LIMITS))
    plain, openmetrics = proxy.ask("GET", "/metrics"), proxy.ask("GET", "/metrics", OPENMETRICS)
    assert plain.value("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    media = openmetrics.value("Content-Type")
    assert media is not None and media.startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.body.endswith(b"# EOF\n")
    names = {
        sample.name
        for family in text_string_to_metric_families(plain.body.decode())
        for sample in family.samples
    }
    assert names == {sample.name for sample in Scraped(proxy).samples}


@pytest.mark.parametrize(
    "accept, is_openmetrics",
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("text/plain, application/openmetrics-text;version=abc", True),
        ("application/openmetrics-text;version=99.0.0;escaping=x", True),
        ("application/openmetrics-textual", False),
        (";;;,=", False),
    ],
)
def test_the_accept_header_decides(
    running: ProxyProcess, accept: str, is_openmetrics: bool
) -> None:
    message = running.ask("GET", "/metrics", f"Accept: {accept}")
    assert message.status == 200
    assert message.body.endswith(b"# EOF\n") == is_openmetrics


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, of Debian's prometheus")
def test_promtool_accepts_the_page(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    ask(proxy, upstream, answer(CHAT, *LIMITS))
    page = proxy.ask("GET", "/metrics").body
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_sets_of_values_that_are_known_begin_with_zero(proxy: ProxyProcess) -> None:
    scraped = Scraped(proxy)
    for name, label, values in (
        ("xaiproxy_rejected_requests_total", "code", CODES),
        ("xaiproxy_usage_unread_total", "reason", {"compressed", "too_long", "none", "cut"}),
        ("xaiproxy_tokens_refused_total", "outcome", {"replayed", "passed_on"}),
        (
            "xaiproxy_upstream_errors_total",
            "kind",
            {"dns", "connect", "tls", "timeout", "reset_before_head", "reset_in_answer"}
            | {"egress_proxy"},
        ),
        (
            "xaiproxy_refreshes_total",
            "result",
            {"ok", "unreachable", "refused_for_now", "entitlement", "ended", "disk"},
        ),
        (
            "xaiproxy_requests_ended_total",
            "ended_by",
            {"done", "client", "upstream", "proxy", "drain"},
        ),
    ):
        found = [sample for sample in scraped.samples if sample.name == name]
        assert {sample.labels[label] for sample in found} == values
        assert not any(sample.value for sample in found)


# Who may see it


def test_a_key_is_needed_where_there_are_keys(start: Callable[..., ProxyProcess]) -> None:
    proxy = start(KEY)
    for path in ("/metrics", "/%6detrics"):
        refused = proxy.ask("GET", path)
        assert (refused.status, refused.value("X-XAI-Proxy-Error")) == (401, "client_key_required")
        assert proxy.ask("GET", path, "Authorization: Bearer wrong").status == 401
    assert proxy.ask("GET", "/metrics", BY_KEY).status == 200
    scraped = Scraped(proxy, BY_KEY)
    # Of /%6detrics, too, which is no other page.
    assert scraped("xaiproxy_requests_total", route="own", status=401, key="") == 4
    assert scraped("xaiproxy_requests_total", route="own", status=200, key="alice") == 1


def test_without_keys_foreign_pages_are_refused(running: ProxyProcess) -> None:
    for fields, code in (
        (("Origin: http://evil.example",), "origin_not_allowed"),
        (("Sec-Fetch-Site: cross-site",), "origin_not_allowed"),
    ):
        refused = running.ask("GET", "/metrics", *fields)
        assert (refused.status, refused.value("X-XAI-Proxy-Error")) == (403, code)
    with running.client() as client:
        client.send(b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert client.message().value("X-XAI-Proxy-Error") == "host_not_allowed"


def test_it_is_answered_while_every_connection_has_a_request(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start(KEY, max_connections=2)
    clients = [proxy.client(), proxy.client()]
    for client in clients:
        client.request("GET", "/v1/models", BY_KEY)
    requests = [upstream.receive() for _ in clients]
    assert proxy.ask("GET", "/v1/models", BY_KEY).status == 503
    assert proxy.ask("GET", "/nothing", BY_KEY).status == 503
    assert proxy.ask("GET", "/metrics").status == 401
    scraped = Scraped(proxy, BY_KEY)
    assert scraped("xaiproxy_requests_in_flight") == 2
    assert scraped("xaiproxy_connections_limit") == 2
    assert scraped("xaiproxy_connections") == 3
    assert scraped("xaiproxy_rejected_requests_total", code="too_many_connections") == 2
    for request in requests:
        request.answer()
    for client in clients:
        assert client.message().status == 200
        client.close()


# Requests


def test_requests_are_counted_by_route_status_and_key(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start(KEY)
    ask(proxy, upstream, answer(CHAT), "/v1/chat/completions", BY_KEY)
    ask(proxy, upstream, answer(b"{}", status="429 Too Many"), "/v1/chat/completions", BY_KEY)
    ask(proxy, upstream, answer(b"{}"), "/v1/something", BY_KEY)
    assert proxy.ask("POST", "/v1/messages").status == 401
    with proxy.client() as client:
        client.send(b"nonsense\r\n\r\n")
        assert client.message().status == 400
    scraped = Scraped(proxy, BY_KEY)
    name = "xaiproxy_requests_total"
    assert scraped(name, route="chat", status=200, key="alice") == 1
    assert scraped(name, route="chat", status=429, key="alice") == 1
    assert scraped(name, route="other", status=200, key="alice") == 1
    assert scraped(name, route="messages", status=401, key="") == 1
    assert scraped(name, route="own", status=400, key="") == 1
    assert scraped(name) == 5
    ended = "xaiproxy_requests_ended_total"
    assert (scraped(ended, ended_by="done"), scraped(ended, ended_by="proxy")) == (3, 2)


def test_health_checks_are_not_counted_and_other_pages_are_the_proxys_own(
    proxy: ProxyProcess,
) -> None:
    for path in ("/healthz", "/readyz"):
        proxy.ask("GET", path)
        proxy.ask("HEAD", path)
        proxy.ask("POST", path)
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_requests_total") == 0
    assert scraped("xaiproxy_rejected_requests_total") == 0
    proxy.ask("GET", "/nothing")
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_requests_total", route="own", status=404) == 1
    assert scraped("xaiproxy_requests_total", route="own", status=200) == 1


def test_what_ended_a_request(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123"
    with proxy.client() as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        upstream.receive()
    scraped = until(proxy, 1, "xaiproxy_requests_total", route="chat", status=499)
    assert scraped("xaiproxy_requests_ended_total", route="chat", ended_by="client") == 1
    with proxy.client() as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        upstream.receive().answer(long)
        client.head()
    until(proxy, 2, "xaiproxy_requests_ended_total", route="chat", ended_by="client")
    with proxy.client() as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        upstream.receive().answer(long).connection.close()
        client.head()
        client.rest()
    scraped = until(proxy, 1, "xaiproxy_requests_ended_total", route="chat", ended_by="upstream")
    assert scraped("xaiproxy_requests_total", route="chat", status=200) == 2
    assert scraped("xaiproxy_upstream_errors_total", kind="reset_in_answer") == 1


def test_times_and_bytes(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with proxy.client() as client:
        client.request("POST", "/v1/responses", body=b"1234567")
        request = upstream.receive()
        request.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.head()
        time.sleep(0.3)
        request.answer(b"2\r\nde\r\n0\r\n\r\n")
        assert client.chunk() + client.chunk() == b"abcde"
        assert client.chunk() == b""
    scraped = Scraped(proxy)
    # Without the framing.
    assert scraped("xaiproxy_request_bytes_total", route="responses") == 7
    assert scraped("xaiproxy_response_bytes_total", route="responses") == 5
    for name, buckets in (
        ("xaiproxy_request_duration_seconds", [0.01 * 2**step for step in range(18)]),
        ("xaiproxy_time_to_first_byte_seconds", [0.01 * 2**step for step in range(15)]),
    ):
        bounds = [
            float(sample.labels["le"])
            for sample in scraped.samples
            if sample.name == f"{name}_bucket"
        ]
        assert bounds == pytest.approx([*buckets, math.inf])
        assert scraped(f"{name}_count", route="responses") == 1
    assert scraped("xaiproxy_request_duration_seconds_sum", route="responses") >= 0.3
    assert scraped("xaiproxy_request_duration_seconds_bucket", le="0.16") == 0
    assert 0 < scraped("xaiproxy_time_to_first_byte_seconds_sum", route="responses") < 5
    assert scraped("xaiproxy_overhead_seconds_count") == 1
    assert 0 < scraped("xaiproxy_overhead_seconds_sum") < 1
    bounds = [
        float(sample.labels["le"])
        for sample in scraped.samples
        if sample.name == "xaiproxy_overhead_seconds_bucket"
    ]
    assert (bounds[0], bounds[-2:]) == (5e-5, [1, math.inf]) and bounds == sorted(bounds)


def test_what_is_open(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with proxy.client() as first, proxy.client() as second, proxy.client() as third:
        tunnel = handshake(first, upstream)
        second.request("POST", "/v1/chat/completions", body=b"{}")
        stream = upstream.receive()
        third.request("GET", "/v1/models")
        waiting = upstream.receive()
        stream.answer(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        second.head()
        scraped = Scraped(proxy)
        assert scraped("xaiproxy_requests_in_flight") == 3
        assert scraped("xaiproxy_streams_open") == 1
        assert scraped("xaiproxy_websockets_open") == 1
        assert scraped("xaiproxy_connections") == 4
        assert scraped("xaiproxy_connections_accepted_total") == 4
        assert scraped("xaiproxy_upstream_connections", state="busy") == 3
        waiting.answer()
        third.message()
        scraped = Scraped(proxy)
        assert scraped("xaiproxy_upstream_connections", state="busy") == 2
        assert scraped("xaiproxy_upstream_connections", state="idle") == 1
    tunnel.connection.close()
    scraped = until(proxy, 0, "xaiproxy_requests_in_flight")
    assert scraped("xaiproxy_streams_open") == scraped("xaiproxy_websockets_open") == 0
    # A response that was not read to its end closes its connection.
    assert scraped("xaiproxy_upstream_connections", state="busy") == 0
    assert scraped("xaiproxy_upstream_connections", state="idle") == 1
    assert scraped("xaiproxy_upstream_connections_opened_total") == 3
    upstream.hang_up()
    until(proxy, 0, "xaiproxy_upstream_connections")


def test_connections_to_upstream_that_end_in_any_way_are_not_counted(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start(idle_timeout=0.3)
    with proxy.client() as client:
        for data in (b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nx"):
            client.request("GET", "/v1/models")
            upstream.receive().answer(data).connection.close()
            client.message()
        # No answer within idle_timeout.
        client.request("GET", "/v1/models")
        upstream.receive()
        assert client.message().status == 504
        # An early answer to a body that goes on.
        client.send(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\nx"
        )
        upstream.receive(body=False).answer(
            b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        assert client.message().status == 413
    until(proxy, 0, "xaiproxy_requests_in_flight")
    until(proxy, 0, "xaiproxy_upstream_connections")
    assert Scraped(proxy)("xaiproxy_upstream_connections_opened_total") == 4


# Failures


def rejected(proxy: ProxyProcess, code: str, *fields: str) -> float:
    return Scraped(proxy, *fields)("xaiproxy_rejected_requests_total", code=code)


@pytest.mark.parametrize(
    "code, request_line, fields",
    [
        ("bad_request", "GET /v1/../x", ()),
        ("bad_request", "GET /v1/models", ("Content-Length: 1", "Content-Length: 2")),
        ("host_not_allowed", "GET /v1/models", ("Host: evil.example",)),
        ("origin_not_allowed", "GET /v1/models", ("Origin: http://evil.example",)),
        ("not_found", "GET /nothing", ()),
        ("not_found", "GET /v1/v1/models", ()),
        ("method_not_allowed", "TRACE /v1/models", ()),
        ("method_not_allowed", "POST /metrics", ()),
    ],
)
def test_a_refused_request(
    running: ProxyProcess, code: str, request_line: str, fields: tuple[str, ...]
) -> None:
    before = rejected(running, code)
    lines = [f"{request_line} HTTP/1.1", *(fields or ("Host: localhost",))]
    if not any(field.startswith("Host") for field in lines):
        lines.append("Host: localhost")
    with running.client() as client:
        client.send("\r\n".join([*lines, "", ""]).encode())
        assert client.message().value("X-XAI-Proxy-Error") == code
    assert rejected(running, code) == before + 1


def test_a_client_without_a_key(start: Callable[..., ProxyProcess]) -> None:
    proxy = start(KEY)
    assert proxy.ask("GET", "/v1/models").status == 401
    assert rejected(proxy, "client_key_required", BY_KEY) == 1


def test_failures_of_the_login(start: Callable[..., ProxyProcess]) -> None:
    proxy = start()
    proxy.token_path.unlink()
    assert proxy.ask("GET", "/v1/models").status == 401
    assert rejected(proxy, "login_required") == 1
    proxy.sign_in(expires_in=-1, refresh_token=None)
    assert proxy.ask("GET", "/v1/models").status == 503
    assert rejected(proxy, "token_unavailable") == 1


def test_a_slow_client_and_a_slow_upstream(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start(client_timeout=0.3, idle_timeout=0.3)
    with proxy.client() as client:
        client.send(b"GET /v1/models HTTP/1.1\r\n")
        assert client.message().status == 408
    assert rejected(proxy, "client_timeout") == 1
    with proxy.client() as client:
        client.request("GET", "/v1/models")
        upstream.receive()
        assert client.message().status == 504
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_rejected_requests_total", code="upstream_timeout") == 1
    assert scraped("xaiproxy_upstream_errors_total", kind="timeout") == 1
    with proxy.client() as client:
        client.request("GET", "/v1/models")
        upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1")
        client.head()
        client.rest()
    until(proxy, 2, "xaiproxy_upstream_errors_total", kind="timeout")


def test_a_loop(start: Callable[..., ProxyProcess], upstream: ScriptedUpstream) -> None:
    proxy = start()
    with proxy.client() as client:
        client.request("GET", "/v1/models")
        via = upstream.receive().answer().value("Via")
        client.message()
        assert client.ask("GET", "/v1/models", f"Via: {via}").status == 508
    assert rejected(proxy, "loop_detected") == 1


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("connect", {"upstream": f"http://127.0.0.1:{closed_port()}"}),
        ("dns", {"upstream": "https://nowhere.invalid"}),
        (
            "egress_proxy",
            {
                "upstream": "https://api.example",
                "environ": {"HTTPS_PROXY": f"http://127.0.0.1:{closed_port()}"},
            },
        ),
    ],
)
def test_an_upstream_that_cannot_be_reached(
    start: Callable[..., ProxyProcess], kind: str, settings: dict[str, Any]
) -> None:
    proxy = start(connect_timeout=30, **settings)
    assert proxy.ask("GET", "/v1/models").status == 502
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_upstream_errors_total", kind=kind) == 1
    assert scraped("xaiproxy_rejected_requests_total", code="upstream_unreachable") == 1
    assert scraped("xaiproxy_upstream_errors_total") == 1


def test_an_upstream_without_tls_and_one_that_closes(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start(upstream=upstream.origin.replace("http:", "https:"))
    with proxy.client() as client:
        client.request("GET", "/v1/models")
        upstream.accept().send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert client.message().status == 502
    assert Scraped(proxy)("xaiproxy_upstream_errors_total", kind="tls") == 1


def test_an_upstream_that_closes_before_its_head(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with proxy.client() as client:
        client.request("POST", "/v1/responses", body=b"{}")
        upstream.receive().connection.close()
        assert client.message().status == 502
    assert Scraped(proxy)("xaiproxy_upstream_errors_total", kind="reset_before_head") == 1


def test_refused_access_tokens(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = start()
    proxy.refresher_lives()
    dead = answer(b'{"code":"unauthenticated:bad-credentials","error":"x"}', status="403 Forbidden")
    with proxy.client() as client:
        client.request("POST", "/v1/responses", body=b"{}")
        request = upstream.receive()
        proxy.sign_in("another")
        request.answer(dead)
        upstream.receive().answer(answer(RESPONSE))
        assert client.message().status == 200
        scraped = Scraped(proxy)
        assert scraped("xaiproxy_tokens_refused_total", outcome="replayed") == 1
        proxy.refresher_lives(False)
        client.request("POST", "/v1/responses", body=b"{}")
        upstream.receive().answer(dead)
        assert client.message().status == 403
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_tokens_refused_total", outcome="passed_on") == 1
    assert scraped("xaiproxy_tokens_refused_total") == 2


# The login


def test_a_login_and_its_times(proxy: ProxyProcess) -> None:
    now = time.time()
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_login_required") == 0
    # sign_in: 1000 s old, with 3600 s left, of which the refresher leaves a fifth of the lifetime.
    expiry = scraped("xaiproxy_access_token_expiry_timestamp_seconds")
    assert expiry == pytest.approx(now + 3600, abs=30)
    obtained = scraped("xaiproxy_access_token_obtained_timestamp_seconds")
    assert expiry - obtained == pytest.approx(4600, abs=1)
    assert scraped("xaiproxy_refresh_next_timestamp_seconds") == pytest.approx(expiry - 920, abs=1)
    assert scraped("xaiproxy_refresher_seen_timestamp_seconds") == 0
    proxy.refresher_lives()
    seen = Scraped(proxy)("xaiproxy_refresher_seen_timestamp_seconds")
    assert seen == pytest.approx(time.time(), abs=30)


def test_a_login_without_a_refresh_token_needs_no_refresher(proxy: ProxyProcess) -> None:
    """As from a mounted Secret: the alert about a missing refresher must not fire."""
    proxy.sign_in(refresh_token=None)
    assert Scraped(proxy).values("xaiproxy_refresher_seen_timestamp_seconds") == []


def test_without_a_login_its_times_are_absent(proxy: ProxyProcess) -> None:
    proxy.token_path.unlink()
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_login_required") == 1
    for name in (
        "xaiproxy_access_token_expiry_timestamp_seconds",
        "xaiproxy_access_token_obtained_timestamp_seconds",
        "xaiproxy_refresh_next_timestamp_seconds",
    ):
        assert name in scraped.families and not scraped.values(name)


def test_a_login_that_has_ended_is_required_anew_while_its_token_is_good(
    proxy: ProxyProcess,
) -> None:
    error = {"code": "invalid_grant", "description": "x", "at": time.time(), "terminal": True}
    proxy.sign_in(refresh_error=error)
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_login_required") == 1
    assert not scraped.values("xaiproxy_refresh_next_timestamp_seconds")


def store_of(proxy: ProxyProcess) -> TokenStore:
    variables = {
        "XAI_PROXY_TOKEN_PATH": str(proxy.token_path),
        "XAI_PROXY_ISSUER": ISSUER,
        "XAI_PROXY_UPSTREAM": ISSUER,
    }
    return TokenStore(config.from_environ(variables, dotenv_path=os.devnull))


def test_the_refreshers_status(proxy: ProxyProcess) -> None:
    store, now = store_of(proxy), time.time()
    login: Login = store.load()
    status = refresher_status.Status(
        now,
        "issuer_unavailable",
        "no connection",
        now + 7,
        login=refresher_status.fingerprint(login.access_token),
        refreshes={"ok": 5, "unreachable": 2},
    )
    assert refresher_status.write(store, status)
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_refresh_next_timestamp_seconds") == pytest.approx(now + 7, abs=0.01)
    assert scraped("xaiproxy_refreshes_total", result="ok") == 5
    assert scraped("xaiproxy_refreshes_total", result="unreachable") == 2
    assert scraped("xaiproxy_refreshes_total", result="ended") == 0
    # The counters are not about this login, and stay when no refresher runs.
    proxy.sign_in("another")
    store.status_path.write_text(
        store.status_path.read_text().replace(f'"at": {now}', f'"at": {now - 9999}')
    )
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_refreshes_total") == 7
    assert scraped("xaiproxy_refresh_next_timestamp_seconds") > now + 1000


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"at": 1}', '{"at": 1, "refreshes": [1]}', "[" * 9000]
)
def test_a_status_of_another_version_counts_no_refreshes(proxy: ProxyProcess, content: str) -> None:
    store_of(proxy).status_path.write_text(content)
    assert Scraped(proxy)("xaiproxy_refreshes_total") == 0


# Usage


def tokens(scraped: Scraped, model: str, key: str = "") -> list[float]:
    return [
        scraped("xaiproxy_tokens_total", model=model, type=type, key=key)
        for type in ("input", "cached_input", "output", "reasoning")
    ]


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_tokens_are_counted_by_model_type_and_key(
    start: Callable[..., ProxyProcess], upstream: ScriptedUpstream, coding: str
) -> None:
    proxy = start(KEY)
    filler = b'data: {"choices":[]}\n\n' * 2000
    for path, content, media in (
        ("/v1/chat/completions", CHAT, "application/json"),
        ("/v1/chat/completions", CHAT_STREAM % filler, "text/event-stream"),
        ("/v1/responses", RESPONSE, "application/json"),
        ("/v1/responses", RESPONSE_STREAM % filler, "text/event-stream"),
        ("/v1/messages", MESSAGE, "application/json"),
        ("/v1/messages", MESSAGE_STREAM % filler, "text/event-stream; charset=utf-8"),
    ):
        fields = [f"Content-Encoding: {coding}"] if coding else []
        body = gzip.compress(content) if coding else content
        ask(proxy, upstream, answer(body, *fields, media=media), path, BY_KEY)
    scraped = Scraped(proxy, BY_KEY)
    # CHAT, and twice that of a message.
    assert tokens(scraped, "grok-4.5", "alice") == [502 + 66, 384 + 40, 14 + 14, 13]
    assert tokens(scraped, "grok-3-mini", "alice") == [12, 5, 291, 290]
    assert tokens(scraped, "grok-code-fast-1", "alice") == [64, 12, 200, 180]
    assert scraped("xaiproxy_usage_unread_total") == 0
    assert len(scraped.values("xaiproxy_tokens_total")) == 12


def unread(scraped: Scraped) -> dict[str, float]:
    name = "xaiproxy_usage_unread_total"
    return {
        sample.labels["reason"]: sample.value
        for sample in scraped.samples
        if sample.name == name and sample.value
    }


@pytest.mark.parametrize(
    "data, reasons",
    [
        (answer(b"{}"), {"none": 1}),
        (answer(b"data: [DONE]\n\n", media="text/event-stream"), {"none": 1}),
        (answer(b"\x0b\x02", "Content-Encoding: br"), {"compressed": 1}),
        (answer(bytes(1 << 20) + CHAT), {"too_long": 1}),
        (answer(gzip.compress(bytes(40 << 20)), "Content-Encoding: gzip"), {"too_long": 1}),
        (answer(b"{}", status="400 Bad Request"), {}),
        (answer(b"{}", status="302 Found"), {}),
    ],
)
def test_usage_that_is_not_read(
    proxy: ProxyProcess, upstream: ScriptedUpstream, data: bytes, reasons: dict[str, float]
) -> None:
    ask(proxy, upstream, data)
    scraped = Scraped(proxy)
    assert unread(scraped) == reasons
    assert not scraped.values("xaiproxy_tokens_total")


def test_responses_of_other_routes_and_repeated_ones_are_not_read(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    for method, path in (
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/responses/1"),
    ):
        with proxy.client() as client:
            client.request(method, path, body=b"{}" if method == "POST" else b"")
            upstream.receive().answer(answer(RESPONSE))
            client.message()
    scraped = Scraped(proxy)
    assert unread(scraped) == {} and not scraped.values("xaiproxy_tokens_total")


def chunked(content: bytes, media: str = "text/event-stream") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%b\r\n" % (len(content), content)


@pytest.mark.parametrize("by", ["upstream", "client"])
def test_a_stream_that_is_cut_before_its_usage(
    proxy: ProxyProcess, upstream: ScriptedUpstream, by: str
) -> None:
    whole = chunked(CHAT_STREAM % b"")
    for content in (chunked(CHAT_STREAM.partition(b"%b")[0]), whole):
        with proxy.client() as client:
            client.request("POST", "/v1/chat/completions", body=b"{}")
            request = upstream.receive().answer(content)
            client.head()
            client.chunk()
            if by == "upstream":
                request.connection.close()
                client.rest()
    scraped = until(proxy, 2, "xaiproxy_requests_ended_total", route="chat", ended_by=by)
    # The last bytes of a stream, which carry no usage, need not come.
    assert unread(scraped) == {"cut": 1}
    assert tokens(scraped, "grok-3-mini") == [12, 5, 291, 290]


def test_a_stream_of_messages_that_is_cut_counts_its_input(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with proxy.client() as client:
        client.request("POST", "/v1/messages", body=b"{}")
        begin = MESSAGE_STREAM.partition(b"%b")[0]
        upstream.receive().answer(chunked(begin)).connection.close()
        client.head()
        client.rest()
    scraped = until(proxy, 1, "xaiproxy_usage_unread_total", reason="cut")
    assert tokens(scraped, "grok-4.5") == [33, 20, 1, 0]


def test_models_beyond_fifty_become_other(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with proxy.client() as client:
        for number in range(53):
            body = CHAT.replace(b"grok-4.5", b"model-%d" % number)
            client.request("POST", "/v1/chat/completions", body=b"{}")
            upstream.receive().answer(answer(body))
            client.message()
    scraped = Scraped(proxy)
    assert tokens(scraped, "model-49")[0] == 502
    assert tokens(scraped, "other")[0] == 3 * 502
    assert len(scraped.values("xaiproxy_tokens_total", type="input")) == 51


def test_keys_beyond_a_hundred_become_other(
    start: Callable[..., ProxyProcess], tmp_path: Path
) -> None:
    lines = [f"key-{number} {client_keys.digest(f'xaip_{number}')}\n" for number in range(103)]
    (tmp_path / "client-keys").write_text("".join(lines))
    proxy = start()
    with proxy.client() as client:
        for number in range(103):
            client.ask("GET", "/v1/v1/x", f"Authorization: Bearer xaip_{number}")
    scraped = Scraped(proxy, "Authorization: Bearer xaip_0")
    name = "xaiproxy_requests_total"
    assert scraped(name, key="key-99") == 1 and scraped(name, key="other") == 3
    assert len(scraped.values(name)) == 101


def test_rate_limits_as_last_seen(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    assert Scraped(proxy).values("xaiproxy_ratelimit_limit") == []
    ask(proxy, upstream, answer(CHAT, *LIMITS))
    ask(proxy, upstream, answer(b"{}", status="429 Too Many Requests"))
    # Of the responses that are counted together, the last rate limits are read.
    assert Scraped(proxy)("xaiproxy_ratelimit_limit", kind="requests") == 7200
    nonsense = [f"{line.partition(':')[0]}: {value}" for line in LIMITS for value in ("-1",)]
    ask(proxy, upstream, answer(b"{}", *nonsense))
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_ratelimit_limit", kind="tokens") == 50_000_000
    assert scraped("xaiproxy_ratelimit_remaining", kind="tokens") == 49_999_000
    assert scraped("xaiproxy_ratelimit_limit", kind="requests") == 7200
    assert scraped("xaiproxy_ratelimit_remaining", kind="requests") == 7199


# The process


def test_the_process(proxy: ProxyProcess) -> None:
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_build_info", version=xaiproxy.__version__) == 1
    assert scraped("xaiproxy_workers") == 1
    assert scraped("process_start_time_seconds") == pytest.approx(time.time(), abs=60)
    assert 0 < scraped("process_cpu_seconds_total") <= proxy.cpu_seconds() + 0.02
    resident = scraped("process_resident_memory_bytes")
    assert resident == pytest.approx(proxy.resident_kib() * 1024, rel=0.2)
    assert scraped("process_virtual_memory_bytes") > resident
    # The connection of the scrape is closed since.
    assert scraped("process_open_fds") - 1 <= proxy.open_files() <= scraped("process_open_fds")
    assert scraped("process_max_fds") > 100
    assert 0 <= scraped("xaiproxy_event_loop_lag_seconds") < 10


def test_the_descriptors_of_many_connections_are_all_counted(proxy: ProxyProcess) -> None:
    before = Scraped(proxy)("process_open_fds")
    clients = [proxy.client() for _ in range(350)]
    assert Scraped(proxy)("process_open_fds") == before + 350
    for client in clients:
        client.close()


def test_a_busy_event_loop_lags(proxy: ProxyProcess) -> None:
    """The process is stopped for half a second."""
    assert Scraped(proxy)("xaiproxy_workers") == 1
    os.kill(proxy.process.pid, 19)
    time.sleep(0.5)
    os.kill(proxy.process.pid, 18)
    deadline = time.monotonic() + 5
    while Scraped(proxy)("xaiproxy_event_loop_lag_seconds") < 0.35:
        assert time.monotonic() < deadline


def test_dropped_log_lines_are_counted(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin, read_log=False) as proxy:
        proxy.refresher_lives()
        proxy.sign_in()
        assert Scraped(proxy)("xaiproxy_log_lines_dropped_total") == 0
        with proxy.client() as client:
            for _ in range(30):
                client.send(b"GET /v1/v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
                assert [client.message().status for _ in range(100)] == [404] * 100
        dropped = Scraped(proxy)("xaiproxy_log_lines_dropped_total")
        assert dropped > 1000
        proxy.read_log()
        line = proxy.wait_for_log(lambda line: "log lines were dropped" in line["message"])
        # The line of the last scrape may have been dropped after it was answered.
        assert dropped <= int(line["message"].split()[0]) <= dropped + 1
        assert Scraped(proxy)("xaiproxy_log_lines_dropped_total") >= dropped


def test_only_get_and_head_are_answered(running: ProxyProcess) -> None:
    """HEAD gets no body, and no other method is allowed."""
    with running.client() as client:
        assert client.request("HEAD", "/metrics").head().status == 200
    refused = running.ask("DELETE", "/metrics")
    assert refused.status == 405
    assert json.loads(refused.body)["error"]["code"] == "method_not_allowed"
