"""The lock on tokens.json, also if its file is removed, and the refresher's heartbeat."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from strace import needs_strace, strace
from token_files import NEW, OLD, files, make_store, save

from xaiproxy import errors, token_lock, token_writer


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


# the lock

HOLDER = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(store):
    """Another process that holds the lock until its stdin is closed, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.lock_path],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_lock_held_by_another_process_is_busy_after_the_wait(store, holder):
    pauses = []
    begin = time.monotonic()
    with (
        pytest.raises(
            errors.LockBusy, match=r"tokens.json.lock has been held .* for 0.3 s"
        ) as caught,
        token_writer.locked(
            store, 0.3, lambda seconds: (pauses.append(seconds), time.sleep(seconds))
        ),
    ):
        pytest.fail("two held it")
    assert caught.value.exit_code == 75
    assert 0.3 <= time.monotonic() - begin < 2 and 2 <= len(pauses) <= 4 and max(pauses) <= 0.1


@pytest.mark.parametrize("end", ["killed", "let go"])
def test_a_lock_is_taken_as_soon_as_its_holder_ends(store, holder, end):
    threading.Timer(0.2, holder.kill if end == "killed" else holder.stdin.close).start()
    with token_writer.locked(store, 10):
        assert holder.wait(5) == (-9 if end == "killed" else 0)


def test_an_exception_of_pause_ends_the_wait(store, holder):
    def pause(seconds):
        raise InterruptedError

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InterruptedError), token_writer.locked(store, 10, pause):
        pytest.fail("two held it")
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_releases_the_lock(store):
    with pytest.raises(ZeroDivisionError), token_writer.locked(store, 0):
        with pytest.raises(errors.LockBusy), token_writer.locked(store, 0):
            pytest.fail("two held it")
        raise ZeroDivisionError
    with token_writer.locked(store, 0):
        pass


def test_only_a_beat_is_a_heartbeat_not_the_lock(store):
    with token_writer.locked(store, 0):
        assert store.refresher_age(time.time()) is None
    token_lock.beat(store)
    assert store.refresher_alive(time.time())
    os.utime(store.lock_path, (1000, 1000))
    with token_writer.locked(store, 0) as writer:
        writer.save(NEW)
        writer.remove()
    assert store.lock_path.stat().st_mtime == 1000


def test_a_link_in_the_locks_place_is_an_error_and_not_followed(store, tmp_path):
    store.lock_path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.StorageError, match="tokens.json.lock cannot be written"):
        save(store, NEW)
    assert not (tmp_path / "elsewhere").exists()


# a lock file that is removed


def test_a_removed_lock_file_admits_no_other_process(store):
    save(store, OLD)
    with token_writer.locked(store, 0):
        for change in (store.lock_path.unlink, store.lock_path.touch):
            change()
            with pytest.raises(errors.LockBusy), token_writer.locked(store, 0.2):
                pass
    with token_writer.locked(store, 0.2):
        pass


def test_a_lock_file_replaced_during_the_wait_is_opened_again(store):
    save(store, OLD)
    with contextlib.ExitStack() as stack:
        stack.enter_context(token_writer.locked(store, 0))

        def pause(_):
            store.lock_path.unlink(missing_ok=True)
            stack.close()

        with token_writer.locked(store, 10, pause) as writer:
            assert writer._lock.is_real()
            with pytest.raises(errors.LockBusy), token_writer.locked(store, 0):
                pass


@pytest.mark.parametrize(
    "change", [lambda path: path.unlink(), lambda path: (path.unlink(), path.touch())]
)
def test_a_rehearsal_fails_when_the_lock_file_is_gone(store, change):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        change(store.lock_path)
        with pytest.raises(
            errors.StorageError, match="was removed or replaced while it was locked"
        ):
            writer.rehearse(OLD)
    assert store.load() == OLD and "tokens.json.new" not in files(store)


@needs_strace
def test_a_heartbeat_has_the_time_of_this_machine(store, tmp_path):
    """With the time of a file server that is minutes ahead, the refresher would seem stopped for ever."""
    code = (
        "import os, sys; from xaiproxy import config, token_lock, token_store; token_lock.beat("
        "token_store.TokenStore(config.from_environ(os.environ)))"
    )
    trace = tmp_path / "trace"
    subprocess.run(
        [*strace(trace, "-e", "trace=utimensat"), sys.executable, "-W", "error", "-c", code],
        check=True,
        timeout=20,
        env={"XAI_PROXY_TOKEN_PATH": str(store.path), "PYTHONPATH": os.getcwd()},
        cwd="/",
    )
    beat = [line for line in trace.read_text().splitlines() if "utimensat(" in line][-1]
    times = [int(seconds) for seconds in re.findall(r"tv_sec=(\d+)", beat)]
    assert len(times) == 2 and all(abs(time.time() - seconds) < 60 for seconds in times)
