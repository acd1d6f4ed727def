"""The content of a response that was kept while it passed, decoded: errors and usage are in it."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from xaiproxy.http1 import response_head
from xaiproxy.http1.sample import Sample

STEP = 16384  # bytes that are decoded at a time
DECODED_LIMIT = 32 << 20  # bytes that are decoded of one response
UNPAUSED_LIMIT = 1 << 17  # the same without pauses: half a millisecond, and longer than any error
DECODED = frozenset(("gzip", "x-gzip", "deflate"))
# gzip or zlib, which have headers; raw deflate, which some servers send.
WINDOWS = (47, -15)


class Unreadable(Exception):
    """`reason`: compressed, by a coding that is not known or not intact; or too_long."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def codings(head: response_head.Head) -> list[str]:
    """The content codings of a response, in lower case."""
    fields = head.values.get("content-encoding")
    if fields is None:
        return []
    names = [name.strip().lower() for name in ",".join(fields).split(",")]
    return [name for name in names if name not in ("", "identity")]


def taken(
    head: response_head.Head, sample: Sample, pause: Callable[[], object] | None = None
) -> bytes:
    """Take what was kept. Of long content only the start and the end are returned.

    `pause`: called between steps that each take less than a millisecond. Without it, content that
    takes longer is too_long. Raises Unreadable.
    """
    if sample.too_long:
        raise Unreadable("too_long")
    data, names = sample.take(), codings(head)
    if not data or not names:
        return data
    if names[0] not in DECODED or len(names) > 1:
        raise Unreadable("compressed")
    return inflated(data, pause).take()


def inflated(data: bytes, pause: Callable[[], object] | None = None) -> Sample:
    """The content of a compressed response, which may be cut; `pause`: see taken.

    Raises Unreadable.
    """
    for window in WINDOWS:
        try:
            return _inflated(data, zlib.decompressobj(window), pause)
        except zlib.error:
            continue
    raise Unreadable("compressed")


def _inflated(data: bytes, decoder: zlib._Decompress, pause: Callable[[], object] | None) -> Sample:
    sample, size = Sample(), 0
    limit = UNPAUSED_LIMIT if pause is None else DECODED_LIMIT
    for start in range(0, len(data), STEP):
        # Not all at once: each step copies what it leaves.
        rest = data[start : start + STEP]
        while rest:
            decoded = decoder.decompress(rest, STEP)
            sample.add(decoded)
            size += len(decoded)
            if size > limit:
                raise Unreadable("too_long")
            rest = decoder.unconsumed_tail
            if pause is not None:
                pause()
    # What the limit of the last step has left.
    sample.add(decoder.flush())
    return sample
