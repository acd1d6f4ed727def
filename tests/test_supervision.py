"""conf/supervisord.conf and the plug-in, with real processes, read as a container's log is: through a pipe."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
from proxy_process import Client

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf" / "supervisord.conf"
BIN = Path(sys.executable).parent
CHAT = json.dumps({"model": "grok-4.5", "messages": [], "stream": True}).encode()


class Supervised:
    """supervisord with the real conf, and its output: `lines`.

    `path`: a folder to find programs in first. `pipe`: where it writes, and where that comes out.
    """

    def __init__(self, folder, sandbox, *, prefix=(), path=None, pipe=os.pipe, **settings):
        environ = {"PATH": f"{path or BIN}:{BIN}:{os.environ['PATH']}", "HOME": str(folder), "XAI_PROXY_PORT": "0",
                   **sandbox.env, "XAI_PROXY_TOKEN_PATH": str(folder / "login" / "tokens.json"), **settings}
        sandbox.write_login(environ["XAI_PROXY_TOKEN_PATH"])
        self._output, stdout = pipe()
        self.process = subprocess.Popen([*prefix, BIN / "supervisord", "-c", CONF], cwd=folder, env=environ,
                                        stdout=stdout, stderr=subprocess.STDOUT)
        os.close(stdout)
        self.lines = []
        self._changed = threading.Condition()
        self._may_read = threading.Event()
        self._may_read.set()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.read_on()
        if self.process.poll() is None:
            self.process.terminate()
        self.ended()
        self._reader.join()

    def _read(self):
        with open(self._output) as output:
            for line in output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
                self._may_read.wait()

    def stop_reading(self):
        self._may_read.clear()

    def read_on(self):
        self._may_read.set()

    def close_output(self):
        """Leave nobody who reads."""
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), self._output)

    def says(self, pattern, times=1, seconds=30):
        """Wait until `pattern` was said so often; the last match, or None when that takes too long."""
        def matches():
            return [match for match in map(re.compile(pattern).search, self.lines) if match]
        with self._changed:
            return self._changed.wait_for(lambda: len(matches()) >= times, seconds) and matches()[times - 1] or None

    def said(self, pattern, times=1):
        match = self.says(pattern, times)
        assert match, "".join(self.lines)
        return match

    def client(self, start=1):
        """A connection to the proxy, which listens for the `start`th time."""
        return Client(int(self.said(r"listening on http://127.0.0.1:(\d+)/v1", start)[1]))

    def signal(self, number):
        self.process.send_signal(number)

    def ended(self):
        """Its status, once it has ended and all is read."""
        status = self.process.wait(30)
        self._reader.join(10)
        return status

    def complaints(self):
        """supervisord's own lines above INFO."""
        return [line for line in self.lines if re.match(r"[-\d]+ [:,\d]+ (WARN|ERRO|CRIT) ", line)]


def open_stream(client):
    """Begin a streamed chat; return once its first event is there."""
    client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=CHAT)
    assert client.head().status == 200
    assert client.chunk().startswith(b"data: ")


def rest_of_stream(client):
    return b"".join(iter(client.chunk, b""))


def stand_ins(folder, **programs):
    """A folder with shell scripts that are found instead of xai-NAME."""
    for name, script in programs.items():
        program = folder / "stand-ins" / f"xai-{name}"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return program.parent


BROKEN = "echo XAI_PROXY_REFRESH_SKEW is wrong >&2; exit 78"
SLOW_TO_STOP = "trap 'sleep 2; exit 0' TERM; while :; do sleep 0.1; done"


def test_sigterm_drains_the_proxy_before_the_refresher_stops_and_ends_with_0(tmp_path, sandbox):
    sandbox.set(events=10, events_per_second=10)
    (tmp_path / "supervisord.pid").write_text("1\n")  # of one that was killed
    with Supervised(tmp_path, sandbox) as supervised, supervised.client() as client:
        assert client.ask("GET", "/v1/models").status == 200
        open_stream(client)
        supervised.signal(signal.SIGTERM)
        assert rest_of_stream(client).endswith(b"data: [DONE]\n\n")
        assert supervised.ended() == 0
    log = "".join(supervised.lines)
    assert 0 < log.index("stopped: proxy (exit status 0)") < log.index("stopped: refresher (exit status 0)")
    as_root = [line for line in supervised.complaints() if "running as root" in line]
    assert len(as_root) == (os.getuid() == 0)
    assert set(supervised.complaints()) - set(as_root) == {supervised.said(".*received SIGTERM.*\n")[0]}
    assert not (tmp_path / "supervisord.pid").exists()


def test_a_proxy_that_was_killed_comes_back(tmp_path, sandbox):
    with Supervised(tmp_path, sandbox) as supervised:
        with supervised.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        supervised.said("success: proxy entered RUNNING state")  # killed before, it would be a failed start
        os.kill(int(supervised.said(r"spawned: 'proxy' with pid (\d+)")[1]), signal.SIGKILL)
        with supervised.client(start=2) as client:
            assert client.ask("GET", "/v1/models").status == 200


