"""tokens.json.notify: its content, its lock, and what happens if it cannot be used."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT, SUPPORT
from refresher_process import mounts
from token_files import make_store

from xaiproxy import token_writer
from xaiproxy.refresher import call_record
from xaiproxy.refresher.calls import Record

RECORD = Record("renewal_failing " + "f" * 64, 1_800_000_000.123456, "sign_in_needed " + "0" * 64)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def test_a_record_is_read_as_written_and_the_file_keeps_its_size(store):
    with call_record.locked(store) as file:
        assert file.read() == Record()
        for record in (RECORD, Record(), RECORD):
            assert file.write(record) and file.read() == record
            status = store.notify_path.stat()
            assert (status.st_size, status.st_mode & 0o777) == (call_record.SIZE, 0o600)
    with call_record.locked(store) as file:
        assert file.read() == RECORD


def test_one_process_at_a_time_has_it_and_the_lock_of_tokens_json_stays_free(store):
    with call_record.locked(store):
        with pytest.raises(call_record.Busy), call_record.locked(store):
            pass
        with token_writer.locked(store, 0):
            pass
    with call_record.locked(store):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 512,
        b'{"more": 1}',
        b'{"trouble": 1}',
        b'{"since": "1"}',
        b'{"since": 1e99}',
        b'{"called": null}',
    ],
)
def test_a_malformed_record_counts_as_none(store, content):
    store.notify_path.write_bytes(content)
    with call_record.locked(store) as file:
        assert file.read() == Record()
        assert file.write(RECORD) and file.read() == RECORD


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
def test_a_record_that_cannot_be_used_hangs_nothing(store, tmp_path, make):
    (tmp_path / "precious").write_text("precious")
    make(store.notify_path)
    with call_record.locked(store) as file:
        assert file.read() is None and not file.write(RECORD)
    assert (tmp_path / "precious").read_text() == "precious"


FULL = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from token_files import make_store
from xaiproxy.refresher import call_record
from xaiproxy.refresher.calls import Record
folder = pathlib.Path(sys.argv[1])
store = make_store(folder)
with call_record.locked(store) as file:
    assert file.write(Record())
try:
    with open(folder / "filling", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
except OSError:
    pass
with call_record.locked(store) as file:
    assert file.write(Record("trouble", 1.0, "called"))
    assert file.read() == Record("trouble", 1.0, "called")
"""


@mounts
def test_a_full_disk_does_not_prevent_it(tmp_path):
    mount = 'mount -t tmpfs -o size=64k none "$1"; shift; exec "$@"'
    python = [sys.executable, "-W", "error", "-c", FULL]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", mount, "sh", tmp_path, *python, tmp_path, SUPPORT],
        env={"PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr


def test_a_sign_out_removes_it(store):
    with call_record.locked(store) as file:
        file.write(RECORD)
    with token_writer.locked(store, 0) as writer:
        writer.remove()
    assert not store.notify_path.exists()
