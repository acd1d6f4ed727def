"""The faults that a refresh survives, as a table: steps of a refresh, and the fault at each.

Each cell is a refresher of its own, stopped at a system call of that step, with a login and an
issuer of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable

import pytest
from checkout import SUPPORT
from proxy_process import ProxyProcess
from refresher_process import (
    Process,
    environment,
    make_store,
    mounted,
    mounts,
    seen_from,
    wait_until,
)
from scripted_server import ScriptedServer, answer, read_request
from strace import attach, needs_strace

from xaiproxy import token_json, token_store, token_writer, tokens
from xaiproxy.login import command as login
from xaiproxy.login import output
from xaiproxy.proxy import app
from xaiproxy.tokens import State

LIFETIME = 21600
# Seconds; a dozen cells share the cores.
TIMEOUT = 12


class Issuer(ScriptedServer):
    """An issuer of one login.

    It rotates the refresh token and ends the login when a former one comes again.

    `faults`: for each of the first requests to the token endpoint, the bytes of the response, or a
    function of the connection and of another function, which spends the token and returns the
    response. `grace`: former refresh tokens are accepted.
    """

    def __init__(self, *faults, grace: bool = False):
        super().__init__(self._reply)
        self.env = {"XAI_PROXY_ISSUER": self.url, "XAI_PROXY_UPSTREAM": self.url}
        # Its refresh tokens; only the last is good.
        self.login = [self.name()]
        self.ended = False
        self.calls: list[float] = []
        self.reuses = 0
        # The lifetime of access tokens in seconds.
        self.lifetime = LIFETIME
        self.faults = list(faults)
        self._grace = grace
        self._mutex = threading.Lock()

    @staticmethod
    def name() -> str:
        return os.urandom(12).hex()

    def _reply(self, connection: socket.socket) -> None:
        head, _, body = read_request(connection).partition(b"\r\n\r\n")
        if not head:
            # The client has closed the connection.
            return
        if head.startswith(b"GET"):
            connection.sendall(
                answer(200, {"issuer": self.url, "token_endpoint": f"{self.url}/token"})
            )
            return
        form = dict(urllib.parse.parse_qsl(body.decode()))
        with self._mutex:
            self.calls.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
        if fault is None:
            connection.sendall(self.spend(form["refresh_token"]))
        elif isinstance(fault, bytes):
            connection.sendall(fault)
        else:
            fault(connection, lambda: self.spend(form["refresh_token"]))

    def spend(self, token: str) -> bytes:
        with self._mutex:
            if token != self.login[-1] and not self._grace:
                self.reuses += 1
                self.ended = True
            if self.ended:
                return answer(400, {"error": "invalid_grant"})
            self.login.append(self.name())
            return answer(
                200,
                {
                    "access_token": self.name(),
                    "expires_in": self.lifetime,
                    "refresh_token": self.login[-1],
                },
            )

    def go_down(self) -> None:
        self.__exit__()

    def come_back(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()


def cut_before(connection, spend) -> None:
    pass


def cut_after(connection, spend) -> None:
    spend()


def gateway_after(connection, spend) -> None:
    spend()
    connection.sendall(answer(502, "<html>Bad gateway", "text/html"))


def drip(connection, spend) -> None:
    """Send each of the last three bytes after a second."""
    whole = spend()
    connection.sendall(whole[:-3])
    for byte in whole[-3:]:
        time.sleep(1)
        connection.sendall(bytes([byte]))


class Held:
    """A fault that spends the token, and sends the response when the test allows it."""

    def __init__(self):
        self.spent, self.released = threading.Event(), threading.Event()

    def __call__(self, connection, spend) -> None:
        whole = spend()
        self.spent.set()
        self.released.wait(TIMEOUT)
        connection.sendall(whole)


# Where a refresher is stopped: the file of the login that a system call is about, its name, and
# which such call. The signal comes when the call is done. At `awaiting` the issuer holds the
# response back instead.
STEPS = {
    # The lock file exists, and is opened next; the start opened it three times.
    "starting": (
        ".lock",
        "openat",
        4,
    ),
    # The first call was that of the start.
    "locked": (".lock", "flock", 2),
    "rehearsing": (".new", "write", 1),
    "rehearsed": (".new", "rename", 1),
    "reserved": (".new", "fsync", 2),
    "connected": (None, "connect", 1),
    "awaiting": None,
    "answered": (".new", "lseek", 3),
    "written": (".new", "ftruncate", 3),
    "renamed": (".new", "rename", 2),
    # The sync of the folder.
    "synced": ("", "fsync", 2),
}

# A number: the login is kept, with so many requests to the token endpoint. "lost": the login could
# not be kept, and the former refresh token was presented once more. "-": it cannot happen there (the
# kernel makes nothing read-only while a file in it is open for writing), or is another fault's
# cell.
TABLE = """
                   starting locked rehearsing rehearsed reserved connected awaiting answered written renamed synced
