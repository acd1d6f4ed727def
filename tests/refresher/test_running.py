"""The refresher as a process: two at once, signals, a kill at every system call of its save, full
and read-only disks.
"""

import concurrent.futures
import fcntl
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from refresher_process import (
    Process,
    environment,
    make_store,
    mounted,
    mounts,
    seen_from,
    wait_until,
)
from strace import attach, needs_strace

from xaiproxy import errors, token_writer
from xaiproxy.refresher import process as refresher
from xaiproxy.tokens import State

TOKEN_ENDPOINT = "/oauth2/token"


@pytest.fixture
def start(sandbox):
    """start(path, ...) starts a refresher that ends with the test."""
    sandbox.set(device_interval=0)
    started: list[Process] = []

    def start(path, *options, **keywords) -> Process:
        started.append(Process(sandbox, path, *options, **keywords))
        return started[-1]

    yield start
    for process in started:
        process.close()


def put_stale(sandbox, path, **members) -> dict:
    now = time.time()
    return sandbox.write_login(path, obtained_at=now - 1000, expires_at=now + 100, **members)


def works(sandbox, login) -> bool:
    return sandbox.request("GET", "/v1/models", token=login.access_token)[0] == 200


def tries(sandbox) -> int:
    return sum(seen.get("grant_type") == "refresh_token" for seen in sandbox.requests())


# life cycle


def test_a_line_that_waits_for_room_is_written_without_another(sandbox, tmp_path):
    read_end, write_end = os.pipe()
    # 1031 is F_SETPIPE_SZ.
    size = fcntl.fcntl(write_end, 1031, os.sysconf("SC_PAGE_SIZE"))
    os.write(write_end, b"x" * size)
    store = make_store(sandbox, tmp_path / "tokens.json")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "xaiproxy.refresher"],
        cwd="/",
        stderr=write_end,
        env=environment(sandbox, store.path),
    )
    try:
        os.close(write_end)
        # It has started, and written its first lines.
        wait_until(lambda: store.refresher_alive(time.time()))
        data = os.read(read_end, size)
        while b"not signed in" not in data:
            assert select.select([read_end], [], [], 10)[0], data
            data += os.read(read_end, size)
        assert data.startswith(b"x" * size) and b'"started; ' in data
    finally:
        process.kill()
        process.wait()
        os.close(read_end)


