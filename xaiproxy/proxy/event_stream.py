"""text/event-stream (WHATWG HTML, "Server-sent events"): comments while no event comes.

They keep clients with a read timeout connected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from xaiproxy.http1 import response_head

# Ends an event; a lone CR is a line end too.
BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)\Z")
BOM = b"\xef\xbb\xbf"


def is_event_stream(head: response_head.Head) -> bool:
    """Whether comments can be inserted: no length is announced, and its bytes are plain text."""
    types = head.values.get("content-type", [""])
    return (
        types[0].partition(";")[0].strip().lower() == "text/event-stream"
        and head.length is None
        and set(head.values.get("content-encoding", ())) <= {"identity"}
        and not head.body.ended
    )


def with_comments(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The stream with a comment for each empty part, except in the middle of a line."""
    end, commented, begun, mark = b"", False, b"", BOM
    for part in parts:
        if part:
            # After a comment, a byte order mark would be text.
            if commented and not end:
                begun += part
                if begun != mark and mark.startswith(begun):
                    continue
                part, begun, mark = begun.removeprefix(mark), b"", b""
            end = (end + part)[-4:]
            # An empty part would be taken for the end.
            if part:
                yield part
        elif comment := comment_after(end):
            commented = True
            yield comment
    if begun:
        yield begun


def comment_after(end: bytes) -> bytes:
    """A comment to insert after a stream's last four bytes; b"" in the middle of a line.

    Between two events an empty line follows, for clients that read block by block; within an event
    it would end the event. After a CR the comment ends with CR: if a LF follows that belongs to the
    former CR, it completes the latter.
    """
    if not end or BLANK_LINE.search(end):
        return b": keepalive" + 2 * (b"\r" if end.endswith(b"\r") else b"\n")
    return b":" + end[-1:] if end.endswith((b"\n", b"\r")) else b""
