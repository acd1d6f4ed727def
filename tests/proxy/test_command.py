"""The proxy as a process: start, refusal to start, options and signals."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy_process import COMMAND, Client, ProxyProcess, environment, refuse_to_start
from raw_connection import readable
from scripted_upstream import ScriptedUpstream

from xaiproxy import __version__
from xaiproxy.proxy import listener

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
KEY = "the-client-key"


def write_keys(path: Path) -> None:
    path.write_text(f"me {hashlib.sha256(KEY.encode()).hexdigest()}\n")


@contextlib.contextmanager
def waiting_proxy(folder: Path) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A proxy without a controlling terminal that waits for its port, and the port's owner."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with subprocess.Popen(
            COMMAND,
            cwd=folder,
            text=True,
            env=environment(folder, port=port, max_connections=10),
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                assert (
                    f"cannot listen on 127.0.0.1 port {port} yet: Address already in use; "
                    "retrying for 10 s" in process.stderr.readline()
                )
                yield process, other
            finally:
                process.kill()


def test_a_busy_port_is_taken_once_it_is_free(tmp_path: Path) -> None:
    with waiting_proxy(tmp_path) as (process, other):
        process.send_signal(signal.SIGHUP)
        assert "SIGHUP: the log level is info" in process.stderr.readline()
        # The proxy logs the wait only once.
        time.sleep(2 * listener.INTERVAL)
        port = other.getsockname()[1]
        other.close()
        assert f"listening on http://127.0.0.1:{port}/v1" in process.stderr.readline()
        process.terminate()
        assert process.wait(10) == 0


def test_sigterm_ends_the_wait_for_a_port(tmp_path: Path) -> None:
    with waiting_proxy(tmp_path) as (process, _):
        process.terminate()
        assert process.wait(3) == 0
        assert '"stopped"' in process.stderr.read()


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_public_address_needs_keys_or_explicit_permission(tmp_path: Path, address: str) -> None:
    code, text = refuse_to_start(tmp_path, bind=address)
    assert (
        code == 78 and "xai-client-key add NAME" in text and "XAI_PROXY_ALLOW_ANONYMOUS=1" in text
    )
    assert text.count("\n") == 1


@pytest.mark.parametrize("way", ["keys", "missing keys", "anonymous"])
def test_keys_or_allow_anonymous_permit_a_public_address(tmp_path: Path, way: str) -> None:
    settings = {
        "keys": {},
        "missing keys": {"client_keys_file": tmp_path / "missing"},
        "anonymous": {"allow_anonymous": 1},
    }
    if way == "keys":
        write_keys(tmp_path / "client-keys")
    with ProxyProcess(tmp_path, bind="0.0.0.0", **settings[way]) as proxy:
        assert proxy.ask("GET", "/healthz").status == 200
        refused = proxy.ask().value("X-XAI-Proxy-Error")
        assert refused == ("login_required" if way == "anonymous" else "client_key_required")
        assert proxy.ask("GET", "/v1/models", f"X-Api-Key: {KEY}").value("X-XAI-Proxy-Error") == (
            "client_key_required" if way == "missing keys" else "login_required"
        )


@pytest.mark.parametrize(
    "bind, host",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "LOCALHOST."),
        ("::1", "[::1]"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.3.2.1"),
        ("::", "127.0.0.1"),
        ("::", "localhost"),
    ],
)
def test_the_proxy_refuses_to_be_its_own_upstream(tmp_path: Path, bind: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    code, text = refuse_to_start(
        tmp_path, bind=bind, port=port, allow_anonymous=1, upstream=f"http://{host}:{port}"
    )
    assert code == 78 and text.count("\n") == 1
    assert (
        "XAI_PROXY_UPSTREAM" in text
        and f"listens on port {port}" in text
        and "XAI_PROXY_PORT" in text
    )


def test_an_unknown_setting_is_an_error(tmp_path: Path) -> None:
    code, text = refuse_to_start(tmp_path, idle_timeoot=3)
    assert code == 78 and text.count("\n") == 1
    assert "XAI_PROXY_IDLE_TIMEOOT" in text and "XAI_PROXY_IDLE_TIMEOUT" in text


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["--version"], 0, f"{__version__}\n"),
        (["--nonsense"], 64, "see xai-proxy --help\n"),
        (["--port", "x"], 78, "XAI_PROXY_PORT"),
    ],
)
def test_the_command_line_options_and_exit_codes(
    tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        env=environment(tmp_path),
        text=True,
        timeout=20,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code and text in done.stdout and "Traceback" not in done.stdout


def test_the_proxy_listens_on_ipv6(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, bind="::1") as proxy:
        assert proxy.url == f"http://[::1]:{proxy.port}"
        with Client(proxy.port, "::1") as client:
            assert client.ask("GET", "/healthz").status == 200


def test_the_soft_limit_of_file_descriptors_is_raised(tmp_path: Path) -> None:
    with ProxyProcess(
        tmp_path, prefix=("prlimit", "--nofile=100:5000"), max_connections=100
    ) as proxy:
        limits = Path(f"/proc/{proxy.process.pid}/limits").read_text()
        assert re.search(r"Max open files +280 +5000 ", limits)
        assert not [line for line in proxy.log_lines() if "file descriptor" in line["message"]]


def test_closing_the_terminal_after_sigterm_does_not_abort_the_drain(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    master, slave = os.openpty()
    terminal = ("sh", "-c", f'exec setsid --ctty "$@" <{os.ttyname(slave)}', "sh")
    with (
        ProxyProcess(tmp_path, prefix=terminal, upstream=upstream.origin) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        client.request()
        request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n")
        client.head()
        assert client.chunk() == b"ok"
        proxy.terminate()
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping; 1 open"))
        os.close(slave)
        # The kernel sends SIGHUP.
        os.close(master)
        assert not readable([client.sock], 0.3)
        request.answer(b"0\r\n\r\n")
        assert client.chunk() == b"" and proxy.wait() == 0


def test_sighup_reloads_the_log_level(tmp_path: Path) -> None:
    """This holds without a controlling terminal. Invalid settings change nothing."""
    with ProxyProcess(tmp_path, prefix=("setsid",)) as proxy:

        def hang_up(line: str) -> dict[str, Any]:
            start = len(proxy.log_lines())
            (tmp_path / ".env").write_text(line)
            proxy.process.send_signal(signal.SIGHUP)
            return proxy.wait_for_log(
                lambda line: line["message"].startswith("SIGHUP: "), start=start
            )

        assert proxy.ask("GET", "/healthz").status == 200
        assert hang_up("XAI_PROXY_LOG_LEVEL=debug\n")["message"] == "SIGHUP: the log level is debug"
        assert proxy.ask("GET", "/healthz").status == 200
        assert proxy.wait_for_request("/healthz")["level"] == "debug"
        wrong = hang_up("XAI_PROXY_LOG_LEVEL=loud\n")
        assert wrong["level"] == "error" and "not 'loud'" in wrong["message"]
        assert proxy.ask("GET", "/healthz").status == 200
