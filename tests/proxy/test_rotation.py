"""Both processes under load, while tokens of three seconds expire."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess, environment
from sandbox import Sandbox

# The load ends once both numbers are exceeded.
REFRESHES = 9
REQUESTS = 40
# In seconds: enough on a loaded machine.
LIMIT = 120.0


class Load:
    """Sends short and streamed requests all the time, in threads of its own."""

    def __init__(self, proxy: ProxyProcess):
        self.proxy = proxy
        self.done = 0
        self.faults: list[str] = []
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(one,))
            for one in (self._models, self._stream, self._stream, self._stream)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, request: Callable[[Client], None]) -> None:
        try:
            while not self._stopped.is_set():
                with self.proxy.client() as client:
                    request(client)
                self.done += 1
        # The test reports the error in its own thread.
        except Exception as fault:
            self.faults.append(repr(fault))

    def _models(self, client: Client) -> None:
        for _ in range(20):
            message = client.ask()
            assert message.status == 200, message
            time.sleep(0.05)

    def _stream(self, client: Client) -> None:
        message = client.ask(
            "POST",
            "/v1/chat/completions",
            "Content-Type: application/json",
            body=b'{"model":"grok-4.5","messages":[],"stream":true}',
        )
        assert message.status == 200 and message.body.endswith(b"data: [DONE]\n\n"), message

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox whose tokens last three seconds, and a refresher for them."""
    with Sandbox(access_token_lifetime=3, events=20, events_per_second=5) as sandbox:
        sandbox.write_login(tmp_path / "tokens.json")
        with open(tmp_path / "refresher.log", "wb") as log:
            refresher = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "xaiproxy.refresher"],
                cwd=tmp_path,
                env=environment(tmp_path, issuer=sandbox.url, upstream=sandbox.url),
                stderr=log,
            )
        yield sandbox
        refresher.terminate()
        assert refresher.wait(10) == 0


def test_no_request_fails_while_tokens_expire(issuer: Sandbox, tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, issuer=issuer.url, upstream=issuer.url) as proxy:
        load = Load(proxy)
        try:
            deadline = time.monotonic() + LIMIT
            while not load.faults and (
                load.done <= REQUESTS or issuer.counters()["refreshes"] < REFRESHES
            ):
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            load.stop()
        counters = issuer.counters()
        assert load.faults == [] and load.done > REQUESTS
        assert counters["refreshes"] >= REFRESHES
        assert counters["reuses"] == counters["cancelled_streams"] == 0
        assert {line["status"] for line in proxy.log_lines() if "status" in line} == {200}
