"""The key file: who may call. A name and the SHA-256 of a key a line; `#` begins a comment line."""

import hashlib
import hmac
import logging
import os
import re
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})[ \t]+([0-9a-f]{{64}})")
SIZE_LIMIT = 1 << 20  # bytes


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse(text: str) -> "dict[str, str]":
    """Name to digest. Raises ValueError naming the line, never its content."""
    keys: "dict[str, str]" = {}
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


class ClientKeys:
    """The file as the proxy sees it: read again when it changes.

    Once there were keys, or a file for them, a key is asked for until the process ends: a file that is then empty,
    gone, unreadable or does not parse admits nobody.
    """

    def __init__(self, path: Path, required: bool = False):
        """`required`: ask for a key even while the file does not exist."""
        self.path = path
        self.required = required
        self._seen: "tuple | None" = None
        self._keys: "dict[str, str]" = {}
        self._complaint = ""
        self.version = 0  # another with each change
        self.refresh()

    def refresh(self) -> None:
        """Look at the file; a stat when it has not changed."""
        try:
            status = os.stat(self.path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            if seen == self._seen:
                return
            self.required = True
            self.version += 1
            if not stat.S_ISREG(status.st_mode):  # to open a FIFO would wait for a writer, and all requests with it
                raise ValueError("it is not a file")
            with open(self.path, encoding="utf-8") as file:
                self._keys = parse(file.read(SIZE_LIMIT))
            self._seen, self._complaint = seen, ""
            if not self._keys:
                self._complain(f"{self.path} holds no key")
        except FileNotFoundError:
            self.version += self._seen is not None
            self._keys, self._seen = {}, None
            if self.required:
                self._complain(f"{self.path} does not exist")
        except (OSError, ValueError) as error:
            self._keys, self._seen, self.required = {}, None, True
            self.version += 1
            reason = error.strerror if isinstance(error, OSError) else error
            self._complain(f"{self.path} cannot be used: {reason}")

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.error("%s; nobody is admitted until it is put right: xai-client-key add NAME", complaint)
        self._complaint = complaint

    def name_of(self, key: str) -> "str | None":
        """Whose key this is; None for nobody's. Takes as long for every key."""
        presented, found = digest(key), None
        for name, known in self._keys.items():
            if hmac.compare_digest(presented, known):
                found = name
        return found
