"""A lock that is not real: bindfs mounted twice over one folder grants it at each mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from refresher_process import Process, make_store, wait_until

from xaiproxy import errors, kernel, token_lock
from xaiproxy.refresher import lock_proof
from xaiproxy.refresher.lock_proof import PROOF_TIME, proven
from xaiproxy.token_store import ALIVE, TokenStore

OTHER = "0" * 32


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    """Two mounts of one folder."""
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("bindfs is not installed, or may mount nothing here")
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    folders = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
            done = subprocess.run(["bindfs", real, folder], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"bindfs may mount nothing here: {done.stderr}")
            stack.callback(subprocess.run, ["umount", "-l", folder], check=True)
        yield folders


@pytest.fixture
def stores(sandbox, mounts: list[Path]) -> list[TokenStore]:
    stores = [make_store(sandbox, folder / "tokens.json") for folder in mounts]
    token_lock.beat(stores[0])
    return stores


def test_both_mounts_grant_the_lock(stores: list[TokenStore]):
    with token_lock.held(stores[0], 0), token_lock.held(stores[1], 0):
        pass


def test_holders_at_the_same_time_are_found_by_what_the_other_writes(stores: list[TokenStore]):
    def other(seconds: float) -> None:
        assert seconds == PROOF_TIME
        with proven(stores[1], "host", lambda seconds: None):
            pass
        stores[1].lock_path.write_text(f"{int(time.time())} {OTHER} host")

    with (
        pytest.raises(errors.NotClaimed, match=r"another process \(on host\) holds ") as caught,
        proven(stores[0], "host", other),
    ):
        raise AssertionError("it was proven")
    assert "(fuse) does not keep locks between machines or mounts" in str(caught.value)
    assert not caught.value.sent


def test_a_holder_that_comes_later_finds_the_first(stores: list[TokenStore]):
    with (
        proven(stores[0], "first", lambda seconds: None),
        pytest.raises(errors.NotClaimed, match=r"\(on first\)"),
        proven(stores[1], "second", lambda seconds: None),
    ):
        raise AssertionError("it was proven")
    # The first has ended.
    with proven(stores[1], "second", lambda seconds: None):
        pass
    assert stores[0].lock_path.read_bytes() == b""


@pytest.mark.parametrize(
    "instance, age, ignored",
    [("own", 0, True), ("other", 0, False), ("other", ALIVE, True), ("other", -ALIVE, True)],
)
def test_what_a_killed_process_has_left(stores: list[TokenStore], instance, age, ignored):
    stores[0].lock_path.write_text(f"{1_800_000_000 - age} {OTHER} {instance}")
    expected = (
        contextlib.nullcontext() if ignored else pytest.raises(errors.NotClaimed, match="other")
    )
    with expected, proven(stores[0], "own", lambda seconds: None, lambda: 1_800_000_000.0):
        pass


def test_a_local_file_system_needs_no_proof(sandbox, tmp_path: Path):
    store = make_store(sandbox, tmp_path / "tokens.json")
    assert not lock_proof.NETWORK.fullmatch(kernel.file_system(tmp_path))

    def pause(seconds: float) -> None:
        raise AssertionError("it was proven")

    with proven(store, "host", pause):
        assert not store.lock_path.exists()


def test_the_file_system_of_a_missing_folder_is_unknown(tmp_path: Path):
    assert kernel.file_system(tmp_path / "missing") == ""


def test_two_refreshers_whose_locks_are_not_real_spend_a_refresh_token_once(
    sandbox, mounts: list[Path], tmp_path: Path
):
    now = time.time()
    sandbox.set(device_interval=0)
    old = sandbox.write_login(
        mounts[0] / "tokens.json", obtained_at=now - 1000, expires_at=now + 60
    )
    processes = [Process(sandbox, folder / "tokens.json", POD_UID=folder.name) for folder in mounts]
    try:
        # A mount that caches attributes shows the former size of the file for a second.
        store = make_store(sandbox, tmp_path / "real" / "tokens.json")
        wait_until(lambda: store.load().access_token != old["access_token"], 20)
        wait_until(lambda: sum(process.logged("at the same time") for process in processes), 20)
        # Both follow the new login.
        time_of_new = f"{time.gmtime(store.load().expires_at).tm_hour:02}:"
        wait_until(
            lambda: all(process.logged(f" {time_of_new}") for process in processes),
            20,
            lambda: str([process.messages() for process in processes]),
        )
        assert (sandbox.counters()["refreshes"], sandbox.counters()["reuses"]) == (1, 0)
    finally:
        for process in processes:
            process.close()