killed             1        1      1          1         1        1         lost     lost     1       1       1
killed_with_grace  -        -      -          -         -        -         2        2        -       -       -
terminated         1        1      1          1         1        1         1        1        1       1       1
suspended          1        1      1          1         1        1         1        1        1       1       1
replaced           0        0      0          0         0        1         1        1        1       1       1
disk_full          1        1      1          1         1        1         1        1        1       1       1
disk_broken        -        -      1          1         1        -         -        -        1       1       1
read_only          1        -      -          -         -        -         -        -        -       -       -
clock_forward      1        1      1          1         1        1         1        1        1       1       1
clock_back         1        1      1          1         1        1         1        1        1       1       1
"""


class Case:
    """A refresher, stopped at `step`, with a stale login."""

    def __init__(
        self,
        folder: pathlib.Path,
        step: str = "",
        *,
        faults=(),
        grace: bool = False,
        mount: str = "",
        clock: str = "",
    ):
        self.step, self.folder = step, folder
        self.path = folder / "tokens.json"
        self.held = Held()
        self.issuer = Issuer(*[self.held] if step == "awaiting" else faults, grace=grace)
        self.processes: list[Process] = []
        self.log = folder.with_suffix(".strace")
        self._before = mounted(mount, folder) if mount else []
        self._clock = folder.with_suffix(".clock")
        # What tests/support/clock.c adds.
        self._ahead = [0, 0]
        self.environ = {"LD_PRELOAD": clock, "CLOCK": str(self._clock)} if clock else {}

    def __enter__(self) -> Case:
        self.folder.mkdir(0o700)
        self._clock.write_bytes(bytes(16))
        self.issuer.__enter__()
        self.store = make_store(self.issuer, self.path)
        self.put("old", self.issuer.login[0], expires_in=100)
        return self

    def __exit__(self, *error: object) -> None:
        self.held.released.set()
        for process in self.processes:
            process.close()
        self.issuer.__exit__(*error)

    def put(self, access_token: str, refresh_token: str, expires_in: float = LIFETIME) -> None:
        """Write a login without the lock."""
        now = time.time()
        written = self.folder / "written"
        written.write_text(
            token_json.to_json(
                tokens.Login(
                    access_token,
                    now + expires_in,
                    refresh_token,
                    f"{self.issuer.url}/token",
                    now - 1000 * (expires_in < LIFETIME),
                    self.issuer.url,
                ),
                None,
            )
        )
        written.chmod(0o600)
        written.replace(self.path)

    def start(self, trace: Callable[[int], subprocess.Popen] | None = None) -> Process:
        process = Process(self.issuer, self.path, before=self._before, trace=trace, **self.environ)
        self.processes.append(process)
        return process

    def stop_at_step(self) -> Process:
        if self.step == "awaiting":
            process = self.start()
            assert self.held.spent.wait(TIMEOUT), process.lines
            process.signal(signal.SIGSTOP)
            wait_until(lambda: state_of(process) == "T", TIMEOUT)
            return process
        process = self.start(self.traced("signal=STOP"))
        wait_until(
            lambda: self.log.exists() and "stopped by SIGSTOP" in self.log.read_text(),
            TIMEOUT,
            lambda: f"{self.step} was not reached: {process.lines}",
        )
        return process

    def traced(self, injected: str) -> Callable[[int], subprocess.Popen]:
        """strace, which injects this at the step's system call."""
        suffix, call, nth = STEPS[self.step]
        paths = []
        if suffix is not None:
            paths = [pathlib.Path(f"{self.path}{suffix}") if suffix else self.folder]
        inject = f"inject={call}:{injected}:when={nth}"
        return lambda pid: attach(pid, self.log, "-e", f"trace={call}", "-e", inject, paths=paths)

    def go_on(self) -> None:
        self.held.released.set()
        self.processes[-1].signal(signal.SIGCONT)

    def set_clocks(self, time_of_day: int = 0, uptime: int = 0) -> None:
        """Advance both clocks by so many seconds, for all processes that were started here."""
        self._ahead = [self._ahead[0] + time_of_day, self._ahead[1] + uptime]
        # Not truncated: the processes have it mapped.
        with open(self._clock, "r+b") as file:
            file.write(struct.pack("2q", *self._ahead))

    def now(self) -> float:
        return time.time() + self._ahead[0]

    def seen(self) -> tuple[str, tuple[bool, str]]:
        """The output of `xai-login --status`, and the state at /readyz."""
        lines = io.StringIO()
        login.status(self.store, output.Output(False, lines, lines), self.now)
        return lines.getvalue(), app.readiness_of(self.store, self.now())

    def status(self) -> str:
        """The output of `xai-login --status`, as a process."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "xaiproxy.login", "--status"],
            cwd="/",
            text=True,
            env=environment(self.issuer, self.path, **self.environ),
            stdout=subprocess.PIPE,
            timeout=TIMEOUT,
        )
        assert done.returncode in (0, 75), done
        return done.stdout

    def age_heartbeat(self) -> None:
        """Make the refresher's last heartbeat a minute old, which saves the wait."""
        at = self.now() - token_store.ALIVE
        os.utime(self.store.lock_path, (at, at))

    def shows_no_refresher(self) -> None:
        self.age_heartbeat()
        while True:
            expired = self.store.load().state(self.now(), 120) is State.INVALID
            status, (ready, reason) = self.seen()
            if expired == (self.store.load().state(self.now(), 120) is State.INVALID):
                break
        assert (
            f"Refresher   not running: the login {'lapsed' if expired else 'lapses'} at " in status
        ), status
        assert ready is not expired, reason
        assert (
            "has not been renewed yet" if expired else "no refresher; the login lapses at "
        ) in reason, reason

    def messages(self) -> list[str]:
        return [message for process in self.processes for message in process.messages()]

    def logged(self, text: str) -> int:
        return sum(text in message for message in self.messages())

    def outcome(self) -> str:
        """Wait until the login is good again, or has ended; return the table's word for it."""
        # The process has started, and read a login.
        self.processes[-1].wait_for("signed in", TIMEOUT)
        wait_until(
            lambda: (
                self.store.load().access_token != "old"
                or self.logged("xai-login --device` to sign in")
            ),
            TIMEOUT,
            lambda: f"{self.step}: neither kept nor lost: {self.messages()}",
        )
        if self.issuer.ended:
            wait_until(lambda: self.store.load().refresh_error, TIMEOUT)
        else:
            wait_until(lambda: self.store.load().state(self.now(), 120) is State.FRESH, TIMEOUT)
        # Two more poll intervals, in which nothing is to happen.
        time.sleep(0.6)
        # The refresher notices a clock step with its next heartbeat.
        wait_until(lambda: self.issuer.ended or "Refresher   running" in self.seen()[0], TIMEOUT)
        status, (ready, reason) = self.seen()
        if self.issuer.ended:
            assert (
                "the login has ended (invalid_grant); run `" in status and self.issuer.reuses == 1
            )
            assert (
                self.logged("xai-login --device` to sign in") == 1 and "(invalid_grant)" in reason
            )
            return "lost"
        assert (ready, reason) == (True, "signed in"), reason
        assert "failed" not in status
        assert self.issuer.reuses == 0
        assert self.store.load().refresh_token in (self.issuer.login[-1], "theirs")
        left = {path.name for path in self.store.path.parent.iterdir()} - {"filling"}
        assert left == {"tokens.json", "tokens.json.lock", "tokens.json.status"}, left
        return str(len(self.issuer.calls))