def test_a_fatal_program_drains_the_other_and_ends_with_70(tmp_path, sandbox):
    sandbox.set(events=1000, events_per_second=100)  # 10 s; the refresher is given up after 8
    programs = stand_ins(tmp_path, refresher=BROKEN)
    with Supervised(tmp_path, sandbox, path=programs) as supervised, supervised.client() as client:
        open_stream(client)
        supervised.said("CRIT refresher cannot be kept running")
        rest = rest_of_stream(client)
        assert rest.count(b"data: ") > 1 and rest.endswith(b"data: [DONE]\n\n")
        assert supervised.ended() == 70
    supervised.said("XAI_PROXY_REFRESH_SKEW is wrong")
    supervised.said(r"CRIT refresher cannot be kept running .* ending with status 70")
    supervised.said(r"stopped: proxy \(exit status 0\)")
    assert len(supervised.said(".*CRIT refresher.*\n")[0]) < 300


def test_sigterm_while_a_program_waits_for_its_next_start_ends_with_0(tmp_path, sandbox):
    # supervisord makes the one FATAL then, and goes on to stop the other.
    with Supervised(tmp_path, sandbox, path=stand_ins(tmp_path, proxy=BROKEN, refresher=SLOW_TO_STOP)) as supervised:
        supervised.said("exited: proxy", times=2)  # the next start is two seconds off
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests show it, since they were not run by root")
def test_it_runs_as_a_user_without_rights(tmp_path, sandbox):
    # A user namespace without a mapping: nobody's number and no capability, but files are still reached.
    if subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("unshare --user does not work here")
    with Supervised(tmp_path, sandbox, prefix=("unshare", "--user")) as supervised:
        with supervised.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    assert supervised.complaints() == [supervised.said(".*received SIGTERM.*\n")[0]]


def test_a_stdout_that_cannot_be_opened_anew_gets_every_line(tmp_path, sandbox):
    def journal():
        return [end.detach() for end in socket.socketpair()]
    with Supervised(tmp_path, sandbox, pipe=journal) as supervised:
        supervised.client().close()
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
        supervised.said('"stopped"')
        supervised.said(r"stopped: refresher \(exit status 0\)")


def test_the_conf_leaves_the_settings_to_the_environment():
    settings = [line for line in CONF.read_text().splitlines() if not line.startswith(";")]
    assert not [line for line in settings if "XAI_PROXY_" in line or "%(" in line or "environment" in line]


def test_a_stdout_that_nobody_reads_stops_no_request(tmp_path, sandbox):
    sandbox.set(events=1_000_000, events_per_second=20)
    with Supervised(tmp_path, sandbox, XAI_PROXY_DRAIN_TIMEOUT="0") as supervised, supervised.client() as streaming:
        supervised.stop_reading()
        open_stream(streaming)

        def ask(times):  # each is a log line; most cost the sandbox nothing
            with supervised.client() as client:
                return [client.ask("GET", "/nowhere" if n % 10 else "/v1/models").status for n in range(times)]
        with futures.ThreadPoolExecutor(4) as pool:
            statuses = sum(pool.map(ask, [1250] * 4), [])
        assert (statuses.count(200), statuses.count(404)) == (500, 4500)
        while not streaming.silent():  # events from before
            streaming.chunk()
        assert streaming.chunk().startswith(b"data: ")
        supervised.read_on()
        supervised.said(r"\d{3,} log lines were dropped")  # which needs no further line


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait_for_models(port, seconds=30):
    """Until a proxy serves there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with Client(port) as client:
                assert client.ask("GET", "/v1/models").status == 200
                return
        except (OSError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def stop_reading(supervised, port):
    """Once stdout takes no more."""
    supervised.stop_reading()
    with Client(port) as client:
        for _ in range(20):
            client.send(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            assert {client.message().status for _ in range(100)} == {404}


def close_reader(supervised, port):
    supervised.close_output()
    with Client(port) as client:
        assert client.ask("GET", "/nowhere").status == 404


@pytest.mark.parametrize("lose_reader", [stop_reading, close_reader])
def test_without_a_reader_programs_are_restarted_and_signals_obeyed(tmp_path, sandbox, lose_reader):
    port = free_port()
    with Supervised(tmp_path, sandbox, XAI_PROXY_PORT=str(port)) as supervised:
        supervised.said("success: proxy entered RUNNING state")
        proxy = int(supervised.said(r"spawned: 'proxy' with pid (\d+)")[1])
        lose_reader(supervised, port)
        os.kill(proxy, signal.SIGKILL)
        wait_for_models(port)
        supervised.signal(signal.SIGTERM)
        assert supervised.process.wait(30) == 0


def test_a_stdout_that_is_a_file_gets_every_line(tmp_path, sandbox):
    """Not appended to: what was written to it by two descriptors would overwrite itself."""
    log = tmp_path / "log"

    def file():
        end, writer = os.pipe()
        os.close(writer)
        return end, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    port = free_port()
    with Supervised(tmp_path, sandbox, pipe=file, XAI_PROXY_PORT=str(port)) as supervised:
        wait_for_models(port)
        supervised.signal(signal.SIGTERM)
        assert supervised.process.wait(30) == 0
    lines = log.read_text().splitlines()
    assert all(line.startswith(("{", "20")) for line in lines)
    for said in ("spawned: 'proxy'", '"path": "/v1/models"', "waiting for", "stopped: proxy", "stopped: refresher"):
        assert any(said in line for line in lines), lines
