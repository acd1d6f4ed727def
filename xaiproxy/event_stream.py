"""text/event-stream (WHATWG HTML, "Server-sent events"): comments in its silences, for clients that lose patience."""

import re
from collections.abc import Iterable, Iterator

from xaiproxy import response_head

COMMENT = b": keepalive\n\n"
BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)\Z")  # ends an event; a lone CR is a line end, too
BOM = b"\xef\xbb\xbf"


def is_event_stream(head: response_head.Head) -> bool:
    """Whether something can be put into this answer: its length is open, and its bytes are text as it is."""
    types = head.values.get("content-type", [""])
    return (types[0].partition(";")[0].strip().lower() == "text/event-stream" and head.length is None
            and set(head.values.get("content-encoding", ())) <= {"identity"} and not head.body.ended)


def kept_alive(parts: "Iterable[bytes]") -> "Iterator[bytes]":
    """The stream with a comment for each empty part that does not come amid an event."""
    end, said, begun, mark = b"", False, b"", BOM
    for part in parts:
        if part:
            if said and not end:  # behind a comment, a mark would be text
                begun += part
                if begun != mark and mark.startswith(begun):
                    continue
                part, begun, mark = begun.removeprefix(mark), b"", b""
            end = (end + part)[-4:]
            if part:  # an empty one would be taken for the end
                yield part
        elif not end or BLANK_LINE.search(end):
            said = True
            yield COMMENT
    if begun:
        yield begun
