"""The file of last uses: merged, atomic, and never in the way."""

import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from xaiproxy import client_keys, key_uses

A, B, C = map(client_keys.digest, "abc")


@pytest.fixture
def keys_file(tmp_path) -> Path:
    return tmp_path / "client-keys"


def put(keys_file: Path, content: bytes) -> None:
    key_uses.path_of(keys_file).write_bytes(content)


def test_the_file_lies_beside_the_key_file_and_is_private(keys_file):
    assert key_uses.load(keys_file) == {}
    key_uses.save(keys_file, {A: 1000.25}, [A, B])
    path = keys_file.with_name("client-keys.used")
    assert json.loads(path.read_text()) == {A: 1000.25} == key_uses.load(keys_file)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(keys_file.parent) == ["client-keys.used"]


def test_the_later_of_two_times_counts(keys_file):
    key_uses.save(keys_file, {A: 1000, B: 2000}, [A, B, C])
    key_uses.save(keys_file, {A: 3000, B: 1000, C: 500}, [A, B, C])
    assert key_uses.load(keys_file) == {A: 3000, B: 2000, C: 500}


def test_a_key_that_was_removed_is_dropped(keys_file):
    key_uses.save(keys_file, {A: 1000, B: 2000}, [A, B])
    key_uses.save(keys_file, {A: 3000, B: 4000}, [B])
    assert key_uses.load(keys_file) == {B: 4000}
    key_uses.save(keys_file, {}, [])
    assert key_uses.load(keys_file) == {}


def test_the_file_is_not_written_when_nothing_changes(keys_file):
    key_uses.save(keys_file, {}, [A])
    assert os.listdir(keys_file.parent) == []
    key_uses.save(keys_file, {A: 1000.125}, [A])
    before = key_uses.path_of(keys_file).stat()
    key_uses.save(keys_file, {A: 1000.125}, [A, B])
    key_uses.save(keys_file, {A: 900}, [A, B])
    assert key_uses.path_of(keys_file).stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b"{",
        b"[1]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5000,
        b"{}" + b" " * key_uses.SIZE_LIMIT,
    ],
)
def test_garbage_counts_as_nothing_and_is_replaced(keys_file, content):
    put(keys_file, content)
    assert key_uses.load(keys_file) == {}
    key_uses.save(keys_file, {A: 1000}, [A])
    assert key_uses.load(keys_file) == {A: 1000}


@pytest.mark.parametrize("at", ['"x"', "null", "true", "[]", "{}", "-1", "0", "1e400", "NaN"])
def test_an_entry_without_a_time_is_left_out(keys_file, at):
    put(keys_file, f'{{"{A}": 1000, "{B}": {at}}}'.encode())
    assert key_uses.load(keys_file) == {A: 1000}


def test_a_time_in_the_future_is_that_of_a_wrong_clock(keys_file):
    now = time.time()
    put(keys_file, json.dumps({A: now + 3600, B: now}).encode())
    assert key_uses.load(keys_file) == {B: now}
    key_uses.save(keys_file, {A: now}, [A, B])
    assert key_uses.load(keys_file) == {A: now, B: now}


@pytest.mark.parametrize("name", ["client-keys.used", "client-keys.used.new"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_planted_file_is_replaced_and_not_followed(keys_file, tmp_path, name, kind):
    precious = tmp_path / "precious"
    precious.write_text(json.dumps({A: 5}))
    place = keys_file.with_name(name)
    place.symlink_to(precious) if kind == "link" else os.mkfifo(place)
    assert key_uses.load(keys_file) == {}
    key_uses.save(keys_file, {A: 1000}, [A])
    assert key_uses.load(keys_file) == {A: 1000}
    assert precious.read_text() == json.dumps({A: 5})
    assert sorted(os.listdir(tmp_path)) == ["client-keys.used", "precious"]


def test_a_folder_in_its_place_is_an_error(keys_file):
    key_uses.path_of(keys_file).mkdir()
    assert key_uses.load(keys_file) == {}
    with pytest.raises(OSError):
        key_uses.save(keys_file, {A: 1000}, [A])
    assert os.listdir(keys_file.parent) == ["client-keys.used"]


def test_writers_that_collide_lose_nothing_once_each_has_written_alone(keys_file):
    """Each keeps its uses in memory, and writes them whenever the file lacks one."""
    digests = [client_keys.digest(f"key {number}") for number in range(8)]
    collisions = []

    def write(digest: str) -> None:
        for at in range(1, 31):
            if not key_uses.save(keys_file, {digest: at}, digests):
                collisions.append(digest)
            assert set(key_uses.load(keys_file)) <= set(digests)

    threads = [threading.Thread(target=write, args=[digest]) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for digest in digests:
        assert key_uses.save(keys_file, {digest: 30}, digests)
    assert key_uses.load(keys_file) == dict.fromkeys(digests, 30)
    assert os.listdir(keys_file.parent) == ["client-keys.used"] and collisions
