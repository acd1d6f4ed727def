"""The body of a request: strict parsing, streaming, and the bounded copy for a replay."""

import contextlib
import select
import socket
import time
import tracemalloc
from collections.abc import Iterator

import gevent
import gevent.event
import gevent.socket
import pytest

from xaiproxy import errors
from xaiproxy.http1 import request_head
from xaiproxy.http1.connection import READ, Connection
from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.request_body import RequestBody

NEXT = b"GET /the-next-request HTTP/1.1\r\n"
# In bytes: a limit that is never reached.
MANY = 1 << 30
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def head(*lines: str, version: str = "HTTP/1.1") -> request_head.Head:
    text = "\r\n".join([f"POST / {version}", "Host: localhost", *lines, "", ""])
    return request_head.parse(text.encode())


class Pieces:
    """A connection on which these pieces arrive, and then EOF. The first arrived with the head."""

    def __init__(self, first: bytes, *others: bytes):
        self.unread = first
        self._others = iter(others)

    def recv(self, limit: float) -> bytes:
        data, self.unread = self.unread or next(self._others, b""), b""
        return data

    def wait_before_reading(self) -> None:
        pass


def sized(data: bytes, length: int | None = None) -> RequestBody:
    """A body `data` with a Content-Length, `length` or its own."""
    length = len(data) if length is None else length
    return RequestBody(head(f"Content-Length: {length}"), Pieces(data), 5)


def chunked(*pieces: bytes) -> RequestBody:
    """A chunked body that arrives in these pieces, framing included."""
    return RequestBody(head("Transfer-Encoding: chunked"), Pieces(*pieces), 5)


def one_by_one(*chunks: bytes) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b"")]


def in_chunks(*chunks: bytes) -> bytes:
    return b"".join(one_by_one(*chunks))


def whole(body: RequestBody) -> bytes:
    data = b"".join(iter(body.read1, b""))
    assert body.ended and body.read1() == b"" and body.read() == b""
    return data


# where a body ends


@pytest.mark.parametrize("size", [0, 1, 5, READ, READ + 1])
def test_a_body_ends_after_its_content_length(size):
    connection = Pieces(b"x" * size + NEXT)
    assert whole(RequestBody(head(f"Content-Length: {size}"), connection, 5)) == b"x" * size
    assert connection.unread == NEXT


def test_a_request_without_a_body_has_ended_before_any_read():
    for lines in ((), ("Content-Length: 0",)):
        connection = Pieces(NEXT)
        body = RequestBody(head(*lines), connection, 5)
        assert body.ended and whole(body) == b"" and connection.unread == NEXT


def test_a_truncated_sized_body_raises_client_gone():
    for size in range(20):
        body = sized(b"x" * size, 20)
        with pytest.raises(errors.ClientGone):
            whole(body)
        assert not body.ended


@pytest.mark.parametrize(
    "data, content",
    [
        (b"0\r\n\r\n", b""),
        (in_chunks(b"hello"), b"hello"),
        (in_chunks(b"h", b"ello"), b"hello"),
        (b'5;a="b"\r\nhello\r\n0\r\nTrailer: x\r\n\r\n', b"hello"),
        (in_chunks(b"x" * 70000, b"y"), b"x" * 70000 + b"y"),
    ],
)
def test_a_chunked_body_ends_with_its_last_chunk_and_trailers(data, content):
    connection = Pieces(data + NEXT)
    assert whole(RequestBody(head("Transfer-Encoding: chunked"), connection, 5)) == content
    assert connection.unread == NEXT


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"+5\r\nhello\r\n0\r\n\r\n", "chunk size that is malformed"),
        (b"5\r\nhellox\r\n0\r\n\r\n", "chunk that is longer than announced"),
        (b"0\r\nX : y\r\n\r\n", "trailers that are malformed"),
        (b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n", "line that is too long"),
    ],
)
def test_ambiguous_chunks_are_refused(data, reason):
    for before in (b"", in_chunks(b"hello")[:-5]):
        with connection("Transfer-Encoding: chunked") as (body, client):
            client.sendall(before)
            if before:
                assert body.read1() == b"hello"
            client.sendall(data + NEXT)
            with pytest.raises(errors.BadRequest, match="the request body has .*" + reason):
                whole(body)
            assert not body.ended


