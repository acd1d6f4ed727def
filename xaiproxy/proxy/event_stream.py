"""text/event-stream (WHATWG HTML, "Server-sent events"): comments in its silences, for clients that lose patience."""

import re
from collections.abc import Iterable, Iterator

from xaiproxy.http1 import response_head

BLANK_LINE = re.compile(
    rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)\Z"
)  # ends an event; a lone CR is a line end, too
BOM = b"\xef\xbb\xbf"


def is_event_stream(head: response_head.Head) -> bool:
    """Whether something can be put into this answer: its length is open, and its bytes are text as it is."""
    types = head.values.get("content-type", [""])
    return (
        types[0].partition(";")[0].strip().lower() == "text/event-stream"
        and head.length is None
        and set(head.values.get("content-encoding", ())) <= {"identity"}
        and not head.body.ended
    )


def kept_alive(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The stream with a comment for each empty part, unless that comes in the middle of a line."""
    end, said, begun, mark = b"", False, b"", BOM
    for part in parts:
        if part:
            if said and not end:  # after a comment, a mark would be text
                begun += part
                if begun != mark and mark.startswith(begun):
                    continue
                part, begun, mark = begun.removeprefix(mark), b"", b""
            end = (end + part)[-4:]
            if part:  # an empty one would be taken for the end
                yield part
        elif comment := comment_after(end):
            said = True
            yield comment
    if begun:
        yield begun


def comment_after(end: bytes) -> bytes:
    """A comment to put after a stream's last four bytes; b"" in the middle of a line.

    Between two events an empty line follows, for clients that read block by block; within one it would end the event.
    After a CR the comment ends with CR, so that a LF which still belongs to the former completes the latter.
    """
    if not end or BLANK_LINE.search(end):
        return b": keepalive" + 2 * (b"\r" if end.endswith(b"\r") else b"\n")
    return b":" + end[-1:] if end.endswith((b"\n", b"\r")) else b""
