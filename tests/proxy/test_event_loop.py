"""The log of a running proxy whose reader is slow, stopped or gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import gevent.event
from proxy_process import COMMAND, Client, ProxyProcess, environment
from scripted_upstream import ScriptedUpstream

from xaiproxy.proxy import event_loop

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_an_unread_log_blocks_no_request(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """5,000 requests and a stream pass, while the pipe at stderr holds some hundred lines."""
    rounds, requests = 30, 100
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, read_log=False) as proxy,
        proxy.client() as streaming,
    ):
        # Otherwise a line about the missing refresher could be dropped as well.
        proxy.refresher_lives()
        proxy.sign_in()
        streaming.request("GET", "/v1/stream")
        stream = upstream.receive().answer(CHUNKED)
        streaming.head()
        with proxy.client() as client:
            for number in range(rounds):
                client.send(b"GET /v1/v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
                assert [client.message().status for _ in range(requests)] == [404] * requests
                data = b"%02d" % number
                stream.answer(b"2\r\n%b\r\n" % data)
                assert streaming.chunk() == data
        stream.answer(b"0\r\n\r\n")
        assert streaming.chunk() == b""

        proxy.read_log()
        # This line appears without another request.
        proxy.wait_for_log(lambda line: "log lines were dropped" in line["message"])
    lines = proxy.log_lines()
    dropped = [
        int(line["message"].split()[0])
        for line in lines
        if "log lines were dropped" in line["message"]
    ]
    asked = rounds * requests + 1
    assert sum(dropped) > 1000 and sum(dropped) + sum("method" in line for line in lines) == asked


def test_a_burst_of_log_lines_waits_for_a_slow_reader(
    tmp_path: Path,
) -> None:
    """One connection that starves the event loop logs more lines than the pipe holds.

    They take no more than half of the pipe and the buffer limit together: short writes may leave
    the pipe's pages half full.
    """
    requests = 700
    with ProxyProcess(tmp_path, read_log=False) as proxy, proxy.client() as client:
        # F_SETPIPE_SZ.
        fcntl.fcntl(proxy.process.stderr.fileno(), 1031, 1 << 18)
        client.send(
            b"".join(
                b"GET /v1/v1/%04d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number
                for number in range(requests)
            )
        )
        assert [client.message().status for _ in range(requests)] == [404] * requests
        with proxy.client() as other:
            assert other.ask("GET", "/other").status == 404
        proxy.read_log()
        proxy.wait_for_request("/other")
    lines = proxy.log_lines()
    assert [line["path"] for line in lines if "method" in line] == [
        *(f"/v1/v1/{number:04}" for number in range(requests)),
        "/other",
    ]
    assert not any("dropped" in line["message"] for line in lines)


def test_a_log_that_cannot_be_written_blocks_no_request(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *COMMAND]
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path, port=port)) as process:
        deadline = time.monotonic() + 10
        while True:
            try:
                with Client(port) as client:
                    assert client.ask("GET", "/nowhere").status == 404
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_full_pipe_is_polled_without_an_event() -> None:
    read_end, write_end = os.pipe()
    called = gevent.event.Event()
    try:
        os.set_blocking(write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_end, bytes(65536))
        event_loop.WhenWritable()(write_end, called.set)
        assert not called.wait(event_loop.POLL_INTERVAL / 2) and called.wait(
            event_loop.POLL_INTERVAL
        )
    finally:
        os.close(read_end)
        os.close(write_end)
