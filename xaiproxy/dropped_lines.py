"""The number of log lines that supervisord has dropped, as the programs under it read it.

supervisord takes every line of theirs, so they cannot count the ones that it drops. The number is
in an anonymous file that only supervisord writes; its path is in an environment variable. Only
Linux has such files.
"""

import os
from pathlib import Path

from xaiproxy import folder_file

PATH = "XAIPROXY_SUPERVISORD_DROPPED"
SIZE = 8  # bytes, written and read at once


def publish() -> int:
    """Make the file for programs that are started later; return its descriptor, or -1."""
    create = getattr(os, "memfd_create", None)
    if create is None:
        return -1
    fd: int = create("xaiproxy-dropped-lines")
    os.environ[PATH] = f"/proc/{os.getpid()}/fd/{fd}"
    write(fd, 0)
    return fd


def write(fd: int, number: int) -> None:
    """Write the number. `fd`: from `publish`."""
    if fd != -1:
        os.pwrite(fd, number.to_bytes(SIZE, "little"), 0)


def published() -> int:
    """Return the number; 0 if this program has no supervisord."""
    try:
        # In /proc every open file is a link.
        content, _ = folder_file.read(Path(os.environ[PATH]), SIZE + 1, follow=True)
    except (KeyError, OSError):
        return 0
    return int.from_bytes(content, "little") if len(content) == SIZE else 0
