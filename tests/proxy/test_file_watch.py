"""Who watches a file is told to look at it after every change, and otherwise hardly ever."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest

from xaiproxy.proxy.file_watch import RELOOK, FileWatch


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def turn() -> None:
    """Let the loop see what the kernel has for it."""
    for _ in range(2):
        gevent.get_hub().loop.update_now()
        gevent.sleep(0.001)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


@pytest.fixture
def watch(path: Path, clock: Clock) -> FileWatch:
    watch = FileWatch(path, clock)
    assert watch.due()
    turn()
    assert not watch.due()
    return watch


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_text("two")
    os.replace(new, path)


def in_place(path: Path) -> None:
    path.write_text("two")


def appended(path: Path) -> None:
    with open(path, "a") as file:
        file.write("x")


def removed(path: Path) -> None:
    path.unlink()


def moved_away(path: Path) -> None:
    path.rename(path.with_name("other"))


def made_unreadable(path: Path) -> None:
    path.chmod(0)


@pytest.mark.parametrize(
    "change", [replace, in_place, appended, removed, moved_away, made_unreadable]
)
def test_a_change_makes_a_look_due(
    watch: FileWatch, path: Path, change: Callable[[Path], None]
) -> None:
    change(path)
    turn()
    assert watch.due()


@pytest.mark.parametrize("change", [replace, in_place])
def test_so_does_the_next_and_the_next(
    watch: FileWatch, path: Path, change: Callable[[Path], None]
) -> None:
    for _ in range(20):
        change(path)
        turn()
        assert watch.due()
        turn()
        watch.due()  # what became of the file before
        turn()
        assert not watch.due()


@pytest.mark.parametrize("create", [in_place, replace])
def test_a_file_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, clock: Clock, create: Callable[[Path], None]
) -> None:
    watch = FileWatch(tmp_path / "file", clock)
    assert watch.due()
    turn()
    assert not watch.due()
    create(tmp_path / "file")
    turn()
    assert watch.due()
    turn()
    watch.due()
    in_place(tmp_path / "file")
    turn()
    assert watch.due()


def test_what_is_written_to_other_files_is_nothing(path: Path, clock: Clock) -> None:
    with open(path.with_name("log"), "w") as log:
        watch = FileWatch(path, clock)
        assert watch.due()
        for _ in range(3):
            print("a line", file=log, flush=True)
            turn()
            assert not watch.due()


def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path, clock: Clock) -> None:
    """As the kubelet swaps them."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "folder" / "file"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "one")
    watch = FileWatch(link, clock)
    assert watch.due()
    (tmp_path / "folder" / "new").symlink_to(tmp_path / "two")
    turn()
    watch.due()
    (tmp_path / "folder" / "new").replace(link)
    turn()
    assert watch.due()
    turn()
    watch.due()
    (tmp_path / "two").write_text("more")
    turn()
    assert watch.due()


def test_a_look_is_due_now_and_then_whatever_the_kernel_tells(
    watch: FileWatch, path: Path, clock: Clock
) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    clock.now += RELOOK - 0.1
    assert not watch.due()
    clock.now += 0.1
    assert watch.due()


def test_without_a_folder_every_look_is_due(tmp_path: Path, clock: Clock) -> None:
    watch = FileWatch(tmp_path / "nowhere" / "file", clock)
    assert watch.due() and watch.due()


def test_without_inotify_every_look_is_due(path: Path, clock: Clock) -> None:
    gevent.get_hub()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        watch = FileWatch(path, clock)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert watch.due() and watch.due()


def test_a_change_is_seen_before_what_came_in_the_same_turn(watch: FileWatch, path: Path) -> None:
    """Whoever sends a request after a change is answered accordingly."""
    read_end, write_end = os.pipe()
    requests = gevent.get_hub().loop.io(read_end, 1)
    try:
        for change in 50 * (replace, in_place):
            seen = []
            requests.start(lambda: (os.read(read_end, 1), seen.append(watch.due())))
            change(path)
            os.write(write_end, b"x")
            turn()
            requests.stop()
            assert seen == [True]
            turn()
            watch.due()
    finally:
        requests.close()
        os.close(read_end)
        os.close(write_end)