def state_of(process: Process) -> str:
    return pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


# the faults


def killed(case: Case) -> None:
    process = case.stop_at_step()
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    case.shows_no_refresher()
    case.held.released.set()
    successor = case.start()
    successor.wait_for("signed in", TIMEOUT)
    assert successor.logged("was left behind by a process that was killed; it is now") == (
        case.step in ("rehearsing", "written")
    )


def killed_with_grace(case: Case) -> None:
    killed(case)


def terminated(case: Case) -> None:
    process = case.stop_at_step()
    process.signal(signal.SIGTERM)
    case.go_on()
    assert process.wait(TIMEOUT) == 0 and process.messages()[-1] == "ended"
    case.shows_no_refresher()
    # At an earlier step it is not sent any more.
    spent = list(STEPS).index(case.step) >= list(STEPS).index("connected")
    left = case.store.load()
    assert (left.access_token != "old") is bool(
        case.issuer.calls
    ) is spent and left.refresh_try is None
    case.start()


def suspended(case: Case) -> None:
    case.put("old", case.issuer.login[0], expires_in=2)
    expires = time.time() + 2
    case.stop_at_step()
    case.shows_no_refresher()
    wait_until(lambda: time.time() > expires)
    case.shows_no_refresher()
    os.utime(case.store.lock_path)
    case.go_on()


def replaced(case: Case) -> None:
    process = case.stop_at_step()
    case.put("theirs", "theirs")
    case.go_on()
    wait_until(
        lambda: process.logged("signed in") == 2, TIMEOUT, lambda: f"{case.step}: {process.lines}"
    )
    assert case.store.load().access_token == "theirs", case.step


