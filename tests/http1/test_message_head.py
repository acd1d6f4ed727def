"""The common parts of request and response heads: their end and their lines."""

import time

import pytest

from xaiproxy.http1 import message_head
from xaiproxy.http1.message_head import FIELD_LIMIT, Malformed, TooLong

LIMIT = 1000
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y\r\n\r\n"


def end(data: bytes, size: int = 1 << 30, limit: int = LIMIT) -> int:
    """Return the end of the head in `data`, which arrives `size` bytes at a time, or 0."""
    searched = 0
    for came in (*range(size, len(data), size), len(data)):
        if found := message_head.end(data[:came], searched, limit):
            return found
        searched = came
    return 0


def test_a_head_ends_with_its_empty_line_however_it_is_split():
    for rest in (b"", b"body", b"\r\n\r\n"):
        for size in (1, 2, 3, 4, 7, len(HEAD) - 1, len(HEAD), 1 << 30):
            assert end(HEAD + rest, size) == len(HEAD)


def test_an_incomplete_head_has_no_end():
    for size in range(len(HEAD)):
        assert end(HEAD[:size]) == 0


def test_searched_bytes_are_not_searched_again():
    assert message_head.end(HEAD + b"X: y", len(HEAD) + 4, LIMIT) == 0


@pytest.mark.parametrize(
    "data",
    [b"\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nX: y\n", b"GET\n\n", b"\r\n\n", b"X\n\r\n"],
)
def test_a_bare_lf_is_refused_at_once(data):
    for size in (1, 2, 1 << 30):
        with pytest.raises(Malformed, match="does not end with CRLF"):
            end(data, size)


def test_a_head_may_be_exactly_as_long_as_the_limit():
    head = b"X: " + b"y" * (LIMIT - 7) + b"\r\n\r\n"
    for size in (1, 100, 1 << 30):
        assert end(head, size) == LIMIT
        assert end(head + b"body" * LIMIT, size) == LIMIT
        for long in (b"y" + head, b"y" * (LIMIT + 1)):
            with pytest.raises(TooLong, match="1000 bytes"):
                end(long, size)
    assert end(b"y" * LIMIT) == 0
    # This error takes precedence, however many bytes arrive at once.
    with pytest.raises(Malformed, match="CRLF"):
        end(b"y" * LIMIT + b"\n")


def test_lines_are_latin_1_without_control_characters_except_a_tab():
    assert message_head.lines(b"a\tb\r\n\x80\xff\r\n \r\n\r\n") == ["a\tb", "\x80\xff", " "]
    for control in (*range(9), *range(10, 32), 127):
        for line in (b"%c", b"a%cb", b"a%c", b"%ca"):
            with pytest.raises(Malformed, match="control character"):
                message_head.lines(b"GET\r\n" + line % control + b"\r\n\r\n")


@pytest.mark.parametrize("rest", [b"y", b"y\r\n\r\n"])
def test_the_first_error_in_a_long_head_raises_however_it_is_split(rest):
    for size in (1, 100, LIMIT, 1 << 30):
        for before, kind in ((LIMIT, Malformed), (LIMIT + 1, TooLong)):
            with pytest.raises(Malformed) as raised:
                end(b"y" * before + b"\n" + LIMIT * b"y" + rest, size)
            assert raised.type is kind


def test_unicode_line_ends_do_not_end_a_line():
    assert message_head.lines(b"a\x85b\r\n\r\n") == ["a\x85b"]


def test_fields_are_returned_in_order_and_by_name():
    in_order, values = message_head.fields(
        ["B: 1", "a:2", "b: \t 3 4\t ", "C:", "A: :", "n: \xa05\x85"]
    )
    assert in_order == [
        ("B", "1"),
        ("a", "2"),
        ("b", "3 4"),
        ("C", ""),
        ("A", ":"),
        ("n", "\xa05\x85"),
    ]
    assert values == {"b": ["1", "3 4"], "a": ["2", ":"], "c": [""], "n": ["\xa05\x85"]}


@pytest.mark.parametrize(
    "line",
    [
        "",
        ":",
        ": y",
        "X",
        "X y",
        " X: y",
        "X : y",
        "X\t: y",
        "X Y: z",
        "\xe9: y",
        "X\xa0: y",
        "(X): y",
        "X/Y: z",
        "X,Y: z",
        '"X": y',
        "X=y",
    ],
)
def test_a_line_without_a_name_is_refused(line):
    # A refused line is not cached as a valid one.
    for _ in range(2):
        with pytest.raises(Malformed, match="Name: value"):
            message_head.fields(["A: b", line])


def test_long_lines_are_parsed_like_short_ones():
    for size in (250, 260, 60000):
        value = "v" * size
        assert message_head.fields(["X: " + value] * 2) == ([("X", value)] * 2, {"x": [value] * 2})


def test_200_fields_are_accepted_and_201_refused():
    assert len(message_head.fields(["X: y"] * FIELD_LIMIT)[0]) == FIELD_LIMIT == 200
    with pytest.raises(TooLong, match="200 header lines"):
        message_head.fields(["X: y"] * (FIELD_LIMIT + 1))


@pytest.mark.parametrize(
    "values, in_1_1, in_1_0",
    [
        ([], True, False),
        (["close"], False, False),
        (["CLOSE"], False, False),
        (["keep-alive"], True, True),
        (["Keep-Alive, close"], False, False),
        (["te", " x ,\tclose\t"], False, False),
        (["x,,keep-alive,"], True, True),
        (["close-not", "not close"], True, False),
        (["close\xa0", "keep-alive\x85"], True, False),
        ([""], True, False),
    ],
)
def test_connection_and_the_version_decide_on_keep_alive(values, in_1_1, in_1_0):
    fields = {"connection": values} if values else {}
    assert message_head.keep_alive(fields, is_1_0=False) is in_1_1
    assert message_head.keep_alive(fields, is_1_0=True) is in_1_0


@pytest.mark.parametrize(
    "scheme, authority, normal",
    [
        ("http", "LocalHost", "localhost"),
        ("http", "a:80", "a"),
        ("https", "a:443", "a"),
        ("http", "a:443", "a:443"),
        ("https", "a:80", "a:80"),
        ("http", "a:", "a"),
        ("http", "[::1]:80", "[::1]"),
        ("http", "[::1]", "[::1]"),
        ("http", "a::80", "a:"),
        ("http", "a:080", "a:080"),
        ("http", "a:8080", "a:8080"),
        ("http", "", ""),
        ("http", ":80", ""),
    ],
)
def test_an_authority_is_normalized(scheme, authority, normal):
    assert message_head.normal_authority(scheme, authority) == normal


def test_a_long_line_is_parsed_in_linear_time():
    for filling in ("a", " ", "a ", "\t", ": ", ":"):
        began = time.process_time()
        for line in (filling * 30000, "X: " + filling * 30000, "X" + filling * 30000 + "\x00"):
            try:
                message_head.fields([line])
                message_head.lines(line.encode() + b"\r\n\r\n")
            except Malformed:
                pass
        assert time.process_time() - began < 0.5
