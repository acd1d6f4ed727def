"""xai-serve --workers and xai-restart: real processes under a real supervisord."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from proxy_process import Client, UnixClient
from refresher_process import wait_until
from sandbox import CHAT, Sandbox
from supervised import BIN, Supervised

REQUESTS_A_SECOND = 10
COUNTER = re.compile(rb"^(xaiproxy_(?:requests|connections_accepted)_total\S*) (\S+)$", re.M)


class Workers(Supervised):
    """xai-serve --workers 2."""

    def __init__(self, folder: Path, sandbox: Sandbox, **settings: str):
        command = [BIN / "xai-serve", "--workers", "2"]
        super().__init__(folder, sandbox, command=command, **settings)
        self.folder = folder
        self.wait_for_line('"message": "listening on ', 2)

    def __enter__(self) -> Workers:
        return self

    def pid(self, name: str) -> int:
        """The latest process of that name."""
        return int(re.findall(rf"spawned: '{name}' with pid (\d+)", "".join(self.lines))[-1])

    def restart(self, *arguments: str) -> tuple[int, str, str]:
        """The exit status, stdout and stderr of an xai-restart, which runs in another folder."""
        done = subprocess.run(
            [BIN / "xai-restart", *arguments],
            env=self.environ,
            cwd=os.sep,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """One in which the path of a control socket is short enough, unlike in tmp_path."""
    with tempfile.TemporaryDirectory(prefix="xai-") as folder:
        yield Path(folder)


class Clients:
    """Clients that open a connection for each request, until the end; `failures` of any kind."""

    def __init__(self, workers: Workers):
        with workers.client() as client:
            self.port = client.sock.getpeername()[1]
        self.requests = 0
        self.streams = 0
        self.failures: list[str] = []
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._request)]
        self._threads += [threading.Thread(target=self._stream) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_error: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _request(self) -> None:
        counters: dict[bytes, float] = {}
        while not self._enough.wait(1 / REQUESTS_A_SECOND):
            self.requests += 1
            path = ("/metrics", "/readyz", "/v1/models")[min(self.requests % 5, 2)]
            try:
                with Client(self.port) as client:
                    answer = client.ask("GET", path)
                assert answer.status == 200
            except (OSError, EOFError, AssertionError) as error:
                self.failures.append(f"request {self.requests}: {error!r}")
                continue
            if path == "/metrics":
                shown = {name: float(value) for name, value in COUNTER.findall(answer.body)}
                self.failures += [
                    f"{name!r} fell from {value} to {shown.get(name)}"
                    for name, value in counters.items()
                    if shown.get(name, -1) < value
                ]
                counters = shown

    def _stream(self) -> None:
        while not self._enough.is_set():
            try:
                with Client(self.port) as client:
                    open_stream(client)
                    assert rest_of(client).endswith(b"data: [DONE]\n\n")
                self.streams += 1
            except (OSError, EOFError, AssertionError) as error:
                self.failures.append(f"stream: {error!r}")


def open_stream(client: Client) -> None:
    body = json.dumps(CHAT).encode()
    client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=body)
    assert client.head().status == 200
    assert client.chunk().startswith(b"data: ")


def rest_of(client: Client) -> bytes:
    return b"".join(iter(client.chunk, b""))


def test_a_rolling_restart_under_load_loses_nothing(sandbox):
    sandbox.set(events=10, events_per_second=5)
    # During a delay, /readyz would return 503.
    settings = {"XAI_PROXY_DRAIN_DELAY": "20"}
    with short_folder() as folder, Workers(folder, sandbox, **settings) as workers:
        before = [workers.pid(name) for name in ("proxy-0", "proxy-1", "refresher")]
        with Clients(workers) as clients:
            status, said, steps = workers.restart("--refresher")
        assert (status, said) == (0, "2 workers were replaced, and the refresher\n"), steps
        after = [workers.pid(name) for name in ("proxy-0", "proxy-1", "refresher")]
        assert not set(before) & set(after)
        assert clients.failures == [] and clients.requests > 50 and clients.streams > 10
        # A killed worker loses its own streams, and its sibling goes on.
        sandbox.set(events=14)
        first, second = workers.pid("proxy-0"), workers.pid("proxy-1")
        with contextlib.ExitStack() as stack:
            streams = []
            for other in (first, second):
                with stopped(other):
                    for _ in range(4):
                        streams.append(stack.enter_context(workers.client()))
                        open_stream(streams[-1])
            os.kill(first, signal.SIGKILL)
            with workers.client() as client:
                assert client.ask("GET", "/v1/models").status == 200
            ends = [was_complete(client) for client in streams]
        assert ends == [True] * 4 + [False] * 4
        assert workers.wait_for_line("exited: proxy-0 .*SIGKILL")
        assert os.listdir(folder) == ["login"]
        [numbers] = (folder / "login" / "run").glob("*-0.json")
        # As after a SIGKILL in the middle of a write.
        numbers.with_name(f"{numbers.name}.0badcafe").touch()
        # The second Ctrl-C ends the delay of the worker that was started last.
        workers.wait_for_line('"message": "listening on ', 5)
        workers.signal(signal.SIGINT)
        workers.wait_for_line("until then new connections are served")
        workers.signal(signal.SIGINT)
    assert not list((folder / "login").glob("run/*"))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text(), 5)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def was_complete(client: Client) -> bool:
    try:
        return rest_of(client).endswith(b"data: [DONE]\n\n")
    except (OSError, EOFError, AssertionError):
        return False


def is_refused(path: Path) -> bool:
    try:
        UnixClient(path).close()
    except ConnectionRefusedError:
        return True
    return False


def test_connections_are_refused_while_the_last_responses_drain(sandbox):
    """They are served during the delay. The file of a Unix socket is removed at the end.

    The admin listener of the workers is one socket, which no other program can share.
    """
    sandbox.set(events=16, events_per_second=4)
    with short_folder() as folder:
        path = folder / "socket"
        settings = {
            "XAI_PROXY_BIND": f"unix:{path}",
            "XAI_PROXY_ADMIN_BIND": "127.0.0.1:0",
            "XAI_PROXY_DRAIN_DELAY": "1",
        }
        with Workers(folder, sandbox, **settings) as workers, UnixClient(path) as client:
            open_stream(client)
            line = workers.wait_for_line(r"health checks and metrics on http://127.0.0.1:(\d+)", 2)
            admin = int(line[1])
            with socket.socket() as other, pytest.raises(OSError, match="already in use"):
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                other.bind(("127.0.0.1", admin))
            workers.signal(signal.SIGTERM)
            workers.wait_for_line("until then new connections are served", 2)
            with UnixClient(path) as late, Client(admin) as check:
                assert late.ask("GET", "/readyz").status == 503
                assert check.ask("GET", "/healthz").status == 200
            wait_until(lambda: is_refused(path), 10)
            with pytest.raises(ConnectionRefusedError):
                Client(admin)
            assert workers.process.poll() is None
            assert rest_of(client).endswith(b"data: [DONE]\n\n")
            assert workers.ended() == 0
        assert not path.exists()


def test_a_worker_that_cannot_start_stops_the_restart_and_its_sibling_serves(sandbox):
    with short_folder() as folder, Workers(folder, sandbox) as workers:
        # When supervisord counts them as started, an end with 78 is no failure of all.
        workers.wait_for_line("success: proxy-1 entered RUNNING state")
        (folder / ".env").write_text("XAI_PROXY_REFRESH_SKEW=x\n")
        sibling = workers.pid("proxy-1")
        status, said, steps = workers.restart()
        assert (status, said) == (75, "") and "proxy-0 does not serve" in steps, steps
        workers.wait_for_line("proxy-0 cannot be kept running .* the other workers serve without")
        with workers.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        assert workers.pid("proxy-1") == sibling
        (folder / ".env").unlink()
        status, said, steps = workers.restart()
        assert (status, said) == (0, "2 workers were replaced\n"), steps
        workers.signal(signal.SIGTERM)
        assert workers.ended() == 0
    log = "".join(workers.lines)
    assert log.count("cannot be kept running") == 1


def test_after_an_interrupted_restart_all_workers_run(sandbox):
    sandbox.set(events=12, events_per_second=4)
    with short_folder() as folder, Workers(folder, sandbox) as workers:
        with contextlib.ExitStack() as stack:
            # All of them on one worker: once in 64 runs of a fair spread.
            for _ in range(7):
                open_stream(stack.enter_context(workers.client()))
            workers.wait_for_line("success: proxy-1 entered RUNNING state")
            restart = subprocess.Popen([BIN / "xai-restart"], env=workers.environ, cwd=os.sep)
            workers.wait_for_line(r"stopping; \d open responses")
            with subprocess.Popen(
                [BIN / "xai-restart"], env=workers.environ, cwd=os.sep, stderr=subprocess.PIPE
            ) as second:
                assert second.stderr.readline() == b"waiting for another xai-restart\n"
                second.kill()
            restart.kill()
            restart.wait()
        workers.wait_for_line("success: proxy-0 entered RUNNING state", 2)
        # One that was stopped on purpose cannot stand in for one that cannot start.
        (folder / ".env").write_text("XAI_PROXY_REFRESH_SKEW=x\n")
        os.kill(workers.pid("proxy-1"), signal.SIGKILL)
        workers.wait_for_line("proxy-1 cannot be kept running .* the other workers serve without")
        # It is checked once a second, and named once.
        time.sleep(1.5)
        [conf] = (folder / "login" / "run").glob("*.conf")
        subprocess.run([BIN / "supervisorctl", "-c", conf, "stop", "proxy:proxy-0"], check=True)
        assert workers.ended() == 70
    assert "".join(workers.lines).count("the other workers serve without") == 1


def test_a_wrong_setting_at_the_start_ends_all_workers(sandbox):
    with short_folder() as folder:
        (folder / "client-keys").write_text("")
        command = [BIN / "xai-serve", "--workers", "2"]
        with Supervised(folder, sandbox, command=command, XAI_PROXY_BIND="0.0.0.0") as supervised:
            assert supervised.ended() == 78
        log = "".join(supervised.lines)
        assert "0.0.0.0 is reachable from other machines" in log
        assert log.count(" ending with status 78") == 1
        assert "the other workers serve without" not in log


def test_a_worker_that_is_missing_at_the_end_is_not_named(sandbox):
    """Here without a run folder, as where the token folder is read-only."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        (folder / "login").mkdir(0o700)
        (folder / "login" / "run").touch()
        workers = stack.enter_context(Workers(folder, sandbox, XAI_PROXY_DRAIN_DELAY="2"))
        with workers.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        assert workers.restart()[0] == 69
        for number in (1, 2):
            workers.wait_for_line("spawned: 'proxy-1'", number)
            os.kill(workers.pid("proxy-1"), signal.SIGKILL)
            workers.wait_for_line("exited: proxy-1 .*SIGKILL", number)
        # The next start is two seconds off.
        workers.signal(signal.SIGTERM)
        assert workers.ended() == 0
    log = "".join(workers.lines)
    assert "xai-serve: xai-restart cannot replace these workers, and each shows its own" in log
    assert "cannot be kept running" not in log


@pytest.mark.parametrize("arguments", [(), ("--refresher",)])
def test_without_workers_it_names_what_to_do(tmp_path, arguments):
    done = subprocess.run(
        [BIN / "xai-restart", *arguments],
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    [sentence] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (69, "")
    assert sentence.startswith("xai-restart: no `xai-serve --workers N` with these settings")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "bind, folders, advice",
    [
        ("127.0.0.1", ("x" * 60, "y" * 60), "set XAI_PROXY_TOKEN_PATH to a file in a folder"),
        (f"unix:/tmp/{'x' * 90}", (), "set XAI_PROXY_BIND to a shorter path, or XAI_PROXY_TOKEN_"),
    ],
)
def test_a_path_that_is_too_long_for_the_control_socket_is_refused(tmp_path, bind, folders, advice):
    path = tmp_path.joinpath(*folders, "tokens.json")
    done = subprocess.run(
        [BIN / "xai-serve", "--workers", "2"],
        env={
            "PATH": os.defpath,
            "HOME": str(tmp_path),
            "XAI_PROXY_PORT": "0",
            "XAI_PROXY_BIND": bind,
            "XAI_PROXY_TOKEN_PATH": str(path),
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 78 and f"is too long for a socket; {advice}" in done.stderr
