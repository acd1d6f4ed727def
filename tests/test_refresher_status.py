"""The refresher's status file: overwritten in place, so that a full disk cannot hide that the disk
is full.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from refresher_process import mounts

from xaiproxy import config, refresher_status, tokens
from xaiproxy.refresher_status import OK, Status
from xaiproxy.token_store import TokenStore

NOW = 1_800_000_000.0
STATUS = Status(
    NOW, "storage", "the disk is full", NOW + 60, "no room on /data", tokens.fingerprint("access")
)


def make_store(folder: Path) -> TokenStore:
    environ = {"XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}
    return TokenStore(config.from_environ(environ, dotenv_path=os.devnull))


@pytest.fixture
def store(tmp_path) -> TokenStore:
    return make_store(tmp_path)


LOGIN = tokens.Login("access", NOW)


def read(store: TokenStore, now: float = NOW) -> Status | None:
    return refresher_status.read(store, LOGIN, now)


def test_a_written_status_is_read_and_the_file_keeps_its_size(store):
    assert read(store) is None
    for change in (
        {},
        {"at": NOW + 1, "result": "", "next_try": None},
        {"at": NOW + 2, "result": OK},
        {"refreshes": dict.fromkeys(refresher_status.RESULTS, 10**12)},
        {"at": NOW + 1, "published_at": NOW - 1.25, "publish_failures": 10**12},
        {
            "at": NOW + 3,
            "result": "x" * 9999,
            "reason": '\\"' * 999,
            "no_room": "\\" * 9999,
            "publish_failure": "\\" * 9999,
            "refreshes": dict.fromkeys(refresher_status.RESULTS, 10**12),
        },
    ):
        status = dataclasses.replace(STATUS, **change)
        assert refresher_status.write(store, status)
        found = read(store)
        assert (found.at, found.next_try, found.login) == (status.at, status.next_try, status.login)
        for name in ("result", "reason", "no_room", "publish_failure"):
            assert getattr(found, name) == getattr(status, name)[:400]
        file = store.status_path.stat()
        assert (file.st_size, file.st_mode & 0o777) == (4096, 0o600)
    assert found.failure and not Status(NOW).failure and not Status(NOW, OK).failure
    refresher_status.write(
        store,
        dataclasses.replace(
            STATUS, reason="é\U0001f4be\0" * 400, no_room="\0" * 400, result="\x7f" * 400
        ),
    )
    assert read(store).reason == "?" * 400


@pytest.mark.parametrize(
    "seconds, known", [(0, True), (59, True), (60, False), (-59, True), (-60, False)]
)
def test_an_old_status_is_none(store, seconds, known):
    refresher_status.write(store, STATUS)
    assert (read(store, NOW + seconds) is not None) is known


def test_the_status_of_another_login_is_none(store):
    refresher_status.write(store, dataclasses.replace(STATUS, login=tokens.fingerprint("former")))
    assert read(store) is None


def test_a_malformed_status_is_none(store):
    path = store.status_path
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 4096):
        path.write_bytes(content)
        assert read(store) is None
    path.unlink()
    refresher_status.write(store, STATUS)
    values = json.loads(path.read_text())
    for change in (
        {"at": "1"},
        {"at": None},
        {"result": 1},
        {"no_room": []},
        {"publish_failure": None},
        {"published_at": "x"},
        {"next_try": "x"},
        # Times of which no date can be made.
        {"next_try": 1e300},
        {"next_try": float("inf")},
        {"next_try": True},
    ):
        path.write_text(json.dumps(values | change))
        assert read(store) is None
    path.write_text(json.dumps(values))
    assert read(store) == STATUS


@pytest.mark.parametrize(
    "make",
    [
        os.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("precious"),
    ],
    ids=["folder", "fifo", "zero", "link"],
)
def test_a_status_that_cannot_be_written_is_skipped_and_nothing_hangs(store, tmp_path, make):
    (tmp_path / "precious").write_text("precious")
    make(store.path.with_name("tokens.json.status"))
    assert not refresher_status.write(store, STATUS)
    assert read(store) is None
    assert (tmp_path / "precious").read_text() == "precious"


FULL = """
import os, pathlib, sys
from xaiproxy import config, tokens, refresher_status as rs
from xaiproxy.token_store import TokenStore
folder = pathlib.Path(sys.argv[1])
environ = {"XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}
store = TokenStore(config.from_environ(environ, dotenv_path=os.devnull))
assert rs.write(store, rs.Status(1.0))
try:
    with open(folder / "filling", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
except OSError:
    pass
try:
    pathlib.Path(folder / "more").write_text("x")
    sys.exit("there is room")
except OSError:
    pass
login = tokens.Login("access", 9)
status = rs.Status(2.0, "storage", "a reason", 3.0, "no room", tokens.fingerprint("access"))
assert rs.write(store, status) and rs.read(store, login, 2.0) == status
"""


@mounts
def test_a_full_disk_does_not_hide_the_status(tmp_path):
    mount = 'mount -t tmpfs -o size=64k none "$1" && shift && exec "$@"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-ec",
            mount,
            "sh",
            tmp_path,
            sys.executable,
            "-W",
            "error",
            "-c",
            FULL,
            tmp_path,
        ],
        env={"PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr


ERROR = tokens.RefreshError("unreachable", "no route", NOW, retry_at=NOW + 30)


@pytest.mark.parametrize(
    "members, status, planned",
    [
        ({}, STATUS, NOW + 60),
        # A fifth of the lifetime before expiry.
        ({"obtained_at": NOW - 1000}, None, NOW - 200),
        ({"obtained_at": NOW - 1000}, dataclasses.replace(STATUS, next_try=None), NOW - 200),
        ({"refresh_error": ERROR}, None, NOW + 30),
        ({"refresh_error": dataclasses.replace(ERROR, terminal=True)}, STATUS, None),
        ({"refresh_token": None}, STATUS, None),
    ],
)
def test_the_next_refresh_is_the_next_try_or_in_time_before_expiry(members, status, planned):
    login = tokens.Login("access", NOW, **{"refresh_token": "refresh", **members})
    assert refresher_status.next_refresh(login, status, 120) == planned
