"""The key file: who may call. A name and the SHA-256 of a key a line; `#` begins a comment line."""

import hashlib
import hmac
import logging
import os
import re
from pathlib import Path

from xaiproxy import errors, folder_file

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})[ \t]+([0-9a-f]{{64}})")
SIZE_LIMIT = 1 << 20  # bytes


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse(text: str) -> dict[str, str]:
    """Name to digest. Raises ValueError naming the line, never its content."""
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


def load(path: Path) -> dict[str, str]:
    """Name to digest. Raises FileNotFoundError if nothing is there, else OSError or ValueError if it is unusable."""
    _identity_at(path)
    return _parsed(_read(path)[0])


def _identity_at(path: Path) -> tuple[int, ...]:
    """Of the file that is there now. Needs no descriptor, and so finds nothing there even if none is free."""
    try:
        return _identity(os.stat(path))
    except FileNotFoundError:
        if _is_absent(path):
            raise
        raise ValueError("it is a link to nothing") from None


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    return folder_file.read(path, SIZE_LIMIT + 1, follow=True)


def _is_absent(path: Path) -> bool:
    """Whether nothing is there. A link to nothing is something, also as a folder on the way to the file."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            return place != path and os.path.exists(place)
    return True


def _parsed(content: bytes) -> dict[str, str]:
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"it is longer than {SIZE_LIMIT} bytes")
    return parse(content.decode("utf-8"))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class ClientKeys:
    """The file as the proxy sees it: read again when it changes.

    Once there were keys, or a file for them, a key is required until the process ends: a file that is then empty,
    gone, unreadable or does not parse admits nobody. The former keys do not serve while a changed file cannot be
    read, since one of them may have been removed.
    """

    def __init__(self, path: Path, required: bool = False):
        """`required`: require a key even while the file does not exist."""
        self.path = path
        self.required = required
        self.unread = (
            False  # whether the last read failed; the next may succeed without a change of the file
        )
        self._seen: tuple[int, ...] | None = None
        self._keys: dict[str, str] = {}
        self._complaint = ""
        self.version = 0  # another with each change
        self.refresh()

    @property
    def admits_nobody(self) -> bool:
        return self.required and not self._keys

    def refresh(self) -> None:
        """Look at the file; a stat when it has not changed."""
        keys: dict[str, str] = {}
        required, seen, complaint = True, None, ""
        try:
            if _identity_at(self.path) == self._seen:
                return
            content, status = _read(self.path)
            seen = _identity(status)
            keys = _parsed(content)
            if not keys:
                complaint = f"{self.path} holds no key"
        except FileNotFoundError:
            required = self.required
            if required:
                complaint = f"{self.path} does not exist"
        except (OSError, ValueError) as error:
            complaint = f"{self.path} cannot be used: {error.strerror if isinstance(error, OSError) else error}"
        self.version += (keys, required) != (self._keys, self.required)
        self.unread = seen is None and bool(complaint)
        self._keys, self._seen, self.required = keys, seen, required
        self._complain(complaint)

    def _complain(self, complaint: str) -> None:
        if complaint and complaint != self._complaint:
            logger.error(
                "%s; nobody is admitted until it is put right: %s",
                complaint,
                errors.typed("xai-client-key add NAME"),
            )
        self._complaint = complaint

    def name_of(self, key: str) -> str | None:
        """Whose key this is; None for nobody's. Takes as long for every key."""
        presented, found = digest(key), None
        for name, known in self._keys.items():
            if hmac.compare_digest(presented, known):
                found = name
        return found
