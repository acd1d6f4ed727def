"""The memory of a container, observed while something goes on."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Iterator

INTERVAL = 0.1  # seconds
MIB = 1 << 20


class Group:
    """The memory control group of a process."""

    def __init__(self, pid: int):
        groups = dict(
            line.split(":", 2)[1:]
            for line in pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        )
        first = "memory" in groups
        root = (
            f"/sys/fs/cgroup/memory{groups['memory']}" if first else f"/sys/fs/cgroup{groups['']}"
        )
        self._folder = pathlib.Path(root)
        self._current = "memory.usage_in_bytes" if first else "memory.current"
        self._limit = "memory.limit_in_bytes" if first else "memory.max"
        self._inactive = "total_inactive_file" if first else "inactive_file"

    def limit(self) -> int:
        return int((self._folder / self._limit).read_text())

    def working_set(self) -> int:
        """What the kubelet compares with the limit: all but file pages that can be dropped."""
        lines = (self._folder / "memory.stat").read_text().splitlines()
        fields = dict(line.split() for line in lines)
        return int((self._folder / self._current).read_text()) - int(fields[self._inactive])


class Peak:
    """The most MiB of a group so far."""

    def __init__(self, group: Group):
        self.mib = 0.0
        self._group = group
        self._enough = threading.Event()

    def observe(self) -> None:
        while not self._enough.wait(INTERVAL):
            self.mib = max(self.mib, self._group.working_set() / MIB)

    def end(self) -> None:
        self._enough.set()


@contextlib.contextmanager
def observed(group: Group) -> Iterator[Peak]:
    peak = Peak(group)
    thread = threading.Thread(target=peak.observe)
    thread.start()
    try:
        yield peak
    finally:
        peak.end()
        thread.join()