def test_a_truncated_chunked_body_raises_client_gone():
    data = b'3\r\nabc\r\n0a;x="y"\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n'
    for size in range(len(data)):
        body, came = chunked(data[:size]), b""
        with pytest.raises(errors.ClientGone):
            while True:
                came += body.read1() or pytest.fail("a cut body seemed whole")
        assert not body.ended and b"abc0123456789".startswith(came)
    assert whole(chunked(data)) == b"abc0123456789"


# what one read returns


def test_one_read_returns_all_chunks_that_arrived_together():
    assert list(iter(chunked(in_chunks(b"a", b"b")).read1, b"")) == [b"ab"]
    assert list(iter(chunked(*one_by_one(b"a", b"b")).read1, b"")) == [b"a", b"b"]


def test_a_read_returns_no_more_than_its_size_and_nothing_after_the_body():
    for line, data in (
        ("Content-Length: 10", b"0123456789"),
        ("Transfer-Encoding: chunked", in_chunks(b"01234", b"56789")),
    ):
        connection = Pieces(data + NEXT)
        body = RequestBody(head(line), connection, 5)
        assert body.read(0) == b"" and not body.at_end
        assert (body.read(2), body.read(2), body.read(3)) == (b"01", b"23", b"456")
        assert not body.at_end and body.read1() == b"789"
        assert (body.read(), body.read(5)) == (b"", b"")
        assert body.ended and connection.unread == NEXT


@contextlib.contextmanager
def connection(*lines: str, timeout: float = 5, version: str = "HTTP/1.1"):
    """A body that arrives over a real connection, and the client's end of that."""
    ours, theirs = socket.socketpair()
    client = gevent.socket.socket(fileno=theirs.detach())
    with contextlib.closing(Connection(ours)) as ours, client, gevent.Timeout(10):
        yield RequestBody(head(*lines, version=version), ours, timeout), client


def test_read1_returns_what_has_arrived_instead_of_waiting_for_more():
    for framing in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        with connection(framing) as (body, client):
            client.sendall(b"hello" if body.content_length else b"64\r\nhello")
            assert body.read1() == b"hello"
            client.sendall(b", ")
            assert body.read1() == b", "
            waiting = gevent.spawn(body.read1)
            gevent.sleep()
            assert not waiting.ready()
            client.sendall(b"world")
            assert waiting.get() == b"world"


def test_a_chunk_is_returned_before_the_next_one_begins():
    with connection("Transfer-Encoding: chunked") as (body, client):
        # The read does not wait for the chunk's line end.
        client.sendall(b"5\r\nhello\r")
        assert body.read1() == b"hello"
        client.sendall(b"\n0\r\n")
        end = gevent.spawn(body.read1)
        gevent.sleep()
        assert not end.ready() and not body.ended
        client.sendall(b"\r\n")
        assert end.get() == b"" and body.ended


def test_a_body_may_arrive_byte_by_byte():
    data = in_chunks(b"hello", b"x" * 20)
    for lines, sent in (
        ("Content-Length: 25", b"hello" + b"x" * 20),
        ("Transfer-Encoding: chunked", data),
    ):
        with connection(lines) as (body, client):

            def send() -> None:
                for at in range(len(sent)):
                    client.sendall(sent[at : at + 1])
                    gevent.sleep()

            sender = gevent.spawn(send)
            assert whole(body) == b"hello" + b"x" * 20
            sender.join()


def test_a_reset_raises_client_gone():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours = Connection(listener.accept()[0])
    client.sendall(b"5\r\nhel")
    with contextlib.closing(ours), gevent.Timeout(10):
        body = RequestBody(head("Transfer-Encoding: chunked"), ours, 5)
        assert body.read1() == b"hel"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(errors.ClientGone):
            body.read1()


def test_a_dead_path_raises_client_gone_instead_of_a_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours = Connection(listener.accept()[0])
    with client, contextlib.closing(ours), gevent.Timeout(10):
        body = RequestBody(head("Content-Length: 100"), ours, 5)
        ours.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        # The client reads nothing, so the send buffer fills up and TCP gives up.
        while ours.send(bytes(1 << 20)):
            pass
        with pytest.raises(errors.ClientGone):
            body.read1()


def test_the_timeout_restarts_with_each_read():
    with connection("Content-Length: 100", timeout=0.1) as (body, client):
        began = time.monotonic()
        for _ in range(4):
            gevent.sleep(0.05)
            client.sendall(b"x")
            assert body.read1() == b"x"
        assert time.monotonic() - began > 0.1
        with pytest.raises(errors.ClientTimeout, match="no byte .* came for 0.1 s") as caught:
            body.read1()
        assert time.monotonic() - began < 1 and not body.ended
    assert caught.value.rendered()[0] == "408 Request Timeout"
    assert ("x-should-retry", "false") in caught.value.rendered()[1]


