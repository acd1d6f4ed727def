"""Both processes under a load for half a minute, while tokens of three seconds expire."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from proxy_process import Client, ProxyProcess, environment
from sandbox import Sandbox


class RotatingLoad:
    """Requests all the time, some short and some streamed, in threads of its own."""

    SECONDS = 30

    def __init__(self, sandbox: Sandbox, proxy: ProxyProcess):
        self.sandbox = sandbox
        self.proxy = proxy
        self.done = 0
        self.faults: list[str] = []
        self._end = time.monotonic() + self.SECONDS
        self._threads = [
            threading.Thread(target=self._run, args=(one,))
            for one in (self._models, self._stream, self._stream, self._stream)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, request: Callable[[Client], None]) -> None:
        try:
            while time.monotonic() < self._end:
                with self.proxy.client() as client:
                    request(client)
                self.done += 1
        except Exception as fault:  # told by the test, in its own thread
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

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        self._end = 0
        self.join()


@pytest.fixture(scope="session")
def rotating_load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RotatingLoad]:
    """Runs on beside the tests that come after the one that asked for it first."""
    folder = tmp_path_factory.mktemp("rotating-load")
    with Sandbox(access_token_lifetime=3, events=20, events_per_second=5) as sandbox:
        sandbox.write_login(folder / "tokens.json")
        environ = environment(folder, issuer=sandbox.url, upstream=sandbox.url)
        with open(folder / "refresher.log", "wb") as log:
            refresher = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "xaiproxy.refresher"],
                cwd=folder,
                env=environ,
                stderr=log,
            )
        with ProxyProcess(folder, issuer=sandbox.url, upstream=sandbox.url) as proxy:
            load = RotatingLoad(sandbox, proxy)
            yield load
            load.stop()
        refresher.terminate()
        assert refresher.wait(10) == 0
