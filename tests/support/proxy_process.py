"""The proxy as a separate process, and a raw client for it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from checkout import ONE_CA, PYTHONPATH, SUPPORT
from forked_process import PYTHON, run_python, start_python
from raw_connection import TIMEOUT, Message, RawConnection

from xaiproxy import config

# The issuer of the logins here. Nothing connects to it.
ISSUER = "http://127.0.0.1:1"
ARGUMENTS = ["-m", "xaiproxy"]
COMMAND = [*PYTHON, *ARGUMENTS]
# A response's body is relayed from socket to socket, or iterated: see Handler._can_relay.
WAYS = {"relayed": ARGUMENTS, "iterated": [str(SUPPORT / "plain_proxy.py")]}
both_ways = pytest.mark.parametrize("way", WAYS)


class Client(RawConnection):
    """A connection to the proxy."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        super().__init__(socket.create_connection((host, port), timeout=TIMEOUT))

    def request(
        self,
        method: str = "GET",
        target: str = "/v1/models",
        *fields: str,
        body: bytes = b"",
        version: str = "HTTP/1.1",
    ) -> Client:
        """Send a whole request.

        `fields`: whole lines, in addition to Host and the Content-Length of `body`.
        """
        lines = [f"{method} {target} {version}", "Host: localhost", *fields]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self

    def ask(self, *arguments: str, **keywords: Any) -> Message:
        """Send a request and return the whole response."""
        method = arguments[0] if arguments else "GET"
        return self.request(*arguments, **keywords).message(body=method != "HEAD")


class UnixClient(Client):
    """A connection to the proxy over a Unix socket."""

    def __init__(self, path: pathlib.Path | str):
        RawConnection.__init__(self, socket.socket(socket.AF_UNIX))
        self.sock.settimeout(TIMEOUT)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise


class ProxyProcess:
    """A running `python -m xaiproxy` on a free port, another one of WAYS, or `command`.

    `path`: that of the Unix socket that it listens on, or None; `port` is 0 then.
    Settings are keywords: `idle_timeout=0.5` is XAI_PROXY_IDLE_TIMEOUT. `environ`: other variables.
    `arguments`: of the command line. `stdin`: the descriptor of its standard input.
    The token file is `folder`/tokens.json, which sign_in() writes. close() asserts a clean exit.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        way: str = "relayed",
        prefix: tuple[str, ...] = (),
        command: list[str] | None = None,
        arguments: tuple[str, ...] = (),
        stdin: int = 0,
        read_log: bool = True,
        environ: dict[str, str] | None = None,
        **settings: Any,
    ):
        self.token_path = folder / "tokens.json"
        self._lines: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        environ = environment(folder, environ, **settings)
        if command is not None:
            self.process = subprocess.Popen(
                command, cwd=folder, stderr=subprocess.PIPE, env=environ
            )
        else:
            self.process = start_python(
                "xaiproxy",
                [*WAYS[way], *arguments],
                prefix=prefix,
                cwd=folder,
                environ=environ,
                stdin=stdin,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reading = threading.Event()
        self._reading.set()
        self._stop_after_start = not read_log
        self._reader.start()
        line = self.wait_for_log(lambda line: line["message"].startswith("listening on "), 20)
        self.url = re.search(r"http://\S+(?=/v1)|unix:[^;]+", line["message"])[0]
        self.path = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        self.port = 0 if self.path else int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        with self.process.stderr:
            for line in self.process.stderr:
                with self._changed:
                    self._lines.append(_parsed(line))
                    self._changed.notify_all()
                if self._stop_after_start and b"listening on" in line:
                    self._reading.clear()
                self._reading.wait()
        with self._changed:
            self._changed.notify_all()

    def read_log(self) -> None:
        """Continue to read the log, which `read_log=False` paused after the start."""
        self._stop_after_start = False
        self._reading.set()

    def __enter__(self) -> ProxyProcess:
        return self

    def __exit__(self, error: object, *_rest: object) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    # Log

    def log_lines(self) -> list[dict[str, Any]]:
        with self._changed:
            return list(self._lines)

    def wait_for_log(
        self, predicate: Callable[[dict[str, Any]], Any], seconds: float = TIMEOUT, start: int = 0
    ) -> dict[str, Any]:
        """Return the first line from number `start` on for which `predicate` holds."""
        deadline = time.monotonic() + seconds
        seen = start
        with self._changed:
            while True:
                # The last lines may be read after the process has ended.
                reading = self._reader.is_alive()
                for line in self._lines[seen:]:
                    if predicate(line):
                        return line
                seen = len(self._lines)
                left = deadline - time.monotonic()
                assert left > 0 and reading, (
                    f"no such line, exit status {self.process.poll()}: {self._lines[-10:]}"
                )
                self._changed.wait(min(left, 0.2))

    def wait_for_request(self, path: str, seconds: float = TIMEOUT) -> dict[str, Any]:
        """Return the line of the last request for `path`, which no other test should use."""
        return self.wait_for_log(lambda line: line.get("path") == path, seconds)

    # Login

    def sign_in(
        self,
        token: str = "the-token",
        *,
        expires_in: float = 3600,
        age: float = 1000,
        **members: Any,
    ) -> None:
        """Write a login, as the refresher does. `members`: added to it, or replaced in it."""
        now = time.time()
        login = {
            "access_token": token,
            "refresh_token": "the-refresh-token",
            "expires_at": now + expires_in,
            "obtained_at": now - age,
            "issuer": ISSUER,
            "client_id": config.DEFAULT_CLIENT_ID,
            **members,
        }
        new = self.token_path.with_suffix(".written")
        new.write_text(json.dumps(login))
        new.chmod(0o600)
        new.replace(self.token_path)

    def refresher_lives(self, lives: bool = True) -> None:
        """Write the heartbeat of a running refresher, or of one that died two minutes ago."""
        lock = self.token_path.with_name("tokens.json.lock")
        lock.touch(0o600)
        at = time.time() - (0 if lives else 120)
        os.utime(lock, (at, at))

    # Process

    def client(self) -> Client:
        return UnixClient(self.path) if self.path else Client(self.port)

    def ask(self, *arguments: str, **keywords: Any) -> Message:
        """Send a request on a connection of its own and return the whole response."""
        with self.client() as client:
            return client.ask(*arguments, **keywords)

    def cpu_seconds(self) -> float:
        fields = (
            pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_kib(self) -> int:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Wait for its end, read the whole log, and return the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(TIMEOUT)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def close(self) -> None:
        """End it with SIGTERM, and abort open responses with a second one.

        Asserts that nothing unexpected was logged.
        """
        if self.process.poll() is None:
            self.terminate()
            self.wait_for_log(lambda line: line["message"].startswith(("stopping", "stopped")))
            self.terminate()
        code = self.wait()
        faults = [
            line
            for line in self.log_lines()
            if {"traceback", "unexpected"} & line.keys() or "Traceback" in line["message"]
        ]
        assert not faults and code == 0, (code, faults)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        # It is a traceback or a warning.
        return {
            "message": line.decode("utf-8", "replace"),
            "unexpected": True,
        }


def environment(
    folder: pathlib.Path, environ: dict[str, str] | None = None, **settings: Any
) -> dict[str, str]:
    """Return an environment without the variables of the user who runs the tests."""
    settings = {
        "port": 0,
        "token_path": folder / "tokens.json",
        "issuer": ISSUER,
        "upstream": ISSUER,
        **settings,
    }
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": PYTHONPATH,
        "SSL_CERT_FILE": str(ONE_CA),
        **(environ or {}),
        **{f"XAI_PROXY_{name.upper()}": str(value) for name, value in settings.items()},
    }


def refuse_to_start(
    folder: pathlib.Path, environ: dict[str, str] | None = None, **settings: Any
) -> tuple[int, str]:
    """Run a proxy that cannot start. Return its exit code and stderr."""
    environ = environment(folder, environ, **settings)
    done = run_python("xaiproxy", ARGUMENTS, cwd=folder, environ=environ, timeout=20)
    assert done.stdout == ""
    return done.returncode, done.stderr