def disk_full(case: Case) -> None:
    process = case.stop_at_step()
    case.store = make_store(case.issuer, seen_from(process, case.path))
    filling = pathlib.Path(seen_from(process, case.folder / "filling"))
    with open(filling, "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        # Room for a login, so that the failure can be recorded.
        file.truncate(file.tell() - 16384)
    case.go_on()
    # At these steps there is no room for the successor yet.
    if case.step in (
        "starting",
        "locked",
        "rehearsing",
        "rehearsed",
    ):
        process.wait_for("No space left on device. Make room", TIMEOUT)
        # The failure is recorded first, and then that it could be.
        wait_until(lambda: case.seen()[1][1].endswith("(storage)"), TIMEOUT)
        status, (ready, _reason) = case.seen()
        assert "No space left on device" in status and ready
        assert case.store.load().access_token == "old" and not case.issuer.calls
        filling.unlink()


def disk_broken(case: Case) -> None:
    case.start(case.traced("error=EIO"))
    wait_until(lambda: case.logged("Input/output error") == 1, TIMEOUT)


def read_only(case: Case) -> None:
    process = case.stop_at_step()
    case.store = make_store(case.issuer, seen_from(process, case.path))

    def mount(how: str) -> None:
        subprocess.run(
            [
                "nsenter",
                "-m",
                "-t",
                str(process.pid),
                "mount",
                "-o",
                f"remount,{how},bind",
                case.folder,
            ],
            check=True,
        )

    case.age_heartbeat()
    mount("ro")
    case.go_on()
    process.wait_for("Read-only file system. Mount", TIMEOUT)
    # It can neither record a failure nor write a heartbeat.
    status, (ready, reason) = case.seen()
    assert (
        "Refresher   not running: the login lapses at " in status
        and ready
        and "no refresher; " in reason
    )
    assert case.store.load().access_token == "old" and not case.issuer.calls
    mount("rw")


def clock_forward(case: Case) -> None:
    case.stop_at_step()
    case.set_clocks(time_of_day=3600)
    case.go_on()


def clock_back(case: Case) -> None:
    case.stop_at_step()
    case.set_clocks(time_of_day=-3600)
    # To this clock it is good for another hour, but upstream refuses it.
    case.store.ask_refresh("old")
    case.go_on()


TMPFS = "cp -p $1/tokens.json $1.login; mount -t tmpfs -o size=256k,mode=700 none $1; cp -p $1.login $1/tokens.json"
# The options of the rows that need any.
HOW = {
    killed_with_grace: {"grace": True},
    disk_full: {"mount": TMPFS},
    read_only: {"mount": "mount --bind $1 $1"},
}
CLOCKS = (clock_forward, clock_back)


@pytest.fixture(scope="session")
def clock(tmp_path_factory) -> str:
    """The library to preload for Case.set_clocks."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = str(tmp_path_factory.mktemp("clock") / "clock.so")
    source = SUPPORT / "clock.c"
    subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source],
        check=True,
    )
    return library


def together(outcome, cases) -> dict:
    """The outcome of each, several at the same time: most cases wait most of the time."""

    def outcome_or_error(case) -> str:
        try:
            return outcome(case)
        # Shown beside the other outcomes.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        return dict(zip(cases, pool.map(outcome_or_error, cases)))


def check_table(tmp_path, chosen, **options) -> None:
    """Check the rows of the chosen faults."""
    head, *rows = [line.split() for line in TABLE.strip().splitlines()]
    assert head == list(STEPS)
    expected = {
        (name, step): cell
        for name, *cells in rows
        for step, cell in zip(head, cells)
        if cell != "-" and chosen(globals()[name])
    }

    def outcome(cell: tuple[str, str]) -> str:
        name, step = cell
        fault = globals()[name]
        with Case(tmp_path / f"{name}-{step}", step, **HOW.get(fault, {}), **options) as case:
            fault(case)
            return case.outcome()

    assert together(outcome, expected) == expected


@needs_strace
def test_a_refresh_survives_a_fault_at_any_step(tmp_path):
    check_table(tmp_path, lambda fault: fault not in CLOCKS and "mount" not in HOW.get(fault, {}))


@needs_strace
@mounts
def test_a_refresh_survives_a_full_or_read_only_disk_at_any_step(tmp_path):
    check_table(tmp_path, lambda fault: "mount" in HOW.get(fault, {}))


@needs_strace
def test_a_refresh_survives_a_clock_change_at_any_step(tmp_path, clock):
    check_table(tmp_path, lambda fault: fault in CLOCKS, clock=clock)


# The issuer's first response; whether it accepts former refresh tokens; the least seconds until
# the second request; the code that is shown until then; what becomes of the login.
ANSWERS = {
    "cut before it spends": (cut_before, False, 0.5, "answer_lost", "2"),
    "cut when it has spent": (cut_after, False, 0.5, "answer_lost", "lost"),
    "cut when it has spent, with grace": (cut_after, True, 0.5, "answer_lost", "2"),
    "429": (
        answer(429, {"error": "slow_down"}, Retry_After="2"),
        False,
        2,
        "issuer_unavailable",
        "2",
    ),
    "500": (answer(500, "oops", "text/plain"), False, 0.5, "answer_lost", "2"),
    "a gateway's 502 when it has spent, with grace": (gateway_after, True, 0.5, "answer_lost", "2"),
    "a page": (
        answer(403, "<html>Just a moment...", "text/html"),
        False,
        0.5,
        "issuer_unavailable",
        "2",
    ),
    "nothing": (answer(200), False, 0.5, "answer_lost", "2"),
    "byte by byte": (drip, False, 0, None, "1"),
}


def test_a_refresh_survives_a_response_without_tokens(tmp_path):
    def outcome(name: str) -> str:
        fault, grace, wait, code, _ = ANSWERS[name]
        held = Held()
        with Case(tmp_path / name, faults=[fault, held], grace=grace) as case:
            case.start()
            if code is not None:
                # The second request; its response is held back.
                assert held.spent.wait(TIMEOUT)
                status, readiness = case.seen()
                assert readiness[0] and readiness[1].endswith(f"its renewal fails ({code})")
                assert (
                    case.logged("could not be refreshed") == 1
                    and "The last refresh failed at " in status
                )
                held.released.set()
            shown = case.outcome()
            gaps = [
                later - earlier for earlier, later in zip(case.issuer.calls, case.issuer.calls[1:])
            ]
            assert all(gap >= wait for gap in gaps), gaps
            return shown

    assert together(outcome, ANSWERS) == {name: row[-1] for name, row in ANSWERS.items()}


# others


@needs_strace
def test_refreshers_wait_for_a_stopped_holder_of_the_lock(tmp_path, clock):
    """No refresher refreshes without it; both ends of the wait are in the log, and then one refresh
    follows.
    """
    with Case(tmp_path / "folder", "locked", clock=clock) as case:
        holder = case.stop_at_step()
        others = [case.start(), case.start()]
        for other in others:
            other.wait_for("signed in", TIMEOUT)

        def ten_seconds_later() -> None:
            case.set_clocks(uptime=10)
            # The next try to take the lock.
            time.sleep(0.1)

        wait_until(
            lambda: (ten_seconds_later(), all(other.logged(HELD) for other in others))[1], TIMEOUT
        )
        assert not case.issuer.calls and case.store.load().access_token == "old"
        case.age_heartbeat()
        wait_until(lambda: (ten_seconds_later(), shows_the_lock(case))[1], TIMEOUT)
        assert "Refresher   running" in case.seen()[0]
        for other in others:
            other.signal(signal.SIGSTOP)
            wait_until(lambda: state_of(other) == "T")
        case.shows_no_refresher()
        for other in others:
            other.signal(signal.SIGCONT)
        wait_until(lambda: (ten_seconds_later(), shows_the_lock(case))[1], TIMEOUT)
        assert not case.issuer.calls and case.logged(HELD) == 2
        holder.signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        assert case.outcome() == "1"


def shows_the_lock(case: Case) -> bool:
    ready, reason = case.seen()[1]
    return ready and reason.endswith("but its renewal fails (locked)")


HELD = "tokens.json.lock has been held by another process for 60 s; check for a refresher"
REFUSED = answer(
    403,
    {
        "code": "unauthenticated:bad-credentials",
        "error": "The OAuth2 access token could not be validated.",
    },
)


class Served:
    """A case with a proxy of its own, in front of an upstream that refuses `dead` tokens."""

    def __init__(self, folder: pathlib.Path, *dead: str, **options):
        self.case = Case(folder, **options)
        self.dead = set(dead)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Served:
        upstream = self._stack.enter_context(ScriptedServer(self._reply))
        self._stack.enter_context(self.case)
        self.proxy = self._stack.enter_context(
            ProxyProcess(
                self.case.folder,
                upstream=upstream.url,
                issuer=self.case.issuer.url,
                environ=self.case.environ,
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def _reply(self, connection: socket.socket) -> None:
        token = re.search(rb"(?im)^authorization: bearer (\S+)", read_request(connection))
        if token:
            connection.sendall(
                REFUSED if self.dead & {token[1].decode(), "all"} else answer(200, {})
            )

    def logged(self, text: str) -> int:
        return sum(text in line["message"] for line in self.proxy.log_lines())

    def ready(self) -> tuple[int, str]:
        message = self.proxy.ask("GET", "/readyz")
        return message.status, json.loads(message.body)["reason"]


def gone(case: Case) -> Callable[[], object]:
    process = case.start()
    process.wait_for("refreshed")
    process.signal(signal.SIGKILL)
    process.wait()
    return case.start


def stopped(case: Case) -> Callable[[], object]:
    process = case.start()
    process.wait_for("refreshed")
    process.signal(signal.SIGSTOP)
    wait_until(lambda: state_of(process) == "T")
    return lambda: process.signal(signal.SIGCONT)


def stuck(case: Case) -> Callable[[], object]:
    """A refresher in a sync that takes a minute, or until strace is killed."""
    case.step = "reserved"
    process = case.start(case.traced(f"delay_enter={60 * 10**6}"))
    wait_until(lambda: case.store.new_path.exists() and case.store.new_path.stat().st_size, TIMEOUT)
    return process.tracer.kill


@needs_strace
def test_a_refresher_that_is_gone_stopped_or_stuck_is_reported(tmp_path, clock):
    """A minute after its last heartbeat, which is made a minute old here; and so is its return."""

    def outcome(fault) -> str:
        with Served(tmp_path / fault.__name__, clock=clock) as served:
            case, proxy = served.case, served.proxy
            come_back = fault(case)
            calls = len(case.issuer.calls)
            case.age_heartbeat()
            proxy.wait_for_log(
                lambda line: line["message"].startswith("no refresher; the login lapses at ")
            )
            status, reason = served.ready()
            assert status == 200 and reason.startswith("no refresher; the login lapses at "), reason
            assert "Refresher   not running: the login lapses at " in case.status()
            assert proxy.ask().status == 200 and len(case.issuer.calls) == calls
            come_back()
            # The next heartbeat is due.
            case.set_clocks(uptime=10)
            proxy.wait_for_log(lambda line: line["message"] == "the refresher is back", TIMEOUT)
            wait_until(lambda: served.ready() == (200, "signed in"))
            assert "Refresher   running" in case.status()
            assert served.logged("no refresher") == served.logged("is back") == 1
            return case.outcome()

    faults = gone, stopped, stuck
    assert together(outcome, faults) == dict.fromkeys(faults, "1")


@pytest.mark.parametrize("hour", [3600, -3600], ids=["forward", "back"])
def test_a_clock_that_is_set_by_an_hour_fails_no_request(tmp_path, clock, hour):
    with Served(tmp_path / "folder", clock=clock) as served:
        case, proxy = served.case, served.proxy
        case.put("old", case.issuer.login[0], expires_in=3000)
        case.issuer.faults.append(case.held)
        case.start().wait_for("signed in")
        assert (
            proxy.ask().status == 200
            and served.ready() == (200, "signed in")
            and not case.issuer.calls
        )
        case.set_clocks(time_of_day=hour)
        wait_until(lambda: case.store.refresher_alive(case.now()), 2)
        # To this clock the token is good for longer than to upstream's.
        if hour < 0:
            served.dead.add("old")
        with proxy.client() as client:
            client.request()
            assert case.held.spent.wait(TIMEOUT)
            assert "Refresher   running" in case.status()
            case.held.released.set()
            assert client.message().status == 200
        assert served.ready() == (200, "signed in") and case.outcome() == "1"


def test_a_refresh_continues_when_the_client_that_needed_it_disconnects(tmp_path):
    with Served(tmp_path / "folder", "old") as served:
        case = served.case
        case.put("old", case.issuer.login[0], expires_in=3000)
        case.issuer.faults.append(case.held)
        case.start().wait_for("signed in")
        with served.proxy.client() as client:
            client.request("GET", "/v1/left")
            assert case.held.spent.wait(TIMEOUT)
        assert served.proxy.wait_for_request("/v1/left")["ended_by"] == "client"
        case.held.released.set()
        assert case.outcome() == "1" and served.proxy.ask().status == 200


@needs_strace
def test_a_dead_login_is_presented_once_by_all_refreshers_together(tmp_path):
    with Case(tmp_path / "folder", "locked") as case:
        case.issuer.ended = True
        holder = case.stop_at_step()
        for other in [case.start(), case.start()]:
            # It has seen that a refresh is due, and now waits for the lock.
            other.wait_for("signed in", TIMEOUT)
        time.sleep(0.3)
        holder.signal(signal.SIGCONT)
        holder.wait_for("xai-login --device` to sign in", TIMEOUT)
        # Time in which the others have the lock.
        time.sleep(0.6)
        assert len(case.issuer.calls) == 1 and case.store.load().refresh_error.terminal


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path / "folder") as served:
        yield served


def test_requests_are_served_until_the_token_expires_while_the_issuer_is_down(served):
    """After the expiry they are refused at once, and served again when the issuer is back."""
    case, proxy = served.case, served.proxy
    case.issuer.lifetime = 3
    case.start()
    wait_until(lambda: case.logged("refreshed"), TIMEOUT)
    case.issuer.go_down()
    expires = case.store.load().expires_at
    while time.time() < expires - 0.6:
        assert proxy.ask().status == 200
    assert case.logged("could not be refreshed") == 1 and case.seen()[1][1].endswith(
        "fails (issuer_unavailable)"
    )
    wait_until(lambda: time.time() > expires)
    for _ in range(5):
        began = time.monotonic()
        refused = proxy.ask()
        assert time.monotonic() - began < 1
        assert refused.status == 503 and 1 <= int(refused.value("Retry-After")) <= 10
        assert b"cannot be reached (Connection refused)" in refused.body
    ready = proxy.ask("GET", "/readyz")
    assert ready.status == 503 and b"cannot be renewed (issuer_unavailable)" in ready.body
    case.issuer.come_back()
    # The backoff has come to 4 s.
    wait_until(lambda: proxy.ask().status == 200, 6)
    wait_until(lambda: case.logged("refreshed after"))
    assert (len(case.issuer.calls), case.issuer.reuses) == (2, 0)


def test_an_upstream_that_refuses_every_new_token_costs_one_refresh(served):
    case, proxy = served.case, served.proxy
    served.dead.add("all")
    case.start()
    wait_until(lambda: case.logged("refreshed"), TIMEOUT)

    def ask_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            while time.monotonic() < end:
                assert {
                    message.status for message in pool.map(lambda _: proxy.ask(), range(8))
                } == {403}

    ask_for(1)
    # The proxy asks for no refresh of a token so young.
    assert len(case.issuer.calls) == 1
    old = dataclasses.replace(case.store.load(), obtained_at=time.time() - 1000)
    with token_writer.locked(case.store, 1) as writer:
        writer.save(old)
    wait_until(lambda: (proxy.ask(), len(case.issuer.calls) == 2)[1])
    old = dataclasses.replace(case.store.load(), obtained_at=time.time() - 1000)
    with token_writer.locked(case.store, 1) as writer:
        writer.save(old)
    ask_for(1)
    assert (
        len(case.issuer.calls) == 2
        and case.logged("the API refuses access tokens soon after they are issued") == 1
    )
    status, readiness = case.seen()
    assert readiness == (
        False,
        "the API refuses the access token, which cannot be renewed (upstream_refuses)",
    )
    assert "The next try is due at " in status


# The limits on the tries of one process hold for all, and for those that start after a kill.


def lose_all(case: Case) -> None:
    """Lose every response after the token was spent."""
    case.issuer.faults.extend([cut_after] * 50)


def test_three_refreshers_send_a_token_three_times_when_responses_are_lost(tmp_path):
    with Case(tmp_path / "folder") as case:
        # Stale, and the last try is 124 s before expiry.
        case.put("old", case.issuer.login[0], expires_in=240)
        lose_all(case)
        for _ in range(3):
            case.start()
        wait_until(
            lambda: (
                case.store.load().refresh_try.tries == 3 if case.store.load().refresh_try else False
            ),
            TIMEOUT,
        )
        # Without the limit, another try would come after at most 4 s.
        time.sleep(5)
        assert len(case.issuer.calls) == 3
        assert case.store.load().refresh_error.retry_at == pytest.approx(
            case.store.load().expires_at - 124, abs=1
        )


def test_a_refresher_killed_in_each_request_sends_a_token_three_times(
    tmp_path,
):
    with Case(tmp_path / "folder") as case:
        # Stale, and the last try is 124 s before expiry.
        case.put("old", case.issuer.login[0], expires_in=240)
        helds = [Held() for _ in range(6)]
        case.issuer.faults.extend(helds)
        for tries, held in enumerate(helds[:3], 1):
            process = case.start()
            assert held.spent.wait(TIMEOUT)
            process.signal(signal.SIGKILL)
            process.wait()
            held.released.set()
            assert case.store.load().refresh_try.tries == tries
        case.start().wait_for("signed in")
        time.sleep(5)
        assert len(case.issuer.calls) == 3


def test_a_token_that_may_be_spent_is_sent_again_when_upstream_refuses(tmp_path):
    with Case(tmp_path / "folder", faults=[cut_before] * 3) as case:
        # Stale, and the last try is 124 s before expiry.
        case.put("old", case.issuer.login[0], expires_in=240)
        process = case.start()
        wait_until(lambda: len(case.issuer.calls) == 3, TIMEOUT)
        process.wait_for("the refresh token may be spent: next try at ")
        case.store.ask_refresh("old")
        assert case.outcome() == "4"


def test_a_refused_request_waits_for_the_retry_after_a_lost_response(
    tmp_path,
):
    with Served(tmp_path / "folder", "old", faults=[cut_before] * 3) as served:
        case = served.case
        # Stale, and the last try is 124 s before expiry.
        case.put("old", case.issuer.login[0], expires_in=240)
        case.start().wait_for("the refresh token may be spent: next try at ", TIMEOUT)
        wait_until(lambda: case.store.load().refresh_try.next_at < time.time())
        assert served.proxy.ask().status == 200 and len(case.issuer.calls) == 4


def test_two_refreshers_refresh_once_for_an_upstream_that_refuses_every_token(tmp_path):
    with Case(tmp_path / "folder") as case:
        processes = [case.start(), case.start()]
        for process in processes:
            process.wait_for("signed in", TIMEOUT)
        wait_until(lambda: case.store.load().access_token != "old", TIMEOUT)
        for expected in (2, 2, 2):
            latest = case.store.load().access_token
            case.store.ask_refresh(latest)
            wait_until(lambda: len(case.issuer.calls) == expected, TIMEOUT)
            wait_until(
                lambda: case.store.load().access_token != latest or case.store.load().refresh_error,
                TIMEOUT,
            )
            time.sleep(0.6)
        # A new process, which remembers nothing, does not refresh either.
        processes[0].signal(signal.SIGKILL)
        processes[0].wait()
        case.start().wait_for("signed in")
        time.sleep(0.6)
        assert len(case.issuer.calls) == 2
        assert case.store.load().refresh_error.code == "upstream_refuses"


def test_a_dead_login_is_refreshed_with_another_refresh_token_in_its_file(tmp_path):
    with Case(tmp_path / "folder") as case:
        good = case.issuer.login[0]
        values = json.loads(case.path.read_text())
        case.put("old", "dead", expires_in=100)
        case.issuer.faults.append(answer(400, {"error": "invalid_grant"}))
        process = case.start()
        process.wait_for("xai-login --device` to sign in", TIMEOUT)
        wait_until(lambda: case.store.load().refresh_error, TIMEOUT)
        values = json.loads(case.path.read_text()) | {"refresh_token": good}
        (case.folder / "edited").write_text(json.dumps(values))
        (case.folder / "edited").replace(case.path)
        wait_until(lambda: case.store.load().access_token != "old", TIMEOUT)
        assert case.store.load().refresh_error is None and len(case.issuer.calls) == 2


# Sign-out, stop, and a removed lock file, in the middle of a refresh.


def test_a_folder_removed_in_a_refresh_does_not_keep_the_refresher_from_ending(tmp_path):
    held = Held()
    with Case(tmp_path / "folder", faults=[held]) as case:
        process = case.start()
        assert held.spent.wait(TIMEOUT)
        shutil.rmtree(case.folder)
        held.released.set()
        process.wait_for("tokens.json does not exist", TIMEOUT)
        process.signal(signal.SIGTERM)
        assert process.wait(5) == 0 and not case.path.exists()


def test_a_lock_file_removed_in_a_refresh_admits_no_second_refresher(tmp_path):
    held = Held()
    with Case(tmp_path / "folder", faults=[held]) as case:
        case.start()
        assert held.spent.wait(TIMEOUT)
        case.store.lock_path.unlink()
        second = Process(case.issuer, case.path, "--once")
        case.processes.insert(0, second)
        # The second made it anew, and now waits for the lock of the folder.
        wait_until(case.store.lock_path.exists, TIMEOUT)
        time.sleep(0.5)
        assert len(case.issuer.calls) == 1 and case.store.new_path.exists()
        held.released.set()
        assert second.wait(TIMEOUT) == 0
        # As the first does within 10 s.
        os.utime(case.store.lock_path)
        assert case.outcome() == "1"


def test_sigterm_during_discovery_spends_nothing(tmp_path):
    asked, released = threading.Event(), threading.Event()

    def hold(connection: socket.socket) -> None:
        head = read_request(connection)
        asked.set()
        released.wait(TIMEOUT)
        calls.append(head)
        connection.sendall(
            answer(200, {"issuer": issuer.url, "token_endpoint": f"{issuer.url}/token"})
        )

    calls: list[bytes] = []
    with ScriptedServer(hold) as issuer:
        issuer.env = {"XAI_PROXY_ISSUER": issuer.url, "XAI_PROXY_UPSTREAM": issuer.url}
        store = make_store(issuer, tmp_path / "tokens.json")
        login = tokens.Login(
            "old", time.time() + 100, "refresh", None, time.time() - 1000, issuer.url
        )
        with token_writer.locked(store, 0) as writer:
            writer.save(login)
        process = Process(issuer, store.path)
        try:
            assert asked.wait(TIMEOUT)
            process.signal(signal.SIGTERM)
            released.set()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.close()
        assert [call.split()[0] for call in calls] == [b"GET"] and store.load() == login
