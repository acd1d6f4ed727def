"""A file's content is loaded once for each change of the file, and failures are not remembered."""

import os
from pathlib import Path

import pytest

from xaiproxy.cached_file import CachedFile


class Loads:
    """A cached file, and what was loaded from it."""

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
    other.rename(loads.path)  # the same size and time of modification
    assert [loads.file.get() for _ in range(3)] == ["two"] * 3
    with loads.path.open("a") as file:
        file.write("!")
    assert [loads.file.get() for _ in range(3)] == ["two!"] * 3
    assert loads.all == ["one", "two", "two!"]


def test_a_failed_load_is_tried_again(loads):
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


def test_a_link_is_followed_when_it_is_turned(loads):
    for name in ("1", "2"):
        loads.path.with_name(name).write_text(name)
    loads.path.symlink_to("1")
    assert loads.file.get() == "1"
    loads.path.unlink()
    loads.path.symlink_to("2")
    assert loads.file.get() == "2"
