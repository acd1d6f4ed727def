"""The refresher's status file: overwritten in place, so that a full disk cannot hide that the disk is full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refresher_process import mounts

from xaiproxy import config, refresher_status
from xaiproxy.refresher_status import OK, Status
from xaiproxy.token_store import TokenStore

ROOT = Path(__file__).parents[1]
NOW = 1_800_000_000.0
STATUS = Status(NOW, "storage", "the disk is full", NOW + 60, "no room on /data")


def make_store(folder: Path) -> TokenStore:
    environ = {"XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}
    return TokenStore(config.from_environ(environ, dotenv_path=os.devnull))


@pytest.fixture
def store(tmp_path) -> TokenStore:
    return make_store(tmp_path)


@pytest.fixture(params=["run folder", "beside"])
def run_folder(request, tmp_path) -> Path:
    folder = tmp_path / "run"
    if request.param == "run folder":
        folder.mkdir()
    return folder


def place(store: TokenStore, run_folder: Path) -> Path:
    return run_folder / "status.json" if run_folder.exists() else store.path.with_name("tokens.json.status")


def test_what_was_written_is_read_and_the_file_keeps_its_size(store, run_folder):
    assert refresher_status.read(store, NOW, run_folder) is None
    for status in (STATUS, Status(NOW + 1), Status(NOW + 2, OK, next_try=NOW + 99),
                   Status(NOW + 3, "x" * 9999, "é\U0001f4be\"" * 9999, None, "\\" * 9999)):
        assert refresher_status.write(store, status, run_folder)
        read = refresher_status.read(store, NOW, run_folder)
        assert (read.at, read.next_try) == (status.at, status.next_try)
        for name in ("result", "reason", "no_room"):
            assert getattr(read, name) == getattr(status, name)[:400]
        found = place(store, run_folder).stat()
        assert (found.st_size, found.st_mode & 0o777) == (4096, 0o600)
    assert read.failure and not Status(NOW).failure and not Status(NOW, OK).failure
    refresher_status.remove(store, run_folder)
    assert not place(store, run_folder).exists()


@pytest.mark.parametrize("seconds, known", [(0, True), (59, True), (60, False), (-59, True), (-60, False)])
def test_an_old_status_is_none(store, run_folder, seconds, known):
    refresher_status.write(store, STATUS, run_folder)
    assert (refresher_status.read(store, NOW + seconds, run_folder) is not None) is known


def test_the_status_of_another_login_is_none_of_ours(store, tmp_path):
    run_folder, other = tmp_path / "run", tmp_path / "other"
    run_folder.mkdir()
    other.mkdir()
    refresher_status.write(make_store(other), STATUS, run_folder)
    assert refresher_status.read(store, NOW, run_folder) is None
    refresher_status.remove(store, run_folder)
    assert refresher_status.read(make_store(other), NOW, run_folder) == STATUS


def test_the_younger_of_two_counts(store, tmp_path):
    """As when the run folder appeared while the refresher ran."""
    refresher_status.write(store, STATUS, tmp_path / "none")
    (tmp_path / "run").mkdir()
    refresher_status.write(store, Status(NOW + 1, OK), tmp_path / "run")
    assert refresher_status.read(store, NOW, tmp_path / "run").result == OK


def test_what_is_no_status_is_none(store, tmp_path):
    path = store.path.with_name("tokens.json.status")

    def read() -> "Status | None":
        return refresher_status.read(store, NOW, tmp_path / "run")
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 4096):
        path.write_bytes(content)
        assert read() is None
    path.unlink()
    refresher_status.write(store, STATUS, tmp_path / "run")
    values = json.loads(path.read_text())
    for change in ({"at": "1"}, {"at": None}, {"result": 1}, {"no_room": []}, {"next_try": "x"}, {"more": 1}):
        path.write_text(json.dumps(values | change))
        assert read() is None
    path.write_text(json.dumps(values))
    assert read() == STATUS


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.symlink_to("precious")], ids=["folder", "fifo", "zero", "link"])
def test_without_a_place_for_it_nothing_is_written_and_nothing_hangs(store, tmp_path, make):
    (tmp_path / "precious").write_text("precious")
    make(store.path.with_name("tokens.json.status"))
    assert not refresher_status.write(store, STATUS, tmp_path / "run")
    assert refresher_status.read(store, NOW, tmp_path / "run") is None
    assert (tmp_path / "precious").read_text() == "precious"


FULL = """
import os, pathlib, sys
from xaiproxy import config, refresher_status as rs
from xaiproxy.token_store import TokenStore
folder = pathlib.Path(sys.argv[1])
environ = {"XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}
store = TokenStore(config.from_environ(environ, dotenv_path=os.devnull))
none = folder / "none"
assert rs.write(store, rs.Status(1.0), none)
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
status = rs.Status(2.0, "storage", "a reason", 3.0, "no room")
assert rs.write(store, status, none) and rs.read(store, 2.0, none) == status
"""


@mounts
def test_a_full_disk_does_not_keep_it_from_being_told(tmp_path):
    mount = 'mount -t tmpfs -o size=64k none "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", mount, "sh", tmp_path, sys.executable, "-W", "error", "-c", FULL, tmp_path],
        env={"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
