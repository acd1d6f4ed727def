"""XAI_PROXY_DRAIN_DELAY: a proxy that serves on for a while after SIGTERM."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess
from raw_connection import Message
from scripted_upstream import ScriptedUpstream
from websocket_handshake import handshake

from xaiproxy import run_folder

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"


def readiness(message: Message) -> tuple[int, str]:
    return message.status, json.loads(message.body)["reason"]


def wait_for_delay(proxy: ProxyProcess) -> None:
    proxy.wait_for_log(lambda line: "until then new connections are served" in line["message"])


def test_requests_are_served_and_each_ends_its_connection(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """What goes on meanwhile is not disturbed. A second signal ends all at once."""
    with (
        ProxyProcess(
            tmp_path, upstream=upstream.origin, drain_delay=60, admin_bind="127.0.0.1:0"
        ) as proxy,
        proxy.client() as kept,
        proxy.client() as idle,
        proxy.client() as streaming,
        proxy.client() as tunnel,
    ):
        proxy.sign_in()
        for client in (kept, idle):
            assert client.ask("GET", "/healthz").value("Connection") == "keep-alive"
        streaming.request("GET", "/v1/stream")
        stream = upstream.receive().answer(STREAM)
        streaming.head()
        assert streaming.chunk() == b"ok"
        socket = handshake(tunnel, upstream)
        start = "health checks and metrics on http://"
        line = proxy.wait_for_log(lambda line: line["message"].startswith(start))
        admin_port = int(line["message"].rpartition(":")[2])

        proxy.terminate()
        wait_for_delay(proxy)
        began = time.monotonic()
        for path, status in (("/healthz", 200), ("/readyz", 503)):
            answer = proxy.ask("GET", path)
            assert (answer.status, answer.value("Connection")) == (status, "close")
        assert readiness(proxy.ask("GET", "/readyz")) == (503, "the proxy is stopping")
        with Client(admin_port) as client:
            assert readiness(client.ask("GET", "/readyz")) == (503, "the proxy is stopping")
            assert client.ask("GET", "/healthz").status == 200
        for client in (kept, proxy.client()):
            with client:
                client.request()
                upstream.receive().answer()
                answer = client.message()
                assert (answer.status, answer.value("Connection")) == (200, "close")
                assert client.closed_within()
        assert idle.silent()
        stream.answer(b"4\r\nmore\r\n")
        assert streaming.chunk() == b"more"
        socket.answer(b"frame")
        assert tunnel.exactly(5) == b"frame"
        tunnel.send(b"reply")
        assert socket.connection.exactly(5) == b"reply"
        with proxy.client() as late:
            handshake(late, upstream, "/v1/late").connection.close()
            assert late.rest() == b""

        proxy.terminate()
        assert streaming.rest() == tunnel.rest() == b""
        assert idle.closed_within()
        assert proxy.wait() == 0
        assert time.monotonic() - began < 20
        ended = {line["path"]: line["ended_by"] for line in proxy.log_lines() if "path" in line}
        assert ended["/v1/stream"] == ended["/v1/realtime"] == "drain"


def test_the_drain_begins_after_the_delay(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, drain_delay=0.5) as proxy,
        proxy.client() as streaming,
        proxy.client() as idle,
    ):
        proxy.sign_in()
        assert idle.ask("GET", "/healthz").status == 200
        streaming.request()
        stream = upstream.receive().answer(STREAM)
        streaming.head()
        began = time.monotonic()
        proxy.terminate()
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping; "))
        assert time.monotonic() - began >= 0.5
        assert idle.closed_within()
        with pytest.raises(ConnectionRefusedError):
            proxy.client()
        stream.answer(b"0\r\n\r\n")
        assert streaming.rest() == b"2\r\nok\r\n0\r\n\r\n"
        assert proxy.wait() == 0


def test_ctrl_c_at_the_proxy_does_not_wait(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, drain_delay=60) as proxy:
        proxy.process.send_signal(signal.SIGINT)
        assert proxy.wait(20) == 0
        assert not any("until then" in line["message"] for line in proxy.log_lines())


def test_ctrl_c_ends_the_delay_that_a_sigterm_began(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, drain_delay=60) as proxy:
        proxy.terminate()
        wait_for_delay(proxy)
        proxy.process.send_signal(signal.SIGINT)
        assert proxy.wait(20) == 0


def test_a_worker_that_is_replaced_does_not_wait_and_the_service_stays_ready(
    tmp_path: Path,
) -> None:
    """Connections that it has accepted may have a health check on its way."""
    with ProxyProcess(tmp_path, drain_delay=60) as proxy, proxy.client() as client:
        proxy.sign_in()
        client.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n")
        proxy.process.send_signal(run_folder.REPLACE)
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping; 1 open"))
        client.send(b"\r\n")
        assert client.message().status == 200
        assert proxy.wait(20) == 0
        assert not any("until then" in line["message"] for line in proxy.log_lines())