def test_bytes_that_are_no_content_do_not_extend_the_timeout():
    with connection("Transfer-Encoding: chunked", timeout=0.1) as (body, client):

        def dribble() -> None:
            while True:
                client.sendall(b"0")
                gevent.sleep(0.02)

        dribbling = gevent.spawn(dribble)
        with pytest.raises(errors.ClientTimeout):
            body.read1()
        dribbling.kill()


# Expect: 100-continue


@pytest.mark.parametrize(
    "framing, sent",
    [("Content-Length: 5", b"hello"), ("Transfer-Encoding: chunked", in_chunks(b"hello"))],
)
def test_100_continue_is_sent_once_when_the_body_is_first_read(framing, sent):
    with connection(framing, "Expect: 100-Continue") as (body, client):
        gevent.sleep()
        assert select.select([client], [], [], 0)[0] == []
        reading = gevent.spawn(body.read)
        assert client.recv(100) == CONTINUE
        client.sendall(sent)
        assert reading.get() == b"hello"
        # 100 Continue is sent once.
        assert select.select([client], [], [], 0)[0] == []


@pytest.mark.parametrize(
    "lines, version",
    [
        (("Content-Length: 5",), "HTTP/1.1"),
        # HTTP/1.0 has no status 100.
        (("Content-Length: 5", "Expect: 100-continue"), "HTTP/1.0"),
        (("Content-Length: 0", "Expect: 100-continue"), "HTTP/1.1"),
        (("Expect: 100-continue",), "HTTP/1.1"),
        (("Content-Length: 5", "Expect: something-else"), "HTTP/1.1"),
    ],
)
def test_other_requests_get_no_100_continue(lines, version):
    with connection(*lines, version=version) as (body, client):
        client.sendall(b"hello")
        body.read()
        assert select.select([client], [], [], 0)[0] == []


def test_a_client_that_closes_instead_of_continuing_raises_client_gone():
    with connection("Content-Length: 5", "Expect: 100-continue") as (body, client):
        client.close()
        with pytest.raises(errors.ClientGone):
            body.read1()


# the copy for a replay


def kept(body: RequestBody, limit: int, memory: MemoryBudget) -> RequestBody:
    body.keep(limit, memory)
    return body


def replay(body: RequestBody) -> Iterator[bytes]:
    """Rewind the body and yield its parts."""
    body.rewind()
    while not body.at_end:
        yield body.read1()


def test_a_body_can_be_replayed_from_the_start():
    for source in (sized(b"hello world"), chunked(*one_by_one(b"hello", b" ", b"world"))):
        memory = MemoryBudget(MANY)
        body = kept(source, MANY, memory)
        for _ in range(3):
            assert b"".join(replay(body)) == b"hello world"
        assert body.replayable and body.at_end and memory.used == 11


def test_a_partly_read_body_is_replayed_in_full():
    body = kept(chunked(*one_by_one(b"one ", b"two ", b"three")), MANY, MemoryBudget(MANY))
    first = replay(body)
    assert (next(first), next(first)) == (b"one ", b"two ")
    assert not body.at_end
    assert b"".join(replay(body)) == b"one two three"
    assert b"".join(replay(body)) == b"one two three"


def test_a_long_body_is_replayed_in_pieces():
    data = bytes(range(256)) * 1000
    body = kept(sized(data), MANY, MemoryBudget(MANY))
    assert b"".join(replay(body)) == data
    pieces = list(replay(body))
    assert b"".join(pieces) == data and max(map(len, pieces)) <= READ


@pytest.mark.parametrize("limit, replayable", [(10, False), (11, True), (12, True)])
def test_a_body_is_kept_up_to_the_replay_limit(limit, replayable):
    for source in (
        sized(b"hello world"),
        chunked(*one_by_one(b"hello world")),
        chunked(*one_by_one(b"hello", b" world")),
        chunked(*one_by_one(*[b"x"] * 11)),
    ):
        memory = MemoryBudget(MANY)
        body = kept(source, limit, memory)
        # The body is forwarded in any case.
        assert len(b"".join(replay(body))) == 11 and body.at_end
        assert body.replayable is replayable
        assert memory.used == (11 if replayable else 0)


def test_a_body_whose_length_exceeds_the_limit_is_never_kept():
    memory = MemoryBudget(MANY)
    body = kept(sized(b"hello world"), 10, memory)
    assert not body.replayable
    assert next(replay(body)) == b"hello world" and memory.used == 0


