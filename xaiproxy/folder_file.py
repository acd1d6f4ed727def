"""Opening the files of the token folder: only a regular file is opened, and only so much of it is read.

Other users may be able to put things into that folder. Opening a FIFO would wait for its other end, reading from a
link to /dev/zero never ends, and a link would have another file written.
"""

import errno
import os
import stat
from pathlib import Path


class NotAFile(OSError):
    """What is at the path is not a regular file, or a link to follow where none may be followed."""


def opened(path: Path, flags: int, *, follow: bool = False) -> int:
    """Return a descriptor of the regular file at `path`; a new file gets mode 0600. Raises NotAFile, OSError.

    `follow`: whether `path` may be a symbolic link, as in a mounted Secret. Never for what is written or locked.
    """
    # stat(2) first: opening a device can have effects, and without a free descriptor a missing file is still found out.
    try:
        _check(path, os.stat(path, follow_symlinks=follow))
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # O_NONBLOCK: what is there may have been replaced by a FIFO since.
    fd = os.open(
        path,
        flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW),
        0o600,
    )
    try:
        _check(path, os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def read(path: Path, limit: int, *, follow: bool = False) -> tuple[bytes, os.stat_result]:
    """Return the first `limit` bytes and the status of the file that they are from. Raises as `opened` does."""
    with open(opened(path, os.O_RDONLY, follow=follow), "rb", buffering=0) as file:
        content = b""
        while len(content) < limit and (part := file.read(limit - len(content))):
            content += part
        return content, os.fstat(file.fileno())


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "it is not a file"
        raise NotAFile(errno.EINVAL, what, os.fspath(path))
