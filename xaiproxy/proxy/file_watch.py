"""Whether a file may have changed since it was last looked at: the kernel tells, so that a request costs no look."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import gevent

RELOOK = 1.0  # seconds after which it is looked at all the same: inotify knows no other machines, nor moved folders
# inotify(7)
_MODIFY, _ATTRIB, _MOVED_TO, _CREATE, _DELETE_SELF, _MOVE_SELF = 0x2, 0x4, 0x80, 0x100, 0x400, 0x800
_OF_FILE = _MODIFY | _ATTRIB | _DELETE_SELF | _MOVE_SELF
_OF_FOLDER = _MOVED_TO | _CREATE | _DELETE_SELF | _MOVE_SELF
_libc = ctypes.CDLL(None)


class FileWatch:
    """The file need not be there. Where the kernel has no inotify to give, every look is due."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._folder = os.fsencode(path), os.fsencode(path.parent)
        self._clock = clock
        self._told = False  # whether the kernel would tell
        self._changed = True
        self._looked_at = 0.0
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            loop = gevent.get_hub().loop
            self._watcher = loop.io(self._fd, 1)
            # Ahead of all that came in the same turn of the loop: a request sent after a change must find it.
            self._watcher.priority = loop.MAXPRI
            self._watcher.start(self._on_change)

    def _on_change(self) -> None:
        with contextlib.suppress(OSError):
            os.read(self._fd, 65536)
        self._changed = True

    def due(self) -> bool:
        """Whether to look now. Whoever is told so must look."""
        now = self._clock()
        if self._told and not self._changed and now - self._looked_at < RELOOK:
            return False
        # Before the look, so that no change is missed. Files that were replaced take their watches with them.
        self._told = (
            self._fd >= 0 and _libc.inotify_add_watch(self._fd, self._folder, _OF_FOLDER) >= 0
        )
        if self._told:
            _libc.inotify_add_watch(
                self._fd, self._path, _OF_FILE
            )  # which may be a link's target in another folder
        self._changed, self._looked_at = False, now
        return True
