"""Replacing a file so that a crash or a power cut leaves either the former content or the new one.

The order is: write a new file beside the former one, fsync it, rename it over the former one, fsync
the folder.
"""

import contextlib
import errno
import os
from pathlib import Path

from xaiproxy import folder_file


class NewFile:
    """The new file: open, made by this process with mode 0600, in place of any file at its path."""

    def __init__(self, path: Path):
        self._path = path
        path.unlink(missing_ok=True)
        self.fd = folder_file.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def is_in_place(self) -> bool:
        """Whether the open file is still the one at its path, or was removed or replaced."""
        return is_at(self._path, self.fd)

    def write(self, content: bytes) -> None:
        """Replace the file's content, and sync it. Raises OSError."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        view = memoryview(content)
        while view:
            view = view[os.write(self.fd, view) :]
        os.ftruncate(self.fd, len(content))
        os.fsync(self.fd)

    def rename(self, path: Path) -> None:
        """Rename the file to `path`, and close it. Raises OSError."""
        if not self.is_in_place():
            raise FileNotFoundError(
                errno.ENOENT, "it was removed or replaced by another process", os.fspath(self._path)
            )
        os.rename(self._path, path)
        self.close()

    def remove(self) -> None:
        """Remove the file, unless it was renamed or replaced, and close it. Raises nothing."""
        if self.is_in_place():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def is_at(path: Path, fd: int) -> bool:
    """Whether the open file `fd` is the one at `path`; a symbolic link there is not followed."""
    try:
        at_path, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def sync_folder(folder: Path) -> None:
    """Make the renames and removals in `folder` durable. Raises OSError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        # Some network file systems cannot sync a folder, and need not.
        if error.errno != errno.EINVAL:
            raise
