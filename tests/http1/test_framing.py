"""The framing of bodies, whose bytes may be split anywhere; ambiguous framing is refused."""

import copy

import pytest

from xaiproxy.http1.framing import LINE_LIMIT, TRAILER_LIMIT, Chunked, Sized, UntilClose, content_of
from xaiproxy.http1.message_head import Malformed

NEXT = b"GET /the-next-request HTTP/1.1\r\n"


def feed(
    body: Sized | Chunked | UntilClose, data: bytes, size: int = 1 << 30
) -> tuple[bytes, bytes]:
    """Feed `size` bytes of `data` at a time. Return the content and the bytes after the body."""
    content, at = b"", 0
    while at < len(data) and not body.ended:
        part = data[at : at + size]
        content += b"".join(content_of(body, part))
        assert 0 <= body.used <= len(part) and (body.ended or body.used == len(part))
        at += body.used
    return content, data[at:]


def in_chunks(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


# by length


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_sized_body_ends_after_its_length(size):
    body = Sized(5)
    assert not body.ended
    assert feed(body, b"hello" + NEXT, size) == (b"hello", NEXT) and body.ended


def test_an_empty_body_has_ended_before_any_bytes_arrive():
    body = Sized(0)
    assert body.ended
    assert body.feed(NEXT) == [(0, 0)] and body.used == 0


def test_the_content_is_returned_as_one_span():
    # Callers check for this span, which is all of the data, to avoid a copy.
    assert Sized(5).feed(b"hello") == [(0, 5)]
    assert UntilClose().feed(b"hello") == [(0, 5)]


# until the connection ends


def test_a_body_until_close_ends_with_the_connection():
    body = UntilClose()
    assert feed(body, b"hello", 2) == (b"hello", b"") and not body.ended
    body.end_of_connection()
    assert body.ended


@pytest.mark.parametrize(
    "body, data",
    [(Sized(5), b"hell"), (Chunked(), b""), (Chunked(), b"5\r\nhello\r\n"), (Chunked(), b"0\r\n")],
)
def test_every_other_body_is_truncated_by_the_end_of_the_connection(body, data):
    body.feed(data)
    with pytest.raises(EOFError):
        body.end_of_connection()
    assert not body.ended


# in chunks

GOOD = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"1\r\nh\r\n4\r\nello\r\n000\r\n\r\n", b"hello"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    (b"000000000000005\r\nhello\r\n000000000000000\r\n\r\n", b"hello"),
    (b"5;a\r\nhello\r\n0;b=c\r\n\r\n", b"hello"),
    (b'5 ; a = "b;c\\"d"\te=f\r\nhello\r\n0\t;\r\n\r\n', b"hello"),
    (b"5;\xe9\xff\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5;" + b"a" * (LINE_LIMIT - 4) + b"\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    (b"0\r\nTrailer: x\r\nEmpty:\r\nx-two: \xe9 \t\r\n\r\n", b""),
    (b"0\r\n" + b"X: y\r\n" * TRAILER_LIMIT + b"\r\n", b""),
    (b"0\r\nX: " + b"y" * (LINE_LIMIT - 5) + b"\r\n\r\n", b""),
    (in_chunks(b"x" * 70000, b"y"), b"x" * 70000 + b"y"),
]
BAD_SIZES = [
    b"+1\r\n",
    b"-1\r\n",
    b"-0\r\n",
    b"1_0\r\n",
    b"0x1\r\n",
    b"0X1\r\n",
    b" 1\r\n",
    b"\t1\r\n",
    b"1 \r\n",
    b"1\t\r\n",
    b"1 1\r\n",
    b"1,\r\n",
    b"1.0\r\n",
    b"1h\r\n",
    b"g\r\n",
    b"\r\n",
    b" \r\n",
    b";a\r\n",
    b" ;a\r\n",
    b'"1"\r\n',
    b"0000000000000001\r\n",
    b"10000000000000001\r\n",
    b"ffffffffffffffff\r\n",
    b"f" * 400 + b"\r\n",
    b"1\n",
    b"\n1\r\n",
    b"1\r\r\n",
    b"1\rx\r\n",
    b"1\r",
    b"1;a\n",
    b"1;\r\r\n",
    b"1;a\rb\r\n",
    b'1;a="\r"\r\n',
    b'1;a="\n"\r\n',
    b'1;a="\r\n"\r\n',
    b"1;\x00\r\n",
    b"1;\x0b\r\n",
    b"1;\x7f\r\n",
    b"1\x00\r\n",
    b"1\x0b\r\n",
    b"\xd9\xa1\r\n",
    b"\xb9\r\n",
    b"1\xa0\r\n",
    b"\xef\xbb\xbf1\r\n",
]
BAD_ENDS = [b"\n", b"\r0", b"\n\r\n", b"0\r\n\r\n", b"x\r\n", b"\r\r\n", b"  ", b"5\r\nhello\r\n"]
BAD_TRAILERS = [
    b"X\r\n",
    b" X: y\r\n",
    b"X : y\r\n",
    b": y\r\n",
    b"X: y\n",
    b"X: y\r\n folded\r\n",
    b"X: y\rZ: a\r\n",
    b"X: \ry\n",
    b"X: \x00\r\n",
    b"\n",
    b"\r\r\n",
    b"X: y\r\n\n",
    b"GET / HTTP/1.1\r\n",
    b"X\xe9: y\r\n",
    b"Content-Length: 0\r\n",
    b"X: y\r\ntransfer-encoding: chunked\r\n",
    b"X: y\r\n" * (TRAILER_LIMIT + 1),
    b"X: " + b"a" * 4000 + b"\x00\r\n",
]
# Two bytes precede it, and a line end follows.
TOO_LONG = b"a" * (LINE_LIMIT - 3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 30])
def test_a_chunked_body_ends_with_its_last_chunk_and_trailers(size):
    for data, content in GOOD:
        body = Chunked()
        assert feed(body, data + NEXT, size) == (content, NEXT) and body.ended


