"""A file is loaded once for each change of it, and failures are not cached."""

import os
from pathlib import Path

import pytest

from xaiproxy.cached_file import CachedFile


class Loads:
    """A cached file, and the contents that were loaded from it."""

    def __init__(self, path: Path):
        self.path = path
        self.all: list[str] = []
        self.during = lambda: None
        self.file = CachedFile(path, self.load)

    def load(self) -> str:
        self.all.append(self.path.read_text())
        self.during()
        return self.all[-1]


@pytest.fixture
def loads(tmp_path):
    return Loads(tmp_path / "file")


def test_a_file_is_loaded_once_until_it_changes(loads):
    loads.path.write_text("one")
    assert [loads.file.get() for _ in range(3)] == ["one"] * 3
    other = loads.path.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(loads.path.stat().st_atime_ns, loads.path.stat().st_mtime_ns))
    # The other file has the same size and time of modification.
    other.rename(loads.path)
    assert [loads.file.get() for _ in range(3)] == ["two"] * 3
    with loads.path.open("a") as file:
        file.write("!")
    assert [loads.file.get() for _ in range(3)] == ["two!"] * 3
    assert loads.all == ["one", "two", "two!"]


def test_a_failed_load_is_retried(loads):
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            loads.file.get()
    loads.path.write_text("one")
    assert loads.file.get() == "one"
    loads.path.unlink()
    with pytest.raises(FileNotFoundError):
        loads.file.get()


def test_the_same_file_is_loaded_again_after_a_failure(loads):
    loads.path.write_text("one")
    loads.file.get()
    aside = loads.path.rename(loads.path.with_name("aside"))
    with pytest.raises(FileNotFoundError):
        loads.file.get()
    aside.rename(loads.path)
    assert loads.file.get() == "one" and len(loads.all) == 2


def test_a_change_in_the_middle_of_a_load_is_found_by_the_next_call(loads):
    loads.path.write_text("one")
    loads.during = lambda: loads.path.write_text("longer")
    assert loads.file.get() == "one"
    loads.during = lambda: None
    assert loads.file.get() == "longer"


def test_a_link_with_a_new_target_is_loaded_again(loads):
    for name in ("1", "2"):
        loads.path.with_name(name).write_text(name)
    loads.path.symlink_to("1")
    assert loads.file.get() == "1"
    loads.path.unlink()
    loads.path.symlink_to("2")
    assert loads.file.get() == "2"
