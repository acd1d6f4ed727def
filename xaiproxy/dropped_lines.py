"""The number of log lines that supervisord has dropped, as the programs under it read it.

supervisord takes every line of theirs, so they cannot count the ones that it drops. The number is
in an anonymous file that only supervisord writes; its path is in an environment variable. Only
Linux has such files.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from xaiproxy import folder_file

PATH = "XAIPROXY_SUPERVISORD_DROPPED"
SIZE = 8  # bytes, written and read at once


def publish(number: int = 0) -> Callable[[int], None]:
    """Make the file, for programs that are started later; return what writes a number into it."""
    create = getattr(os, "memfd_create", None)
    if create is None:
        return lambda number: None
    fd = create("xaiproxy-dropped-lines")
    os.ftruncate(fd, SIZE)
    # Not by the descriptor: a supervisord that starts again closes those that it does not know.
    memory = mmap.mmap(fd, SIZE)
    os.environ[PATH] = f"/proc/{os.getpid()}/fd/{fd}"

    def write(number: int) -> None:
        memory[:] = number.to_bytes(SIZE, "little")

    write(number)
    return write


def published() -> int:
    """Return the number; 0 if this program has no supervisord."""
    try:
        # In /proc every open file is a link.
        content, _ = folder_file.read(Path(os.environ[PATH]), SIZE + 1, follow=True)
    except (KeyError, OSError):
        return 0
    return int.from_bytes(content, "little") if len(content) == SIZE else 0
