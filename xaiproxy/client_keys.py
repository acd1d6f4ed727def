"""The key file: one client key a line, as its name and SHA-256; `#` begins a comment line.

A comment line above a key may have the time at which it was made.
"""

import calendar
import errno
import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from xaiproxy import errors, folder_file
from xaiproxy.cached_file import CachedFile

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})[ \t]+([0-9a-f]{{64}})")
MADE = "# made %Y-%m-%dT%H:%M:%SZ"
SIZE_LIMIT = 1 << 20  # bytes


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse(text: str) -> dict[str, str]:
    """Return name to digest. Raises ValueError, which names the line and never quotes it."""
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not a name and the SHA-256 of a key")
        if match[1] in keys:
            raise ValueError(f"line {number} repeats the name {match[1]}")
        keys[match[1]] = match[2]
    return keys


def made_at(text: str) -> dict[str, float]:
    """Return the unix time at which a key was made, by its name, for the keys that have one."""
    times: dict[str, float] = {}
    made = None
    for line in text.splitlines():
        match = LINE.fullmatch(line.strip())
        if match and made is not None:
            times[match[1]] = made
        made = made_time(line)
    return times


def made_time(line: str) -> float | None:
    """Return the unix time in a comment line as MADE; None if it is another line."""
    try:
        return calendar.timegm(time.strptime(line.strip(), MADE))
    except ValueError:
        return None


def load(path: Path) -> dict[str, str]:
    """Return name to digest. Raises as `read` and `parse` do."""
    return parse(read(path))


def read(path: Path) -> str:
    """Return the text of the key file.

    Raises FileNotFoundError if there is no file, ValueError if it is not text or too long, and any
    other OSError if it cannot be read.
    """
    try:
        content, _ = folder_file.read(path, SIZE_LIMIT + 1, follow=True)
    except FileNotFoundError:
        if _is_absent(path, *path.parents):
            raise
        reason = "it is a link to nothing"
        raise folder_file.NotAFile(errno.EINVAL, reason, os.fspath(path)) from None
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"it is longer than {SIZE_LIMIT} bytes")
    return content.decode("utf-8")


def _is_absent(path: str | Path, *folders: str | Path) -> bool:
    """Whether there is no file; a link to nothing counts as one, also as a folder of the path.

    `folders`: the path's parents, innermost first. Raises PermissionError, for one.
    """
    try:
        os.lstat(path)
        return False
    except FileNotFoundError:
        pass
    for folder in folders:
        if os.path.exists(folder):
            return True
        if os.path.lexists(folder):
            return False
    return True


class ClientKeys:
    """The keys as the proxy knows them: read again when the file changes.

    Once there has been a key file, a key is required until the process ends. While that file is
    empty, missing, unreadable or does not parse, no key is valid: a key that the last readable
    version held may have been removed since.
    """

    def __init__(self, path: Path, required: bool = False, now: Callable[[], float] = time.time):
        """`required`: whether a key is required even before there is a file."""
        self.path = path
        self.required = required
        # By the digest of a key: when `name_of` last found it, in unix seconds.
        self.last_uses: dict[str, float] = {}
        self._now = now
        self._file = CachedFile(path, self._load)
        self._places = tuple(map(str, (path, *path.parents)))
        self._absent = False
        self._keys: dict[str, str] = {}
        self._complaint = ""
        self.refresh()

    @property
    def digests(self) -> frozenset[str]:
        """The digests of the valid keys."""
        return frozenset(self._keys.values())

    @property
    def admits_nobody(self) -> bool:
        return self.required and not self._keys

    def refresh(self) -> None:
        """Read the file if it has changed: one os.stat if it has not, two if there is none."""
        keys: dict[str, str] = {}
        required, absent = True, False
        try:
            if self._absent and _is_absent(*self._places):
                return
            keys, complaint = self._file.get()
            if keys is self._keys:
                return
        except FileNotFoundError:
            required, absent = self.required, True
            complaint = f"{self.path} does not exist" if required else ""
        except OSError as error:
            complaint = f"{self.path} cannot be used: {error.strerror}"
        self._keys, self.required, self._absent = keys, required, absent
        if complaint and complaint != self._complaint:
            logger.error(
                "%s; all clients are refused until that is corrected: %s",
                complaint,
                errors.typed("xai-client-key add NAME"),
            )
        self._complaint = complaint

    def _load(self) -> tuple[dict[str, str], str]:
        """Return the keys and what is wrong with them, if anything. Raises OSError."""
        try:
            keys = load(self.path)
        except ValueError as error:
            return {}, f"{self.path} cannot be used: {error}"
        return keys, "" if keys else f"{self.path} holds no key"

    def name_of(self, key: str) -> str | None:
        """Return the name of a key, or None if it is not valid, in the same time for every key."""
        if not self._keys:
            return None
        presented, found = digest(key), None
        for name, known in self._keys.items():
            if hmac.compare_digest(presented, known):
                found = name
        if found is not None:
            self.last_uses[presented] = self._now()
        return found