@pytest.mark.parametrize("data", [data for data, _ in GOOD if len(data) < 100])
def test_a_chunked_body_may_be_split_anywhere(data):
    whole = feed(Chunked(), data + NEXT)
    for at in range(1, len(data) + 2):
        body = Chunked()
        first, after = feed(body, data[:at])
        second, rest = feed(body, data[at:] + NEXT)
        assert body.ended and (first + second, after + rest) == whole


def refusals(data: bytes) -> set[str]:
    """Return the error messages for `data`, split in several ways."""
    messages = set()
    for size in (1, 2, 1 << 30):
        body = Chunked()
        with pytest.raises(Malformed) as caught:
            feed(body, data, size)
        assert not body.ended
        messages.add(str(caught.value))
    return messages


@pytest.mark.parametrize("size_line", BAD_SIZES)
def test_an_ambiguous_chunk_size_is_refused(size_line):
    for before in (b"", b"5\r\nhello\r\n"):
        messages = refusals(before + size_line + b"x" * 20 + b"\r\n0\r\n\r\n")
        assert messages == {"has a chunk size that is malformed"}


@pytest.mark.parametrize("after", BAD_ENDS)
def test_a_chunk_that_is_longer_than_its_size_is_refused(after):
    assert refusals(b"5\r\nhello" + after + b"\r\n0\r\n\r\n") == {
        "has a chunk that is longer than announced"
    }


@pytest.mark.parametrize("trailers", BAD_TRAILERS)
def test_ambiguous_trailers_are_refused(trailers):
    assert refusals(b"5\r\nhello\r\n0\r\n" + trailers + b"\r\n") == {
        "has trailers that are malformed"
    }


@pytest.mark.parametrize(
    "data",
    [
        b"1;" + TOO_LONG + b"\r\n",
        b"0" * (LINE_LIMIT + 1),
        b"0\r\nX:" + TOO_LONG + b"\r\n",
        b"0\r\n" + b"a" * (LINE_LIMIT + 1),
    ],
)
def test_a_line_beyond_its_limit_is_refused(data):
    assert refusals(data) == {"has a line that is too long"}


def test_a_chunked_body_has_not_ended_before_its_last_byte():
    data = b'3\r\nabc\r\n0a;x="y"\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n'
    for size in range(len(data)):
        body = Chunked()
        content, _ = feed(body, data[:size])
        assert not body.ended and b"abc0123456789".startswith(content)


def test_the_content_of_a_chunk_is_returned_before_its_line_end():
    assert Chunked().feed(b"5\r\nhel") == [(3, 6)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 30])
@pytest.mark.parametrize(
    "trailers, passed",
    [
        (b"", b""),
        (b"X: y\r\n", b"X: y\r\n"),
        (b"Set-Cookie: a\r\nX: y\r\nSET-cookie:b\r\n", b"X: y\r\n"),
        (b"set-cookie:\r\n", b""),
        (
            b"Connection: x\r\nx: \xe9\r\nAlt-Svc: y\r\nStrict-Transport-Security: z\r\n",
            b"x: \xe9\r\n",
        ),
    ],
)
def test_trailers_that_must_not_pass_are_removed(size, trailers, passed):
    start = b"5;a\r\nhello\r\n000A\r\n0123456789\r\n00;b\r\n"
    data, body, out = start + trailers + b"\r\n" + NEXT, Chunked(), b""
    while not body.ended:
        body.feed(data[:size])
        out += data[: body.passes] + body.trailers
        data = data[body.used :]
    assert out == start + passed + b"\r\n" and data == NEXT


def test_a_body_without_chunks_passes_up_to_its_end():
    for body, passes in ((Sized(3), 3), (Sized(9), 5), (UntilClose(), 5)):
        body.feed(b"hello")
        assert (body.passes, body.trailers) == (passes, b"")


def test_feeding_a_copy_leaves_the_body_unchanged():
    body = Chunked()
    body.feed(b"5\r\nhe")
    assert feed(copy.copy(body), b"llo\r\n0\r\n\r\n" + NEXT) == (b"llo", NEXT)
    assert not body.ended
    assert feed(body, b"LLO\r\n0\r\n\r\n" + NEXT) == (b"LLO", NEXT)


def test_a_chunk_of_the_largest_size_is_returned_as_it_arrives():
    body = Chunked()
    body.feed(b"fffffffffffffff\r\n")
    for _ in range(100):
        assert body.feed(b"x" * 65536) == [(0, 65536)]
    assert not body.ended


@pytest.mark.parametrize(
    "malformed", [b"x\r\n", b"5\nhello\r\n", b"5\r\nhello!\r\n", b"0\r\nX\r\n\r\n"]
)
def test_the_content_before_a_malformed_chunk_is_returned(malformed):
    """One read may hold five complete chunks and a malformed one."""
    data = b"".join(b"1\r\n%d\r\n" % number for number in range(5)) + malformed
    body, content = Chunked(), b""
    with pytest.raises(Malformed):
        for part in content_of(body, data):
            content += part
    assert content.startswith(b"01234") and not body.ended
    whole = Chunked()
    spans = whole.feed(data)
    # This part is forwarded before the error.
    assert b"".join(data[start:end] for start, end in spans) == content
    assert data[: whole.used].endswith((b"4\r\n", b"hello", b"0\r\n"))
    with pytest.raises(Malformed):
        whole.feed(data[whole.used :])
