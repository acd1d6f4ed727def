"""The file of last uses: when each client key was last used, beside the key file.

It is JSON, from the SHA-256 of a key to unix seconds, so a name that gets another key starts anew.
The file is no more than a memory aid: without it, or with garbage in it, no use is known.

Several proxies may write it without a lock. Each keeps its own uses in memory, and writes the later
of each two times whenever the file lacks one of its own. So a write that is lost to another one is
made up for by the next.
"""

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from xaiproxy import client_keys, durable_file, folder_file, storage

SIZE_LIMIT = 2 * client_keys.SIZE_LIMIT  # bytes; an entry is shorter than two lines of the key file
CLOCK_SKEW = 60.0  # seconds; a later time is that of a clock which was wrong


def path_of(keys_file: Path) -> Path:
    return keys_file.with_name(keys_file.name + ".used")


def load(keys_file: Path) -> dict[str, float]:
    """Return the recorded last uses, as digest to unix seconds. Raises nothing."""
    try:
        content, _ = folder_file.read(path_of(keys_file), SIZE_LIMIT + 1)
        entries = json.loads(content) if len(content) <= SIZE_LIMIT else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    latest = time.time() + CLOCK_SKEW
    return {
        digest: at
        for digest, at in entries.items()
        if type(at) in (int, float) and 0 < at <= latest
    }


def save(keys_file: Path, uses: Mapping[str, float], digests: Collection[str]) -> bool:
    """Add `uses` to the file, unless it has them, and drop the keys that are not in `digests`.

    Return False if another process wrote at the same moment. Raises OSError, StorageError.
    """
    recorded = load(keys_file)
    if _merged(recorded, uses, digests) == recorded:
        return True
    storage.check_owner(keys_file)
    path = path_of(keys_file)
    try:
        new = durable_file.NewFile(path.with_name(path.name + ".new"))
        try:
            # Read now: a process whose new file this one has replaced cannot rename it any more.
            merged = _merged(load(keys_file), uses, digests)
            new.write(json.dumps(merged).encode() + b"\n")
            new.rename(path)
        finally:
            new.remove()
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _merged(
    recorded: Mapping[str, float], uses: Mapping[str, float], digests: Collection[str]
) -> dict[str, float]:
    latest = {digest: max(recorded.get(digest, 0), uses.get(digest, 0)) for digest in digests}
    return {digest: at for digest, at in latest.items() if at}
