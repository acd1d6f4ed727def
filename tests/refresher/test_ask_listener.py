"""XAI_PROXY_ASK_BIND: how proxies on other machines ask the refresher, and what else it serves."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from refresher_process import Process, wait_until
from sandbox import Sandbox

from xaiproxy import config, errors
from xaiproxy.refresher.ask_listener import DEADLINE, AskListener
from xaiproxy.refresher.process import Refresher
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import fingerprint

UNKNOWN = fingerprint("another token")
WITHOUT_LOW_PORTS = ("setpriv", "--bounding-set=-net_bind_service")
PIECES = [
    b"POST /refused HTTP/1.1\r\n",
    b"GET /metrics HTTP/1.0\r\n",
    b"GET /%ff\xff HTTP/1.1\r\n",
    b"Content-Length: 64\r\n",
    b"content-length: 99999999\r\n",
    b"Content-Length: -1\r\n",
    b"Accept: application/openmetrics-text; version=\xe9\r\n",
    b"\r\n",
    b"\n",
    b"a" * 64,
    b"A" * 9000,
]
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class Scene:
    """A refresher on a clock of its own that begins now, and its listener on the real one."""

    def __init__(self, sandbox: Sandbox, folder: Path):
        environ = {**sandbox.env, "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}
        self.settings = config.from_environ(environ, dotenv_path=os.devnull)
        self.store = TokenStore(self.settings)
        self.sandbox = sandbox
        self._begin, self.uptime = time.time(), 0.0
        self.refresher = Refresher(
            self.settings,
            clock=lambda: self._begin + self.uptime,
            uptime=lambda: self.uptime,
            sleep=self._sleep,
        )
        self.refresher.begin()
        self.listener = AskListener(self.settings, ("127.0.0.1", 0))

    def _sleep(self, seconds: float) -> None:
        self.uptime += seconds

    def turn(self) -> None:
        self.refresher.turn()
        self.listener.poll()

    def sign_in(self, **members) -> None:
        now = self._begin + self.uptime
        self.sandbox.write_login(
            self.store.path, obtained_at=now - 1000, expires_at=now + 20000, **members
        )

    def mark(self) -> str:
        return fingerprint(self.store.load().access_token)


@pytest.fixture
def scene(sandbox: Sandbox, tmp_path: Path, caplog) -> Iterator[Scene]:
    caplog.set_level(logging.INFO, "xaiproxy")
    sandbox.set(device_interval=0)
    scene = Scene(sandbox, tmp_path)
    scene.sign_in()
    yield scene
    scene.listener.close()
    tokens_in_the_log = re.compile(r"eyJ|[\w-]{60}").findall(caplog.text)
    assert not tokens_in_the_log


@pytest.fixture
def ask(scene: Scene, caplog) -> Callable[..., tuple[int, dict]]:
    """Send a request on a connection of its own; return the status, and the JSON or the text."""
    wait_until(lambda: scene.listener.poll() or "proxies can ask at" in caplog.text)
    port = int(re.search(r"proxies can ask at http://127.0.0.1:(\d+)", caplog.text)[1])

    def ask(method: str, path: str, body: str | None = None, **fields: str):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            content = response.read().decode()
            kind = response.getheader("Content-Type")
        return response.status, json.loads(content) if kind == "application/json" else content

    ask.port = port
    return ask


def test_the_digest_of_the_current_token_causes_one_refresh(scene: Scene, ask, caplog):
    refused = scene.mark()
    answers = {str(ask("POST", "/refused", mark)) for mark in (UNKNOWN, refused, refused)}
    # The response is the same for a right and a wrong digest.
    assert answers == {"(202, {'status': 'accepted'})"}
    scene.turn()
    assert scene.mark() != refused and scene.sandbox.counters()["refreshes"] == 1
    ask("POST", "/refused", refused)
    scene.turn()
    assert scene.sandbox.counters()["refreshes"] == 1
    assert caplog.text.count("a proxy reports that the API refuses the access token") == 1


def test_an_unknown_digest_has_no_effect(scene: Scene, ask):
    before = sorted(os.listdir(scene.store.path.parent))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        marks = [fingerprint(str(number)) for number in range(200)]
        assert set(pool.map(lambda mark: ask("POST", "/refused", mark)[0], marks)) == {202}
    scene.turn()
    assert scene.sandbox.counters()["refreshes"] == 0
    assert sorted(os.listdir(scene.store.path.parent)) == before


def test_a_flood_costs_at_most_one_refresh_in_120_seconds(scene: Scene, ask):
    """A client reports each new token at once, for an hour."""
    times, refreshed = [], 0
    while scene.uptime < 3600:
        ask("POST", "/refused", scene.mark())
        scene.turn()
        if (count := scene.sandbox.counters()["refreshes"]) != refreshed:
            refreshed = count
            times.append(scene.uptime)
        scene.uptime += 15
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert refreshed > 3 and min(gaps) >= 120 and gaps[2] > 1.9 * gaps[1] > 3.5 * gaps[0], gaps


@pytest.mark.parametrize(
    "body", ["", "0" * 63, "0" * 65, "g" * 64, "A" * 64, "0" * 63 + "\n", "x" * 9000], ids=len
)
def test_what_is_no_digest_is_a_bad_request(scene: Scene, ask, body: str):
    status, answer = ask("POST", "/refused", body)
    assert (status, answer["error"]["code"]) == (400, "bad_request")


def test_only_what_the_refresher_serves_is_answered(scene: Scene, ask):
    assert ask("GET", "/refused")[0] == ask("POST", "/healthz")[0] == 405
    assert ask("GET", "/v1/models")[0] == ask("GET", "/tokens.json")[0] == 404
    for sent in (b"nonsense\r\n\r\n", b"GET /healthz HTTP/2\r\n\r\n", b"GET / HTTP/1.1\n" * 700):
        with socket.create_connection(("127.0.0.1", ask.port), timeout=10) as connection:
            connection.sendall(sent + b"\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_no_request_ends_the_listener(scene: Scene, ask):
    chance = random.Random(1)
    for _ in range(200):
        sent = b"".join(chance.choices(PIECES, k=chance.randint(1, 7)))
        with (
            socket.create_connection(("127.0.0.1", ask.port), timeout=10) as connection,
            # The listener may close before it has read everything.
            contextlib.suppress(OSError),
        ):
            connection.sendall(sent + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(9) in (b"", b"HTTP/1.1 "), sent
    assert ask("GET", "/healthz")[0] == 200


def test_health_and_readiness_are_the_refreshers_own(scene: Scene, ask):
    scene.turn()
    assert ask("GET", "/healthz") == (200, {"status": "ok"})
    assert ask("GET", "/readyz?verbose") == (200, {"status": "ready", "reason": "signed in"})
    # Until it has been renewed.
    ask("POST", "/refused", scene.mark())
    status, answer = ask("GET", "/readyz")
    assert status == 503 and "the API refuses the access token" in answer["reason"]
    scene.turn()
    assert ask("GET", "/readyz")[0] == 200
    scene.store.path.unlink()
    status, answer = ask("GET", "/readyz")
    assert status == 503 and "no login" in answer["reason"]
    assert ask("POST", "/refused", UNKNOWN)[0] == 202


def test_the_metrics_are_those_of_the_login_and_the_process(scene: Scene, ask):
    ask("POST", "/refused", scene.mark())
    scene.turn()
    text = ask("GET", "/metrics", Accept=OPENMETRICS)[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    refreshes = families["xaiproxy_refreshes"].samples
    assert {sample.labels["result"]: sample.value for sample in refreshes}["ok"] == 1
    assert families["xaiproxy_access_token_expiry_timestamp_seconds"].samples[0].value > time.time()
    assert {"xaiproxy_build", "xaiproxy_published_timestamp_seconds", "process_cpu_seconds"} <= {
        *families
    }
    plain = ask("GET", "/metrics")[1]
    assert "# TYPE xaiproxy_refreshes_total counter" in plain


def test_a_slow_client_delays_others_by_the_deadline(scene: Scene, ask):
    with socket.create_connection(("127.0.0.1", ask.port), timeout=10) as slow:
        slow.sendall(b"POST /refused HTTP/1.1\r\nContent-Length: 64\r\n\r\n0")
        began = time.monotonic()
        assert ask("GET", "/healthz")[0] == 200
        assert 0.5 < time.monotonic() - began < DEADLINE + 1
        assert slow.recv(1) == b""


@pytest.mark.skipif(not hasattr(socket, "TCP_DEFER_ACCEPT"), reason="the kernel accepts at once")
def test_idle_connections_delay_no_other(scene: Scene, ask):
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", ask.port)))
        began = time.monotonic()
        assert ask("GET", "/healthz")[0] == 200
        assert time.monotonic() - began < 10 < 50 * DEADLINE


def test_a_read_only_folder_is_named_in_the_log(scene: Scene, ask, caplog):
    scene.store.refused_path.mkdir()
    assert ask("POST", "/refused", scene.mark())[0] == 503
    wait_until(
        lambda: scene.listener.poll() or "tokens.json.refused cannot be written" in caplog.text
    )


def test_an_address_in_use_is_retried_and_the_login_renewed(sandbox: Sandbox, tmp_path: Path):
    sandbox.set(device_interval=0)
    path = tmp_path / "tokens.json"
    now = time.time()
    sandbox.write_login(path, obtained_at=now - 1000, expires_at=now + 100)
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = taken.getsockname()[1]
        process = Process(sandbox, path, XAI_PROXY_ASK_BIND=f"127.0.0.1:{port}")
        stack.callback(process.close)
        process.wait_for(f"cannot listen on 127.0.0.1 port {port} (XAI_PROXY_ASK_BIND) yet: ")
        process.wait_for("refreshed; ")
        taken.close()
        process.wait_for(f"proxies can ask at http://127.0.0.1:{port}")
        process.process.terminate()
        assert process.wait() == 0


@pytest.mark.skipif(
    os.geteuid() != 0
    or subprocess.run([*WITHOUT_LOW_PORTS, "true"], capture_output=True).returncode
    or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 2,
    reason="every port can be used here, or setpriv is not installed",
)
def test_a_port_that_may_not_be_used_is_a_wrong_setting(sandbox: Sandbox, tmp_path: Path):
    process = Process(
        sandbox,
        tmp_path / "tokens.json",
        before=WITHOUT_LOW_PORTS,
        XAI_PROXY_ASK_BIND="127.0.0.1:1",
    )
    assert process.wait() == errors.EXIT_CONFIGURATION
    assert "cannot listen on 127.0.0.1 port 1: Permission denied; set XAI_PROXY_ASK" in "".join(
        process.lines
    )