def test_a_refresher_makes_its_folder_writes_heartbeats_waits_and_ends(sandbox, start, tmp_path):
    path = tmp_path / "made" / "tokens.json"
    process = start(path)
    process.wait_for("not signed in")
    store = make_store(sandbox, path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and store.refresher_alive(time.time())
    old = put_stale(sandbox, path)
    process.wait_for("refreshed; the access token lasts until")
    assert works(sandbox, store.load()) and store.load().access_token != old["access_token"]
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert [message.split()[0] for message in process.messages()] == [
        "started;",
        "not",
        "signed",
        "refreshed;",
        "ended",
    ]


@pytest.mark.parametrize(
    "options, environ, status, sentence",
    [
        (
            ["--nonsense"],
            {},
            64,
            "xai-refresher: unrecognized arguments: --nonsense; see xai-refresher --help",
        ),
        (
            [],
            {"XAI_PROXY_ISSUER": "ftp://x"},
            78,
            "xai-refresher: XAI_PROXY_ISSUER must be an https URL",
        ),
        (
            ["--once"],
            {},
            77,
            "xai-refresher: not signed in: /proc/none/tokens.json does not exist; run `",
        ),
        (["--once", "--token-path", "/dev/null"], {}, 77, "xai-refresher: /dev/null is not a file"),
    ],
    ids=["usage", "configuration", "signed out", "token path"],
)
def test_a_refresher_that_cannot_start_prints_one_sentence(
    sandbox, start, options, environ, status, sentence
):
    process = start("/proc/none/tokens.json", *options, XAI_PROXY_LOG_LEVEL="error", **environ)
    assert process.wait() == status
    [line] = process.lines
    assert line.startswith(sentence)


# two at once


def test_two_refreshers_of_one_login_never_spend_a_token_twice(sandbox, start, tmp_path):
    sandbox.set(access_token_lifetime=3)
    path = tmp_path / "tokens.json"
    store = make_store(sandbox, path)
    put_stale(sandbox, path)
    with token_writer.locked(store, 0):
        both = [start(path), start(path)]
        for process in both:
            # It has seen that a refresh is due, and now waits for the lock.
            process.wait_for("signed in")
        time.sleep(0.3)
    sandbox.wait(lambda seen: seen["refreshes"] == 1)
    # Each is a race, 1.5 s after the last.
    sandbox.wait(lambda seen: seen["refreshes"] == 3, 15)
    for process in both:
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert not process.logged("could not be refreshed")
    assert (sandbox.counters()["reuses"], tries(sandbox)) == (0, 3)
    assert works(sandbox, store.load())


def test_a_sign_in_during_a_refresh_waits_for_it_and_then_replaces_it(sandbox, start, tmp_path):
    path = tmp_path / "tokens.json"
    store = make_store(sandbox, path)
    put_stale(sandbox, path)
    process = start(path)
    process.wait_for("refreshed")
    sandbox.set(
        device_interval=0.05,
        auto_approve=0,
        answers=[{"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "delay": 1.5}],
    )
    store.ask_refresh(store.load().access_token)
    # The response is on its way.
    sandbox.wait(lambda seen: seen["refreshes"] == 2)
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "xaiproxy.login", "--device"],
        check=True,
        cwd="/",
        env=environment(sandbox, path),
        capture_output=True,
        timeout=20,
    )
    wait_until(lambda: process.logged("signed in") == 2)
    assert (
        process.logged("refreshed") == 2
        and not process.logged("could not")
        and works(sandbox, store.load())
    )
    assert (
        sandbox.refresh(store.load().refresh_token)[0] == 200 and sandbox.counters()["reuses"] == 0
    )


# signals


def test_signals_during_a_request_do_not_lose_its_response(sandbox, start, tmp_path):
    path = tmp_path / "tokens.json"
    old = put_stale(sandbox, path)
    sandbox.set(answers=[{"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "delay": 1}])
    process = start(path)
    sandbox.wait(lambda seen: seen["refreshes"] == 1)
    process.signal(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert process.wait() == 0
    login = make_store(sandbox, path).load()
    assert login.access_token != old["access_token"] and works(sandbox, login)
    assert sandbox.refresh(login.refresh_token)[0] == 200
    assert process.messages()[-1] == "ended"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_refresher_within_a_moment(sandbox, start, tmp_path, number):
    """Its readers see at once that it is gone, and about when it ended."""
    path = tmp_path / "tokens.json"
    process = start(path)
    process.wait_for("not signed in")
    store = make_store(sandbox, path)
    assert store.refresher_alive(time.time())
    begin = time.monotonic()
    process.signal(number)
    assert process.wait() == 0 and time.monotonic() - begin < 3
    assert not store.refresher_alive(time.time()) and store.refresher_age(time.time()) < 90


def test_a_stopped_refresher_refreshes_when_it_continues(sandbox, start, tmp_path):
    sandbox.set(access_token_lifetime=2)
    path = tmp_path / "tokens.json"
    store = make_store(sandbox, path)
    put_stale(sandbox, path)
    process = start(path)
    process.wait_for("refreshed")
    process.signal(signal.SIGSTOP)
    sandbox.set(access_token_lifetime=3600)
    wait_until(lambda: store.load().state(time.time(), 120) is State.INVALID)
    process.signal(signal.SIGCONT)
    sandbox.wait(lambda seen: seen["refreshes"] == 2)
    wait_until(lambda: process.logged("refreshed") == 2)
    assert sandbox.counters()["reuses"] == 0 and not process.logged("could not")


# a kill at every system call of its save

SAVING = "openat,write,fsync,ftruncate,rename,unlink"


def traced(path, log, *inject) -> Callable[[int], subprocess.Popen]:
    """strace, for the system calls that touch the token files."""
    suffixes = "", ".new", ".lock", ".refused"
    paths = [*(path.with_name(path.name + suffix) for suffix in suffixes), path.parent]
    return lambda pid: attach(pid, log, "-e", f"trace={SAVING}", *inject, paths=paths)


@needs_strace
def test_a_kill_at_any_system_call_of_a_save_loses_only_the_one_in_memory(sandbox, tmp_path):
    sandbox.set(device_interval=0)

    def run(name: str, *inject: str):
        """Run `--once` on a stale login of its own; its exit code, the log, and whether a second
        refresher brought a login that lasts.
        """
        path = tmp_path / name / "tokens.json"
        put_stale(sandbox, path)
        store = make_store(sandbox, path)
        store.ask_refresh(store.load().access_token)
        log = tmp_path / f"{name}.strace"
        killed = Process(sandbox, path, "--once", trace=traced(path, log, *inject))
        ended = killed.wait(30)
        sent = store.load().refresh_try
        time.sleep(max(0.0, sent.next_at - time.time()) if sent else 0)
        try:
            refresher.Refresher(store.settings).once()
        except errors.GrantRefused:
            return ended, log, False
        login = store.load()
        assert works(sandbox, login) and sandbox.refresh(login.refresh_token)[0] == 200
        assert not store.new_path.exists()
        return ended, log, True

    ended, log, kept = run("whole")
    assert (ended, kept) == (0, True)
    calls = re.findall(rf"^\d+ +({SAVING.replace(',', '|')})\(", log.read_text(), re.MULTILINE)
    calls = [(name, calls[: index + 1].count(name)) for index, name in enumerate(calls)]
    assert len(calls) > 30 and {name for name, _ in calls} == set(SAVING.split(","))

    def kill(call) -> bool:
        name, n = call
        ended, _, kept = run(f"{name}{n}", "-e", f"inject={name}:signal=KILL:when={n}")
        assert ended == -signal.SIGKILL, call
        return kept

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        lost = [call for call, kept in zip(calls, pool.map(kill, calls)) if not kept]
    # The first two writes are the rehearsal's. At the third the issuer has responded, and the only
    # copy of the new login is in the memory of the process that is killed: that login alone cannot
    # be kept.
    assert lost == [("write", 3)]
    assert sandbox.counters()["reuses"] == 1


@needs_strace
def test_a_refreshed_login_that_cannot_be_saved_is_kept_in_memory_until_then(
    sandbox, start, tmp_path
):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    # The first rename is the rehearsal's.
    inject = ["-e", "inject=rename:error=ENOSPC:when=2..3"]
    process = start(path, trace=traced(path, tmp_path / "strace", *inject))
    process.wait_for("the refreshed login is in this process's memory only: do not end it")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert (
        process.logged("memory only") == 1
        and process.logged("refreshed; the access token lasts") == 1
    )
    assert "No space left on device" in "".join(process.lines)
    login = make_store(sandbox, path).load()
    assert (tries(sandbox), sandbox.counters()["reuses"]) == (1, 0)
    assert works(sandbox, login) and sandbox.refresh(login.refresh_token)[0] == 200


# full and read-only disks


def full(folder, login, room: int = 0) -> list[str]:
    """A prefix with a disk of its own, with the login and `room` bytes free."""
    return mounted(
        f"mount -t tmpfs -o size=128k,mode=700 none $1; cp -p {login} $1/tokens.json; "
        f"head -c 1000000 /dev/zero > $1/filling 2>/dev/null || truncate -s -{room} $1/filling",
        folder,
    )


@mounts
@pytest.mark.parametrize(
    "room, recorded", [(0, False), (32768, True)], ids=["no byte is free", "room for a login only"]
)
def test_a_full_disk_keeps_the_old_login_and_spends_no_token(
    sandbox, start, tmp_path, room, recorded
):
    folder, login = tmp_path / "folder", tmp_path / "login"
    folder.mkdir()
    old = put_stale(sandbox, login)
    process = start(folder / "tokens.json", before=full(folder, login, room))
    process.wait_for("could not be refreshed")
    [failure] = [message for message in process.messages() if "could not be refreshed" in message]
    assert "No space left on device. Make room" in failure
    # Time for another try.
    time.sleep(1.2)
    store = make_store(sandbox, seen_from(process, folder / "tokens.json"))
    login = store.load()
    assert (login.access_token, login.refresh_token) == (old["access_token"], old["refresh_token"])
    assert works(sandbox, login) and tries(sandbox) == 0
    assert (login.refresh_error is not None and login.refresh_error.code == "storage") is recorded
    assert not store.new_path.exists() and process.logged("No space left") == 1
    os.unlink(seen_from(process, folder / "filling"))
    process.wait_for("refreshed after")
    assert (
        works(sandbox, store.load()) and tries(sandbox) == 1 and store.load().refresh_error is None
    )


@mounts
def test_a_failure_that_cannot_be_recorded_is_logged_as_itself(sandbox, start, tmp_path):
    folder, login = tmp_path / "folder", tmp_path / "login"
    folder.mkdir()
    put_stale(sandbox, login, token_endpoint=None)
    sandbox.set(answers=[{"path": "/.well-known/*", "error": "bad_gateway"}])
    process = start(folder / "tokens.json", before=full(folder, login))
    process.wait_for("could not be refreshed")
    sandbox.wait(lambda seen: len(sandbox.requests("/.well-known")) == 3)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert process.logged("could not be refreshed") == process.logged(
        "HTTP 502"
    ) == 1 and not process.logged("No space")


UNWRITABLE = {
    "read-only": ("mount --bind $1 $1; mount -o remount,ro,bind $1", "Read-only file system", 2),
    "a mounted file": (
        "touch $1/../file; cp -p $1/tokens.json $1/../file; mount --bind $1/../file $1/tokens.json",
        "Device or resource busy",
        1,
    ),
}


@mounts
@pytest.mark.parametrize("script, reason, sentences", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_folder_that_cannot_be_written_is_logged_and_no_token_is_spent(
    sandbox, start, tmp_path, script, reason, sentences
):
    folder = tmp_path / "folder"
    old = put_stale(sandbox, folder / "tokens.json")
    process = start(folder / "tokens.json", before=mounted(script, folder))
    process.wait_for("could not be refreshed")
    time.sleep(1.2)  # another try
    assert process.logged(reason) == sentences  # one about the folder, one about the refresh
    assert tries(sandbox) == 0
    login = make_store(sandbox, seen_from(process, folder / "tokens.json")).load()
    assert login.access_token == old["access_token"] and works(sandbox, login)
    # Each try makes the file for a moment.
    wait_until(lambda: not os.path.exists(seen_from(process, folder / "tokens.json.new")))
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


@mounts
def test_a_read_only_secret_is_logged_in_one_sentence(sandbox, start, tmp_path):
    folder = tmp_path / "folder"
    put_stale(sandbox, folder / "tokens.json", refresh_token=None)
    process = start(
        folder / "tokens.json",
        before=mounted("mount --bind $1 $1; mount -o remount,ro,bind $1", folder),
    )
    process.wait_for("holds no refresh token")
    time.sleep(0.6)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert [message.split()[0] for message in process.messages()] == [
        "started;",
        str(folder / "tokens.json"),
        "ended",
    ]
