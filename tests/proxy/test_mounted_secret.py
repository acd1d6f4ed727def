"""A proxy in a pod that holds nothing: a mounted Secret, and no network but the API and a refresher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted_secret import MountedSecret
from namespaces import Namespace, needs_network
from proxy_process import PYTHON, ProxyProcess, environment
from raw_connection import Message
from refresher_process import Process, wait_until
from sandbox import Sandbox
from scripted_upstream import OK, ScriptedUpstream
from service import Service

USER = 12345
# Neither root nor the owner of the mounted files.
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
# The address of the refresher's Service; it is no loopback address, which no proxy variable covers.
SERVICE = "10.96.0.7"
NOWHERE = "http://127.0.0.1:1"

pytestmark = [
    needs_network,
    pytest.mark.skipif(
        os.geteuid() != 0
        or subprocess.run(
            [*AS_USER, *PYTHON, "-c", "import xaiproxy"], capture_output=True
        ).returncode,
        reason="setpriv is not installed, or another user cannot run this checkout's Python",
    ),
]


class Pod:
    """A proxy in a network of its own, with the Secret that the refresher publishes to a file."""

    def __init__(self, folder: Path, sandbox: Sandbox, stack: contextlib.ExitStack):
        self.sandbox = sandbox
        # The refresher's machine.
        volume, self.published = folder / "volume", folder / "published" / "tokens.json"
        self.published.parent.mkdir()
        now = time.time()
        sandbox.write_login(volume / "tokens.json", obtained_at=now - 1000, expires_at=now + 20000)
        self.refresher = Process(
            sandbox,
            volume / "tokens.json",
            XAI_PROXY_ASK_BIND="127.0.0.1:0",
            XAI_PROXY_PUBLISH=f"file:{self.published}",
        )
        stack.callback(self.refresher.close)
        self.refresher.wait_for("proxies can ask at")
        port = int(
            re.search(r"proxies can ask at http://.*?:(\d+)", "".join(self.refresher.lines))[1]
        )
        wait_until(self.published.exists)
        # The proxy's.
        self.network = Namespace()
        stack.callback(self.network.close)
        self.network.ip("link set lo up", f"address add {SERVICE}/32 dev lo")
        with self.network.entered():
            listener = socket.create_server((SERVICE, 0))
        service = Service(listener, lambda: port)
        stack.callback(service.close)
        self.secret = MountedSecret(folder / "mounted", group=USER)
        self.secret.swap(self.published.read_text())
        self.home = folder / "home"
        self.home.mkdir()
        self.settings = {
            "token_path": self.secret.path,
            "issuer": sandbox.url,
            "refresher": service.url,
            # For which any file descriptor limit has room.
            "max_connections": 100,
        }
        self.environ = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"), NOWHERE)
        with self.network.entered():
            self.upstream = stack.enter_context(ScriptedUpstream())
            self.settings["upstream"] = self.upstream.origin
            self.proxy = stack.enter_context(
                ProxyProcess(self.home, prefix=AS_USER, environ=self.environ, **self.settings)
            )

    def token(self) -> str:
        return json.loads(self.secret.path.read_text())["access_token"]

    def request(self, *answers: bytes) -> Message:
        """Send a request, which reaches upstream with the mounted token.

        `answers`: upstream's, the second one to the request by which the proxy tries the token.
        """
        with self.network.entered(), self.proxy.client() as client:
            client.request()
            for answer in answers:
                request = self.upstream.receive()
                assert request.token == self.token()
                request.answer(answer)
            return client.message()

    def get(self, path: str) -> Message:
        """Send a request that does not reach upstream."""
        with self.network.entered():
            answer = self.proxy.ask("GET", path)
        assert self.upstream.quiet()
        return answer

    def status(self) -> str:
        """What `xai-login --status` prints in the pod."""
        with self.network.entered():
            return subprocess.run(
                [*AS_USER, sys.executable, "-m", "xaiproxy.login", "--status"],
                env=environment(self.home, self.environ, **self.settings),
                cwd=self.home,
                capture_output=True,
                text=True,
                check=True,
            ).stdout


@pytest.fixture
def pod(sandbox: Sandbox) -> Iterator[Pod]:
    sandbox.set(device_interval=0)
    # tmp_path is closed to other users.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o755)
        yield Pod(Path(folder), sandbox, stack)


def test_a_pod_that_holds_nothing_serves_and_gets_through_a_refused_token(pod: Pod):
    mounted = json.loads(pod.secret.path.read_text())
    assert not {"refresh_token", "refresh_try", "asked"} & set(mounted)
    with (
        pod.network.entered(),
        pytest.raises(OSError),
        contextlib.closing(socket.create_connection((pod.sandbox.host, pod.sandbox.port), 1)),
    ):
        pass
    assert pod.request(OK).status == 200
    assert json.loads(pod.get("/readyz").body) == {"status": "ready", "reason": "signed in"}
    shown = pod.status()
    assert shown.startswith("Signed in\n")
    assert "Refresher   on another machine: " in shown and "no refresh token" not in shown
    # Nothing that happens without a fault is a warning.
    assert [line for line in pod.proxy.log_lines() if line["level"] != "info"] == []

    refused = pod.token()
    answer = pod.request(REFUSED, REFUSED)
    assert (answer.status, answer.value("Retry-After")) == (503, "45")
    # Until the Secret that is mounted changes.
    wait_until(lambda: refused not in pod.published.read_text())
    assert pod.get("/v1/models").status == 503 and pod.get("/readyz").status == 200
    pod.secret.swap(pod.published.read_text())
    assert pod.token() != refused
    assert pod.request(OK).status == 200
    assert pod.sandbox.counters()["refreshes"] == 1