def test_an_absent_body_can_always_be_replayed():
    body = kept(RequestBody(head(), Pieces(b""), 5), 0, MemoryBudget(0))
    assert body.replayable and list(replay(body)) == [] and body.replayable


def test_all_copies_share_the_replay_memory():
    memory = MemoryBudget(10)
    bodies = []
    for size, replayable, used in ((6, True, 6), (5, False, 6), (4, True, 10), (1, False, 10)):
        bodies.append(kept(chunked(*one_by_one(b"x" * size)), MANY, memory))
        # A body that does not fit is streamed.
        assert len(b"".join(replay(bodies[-1]))) == size and bodies[-1].at_end
        assert (bodies[-1].replayable, memory.used) == (replayable, used)
    bodies[0].forget()
    assert memory.used == 4
    again = kept(sized(b"x" * 6), MANY, memory)
    assert b"".join(replay(again)) == b"x" * 6 and again.replayable and memory.used == 10


def test_a_copy_that_outgrows_the_memory_is_freed():
    memory = MemoryBudget(10)
    body = kept(chunked(*one_by_one(b"x" * 6, b"y" * 5, b"z")), MANY, memory)
    sent = replay(body)
    next(sent)
    assert memory.used == 6 and body.replayable
    next(sent)
    assert memory.used == 0 and not body.replayable
    assert next(sent) == b"z" and memory.used == 0


def test_forget_frees_the_copy_once():
    memory = MemoryBudget(100)
    # Another request uses this memory.
    memory.take(50)
    body = kept(chunked(*one_by_one(b"hello", b" ", b"world")), MANY, memory)
    sent = replay(body)
    next(sent)
    assert memory.used == 55
    for _ in range(2):
        body.forget()
        assert memory.used == 50 and not body.replayable
    # The rest is forwarded, but not kept.
    assert b"".join(sent) == b" world"
    assert memory.used == 50


def test_a_copy_of_tiny_chunks_takes_little_more_memory_than_its_bytes():
    """Chunks of two bytes, as objects of their own, would take 28 times that."""
    pieces = one_by_one(*[b"xy"] * 10000)
    body = kept(chunked(*pieces), MANY, MemoryBudget(MANY))
    tracemalloc.start()
    try:
        for _ in replay(body):
            pass
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert body.replayable and taken < 2 * 20000


# a body that arrived with its head


def received_body(data: bytes, *lines: str) -> tuple[RequestBody, Pieces]:
    connection = Pieces(data)
    return RequestBody(head(*lines), connection, 5), connection


def test_a_body_that_arrived_with_its_head_needs_no_read():
    body, connection = received_body(b"hello" + NEXT, "Content-Length: 5")
    assert (body.ended, body.has_come, body.content_length) == (True, True, 5)
    assert connection.unread == NEXT
    assert (body.read(2), body.read(), body.read1()) == (b"he", b"llo", b"")


@pytest.mark.parametrize(
    "lines, data",
    [(["Content-Length: 5"], b"hell"), (["Transfer-Encoding: chunked"], in_chunks(b"hello"))],
)
def test_any_other_body_is_left_unread(lines, data):
    body, connection = received_body(data, *lines)
    assert not body.ended and connection.unread == data


def test_an_absent_body_is_complete():
    for lines, length in (([], None), (["Content-Length: 0"], 0)):
        body, connection = received_body(NEXT, *lines)
        assert (body.ended, body.has_come, body.content_length, connection.unread) == (
            True,
            False,
            length,
            NEXT,
        )
        for _ in range(2):
            body.keep(0, MemoryBudget(0))
            assert list(replay(body)) == [] and body.replayable
            body.forget()
        assert body.read1() == b""


@pytest.mark.parametrize("limit, size, replayable", [(5, 5, True), (4, 5, False), (5, 4, False)])
def test_a_complete_body_is_kept_within_both_limits(limit, size, replayable):
    body, _ = received_body(b"hello", "Content-Length: 5")
    memory = MemoryBudget(size)
    body.keep(limit, memory)
    assert (body.replayable, memory.used) == (replayable, 5 if replayable else 0)
    for _ in range(2 if replayable else 1):
        body.rewind()
        assert body.has_come and list(replay(body)) == [b"hello"]
    for _ in range(2):
        body.forget()
        assert (body.replayable, memory.used) == (False, 0)
    assert list(replay(body)) == []
