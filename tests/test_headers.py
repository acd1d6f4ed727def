"""Which header fields pass: what is the hop's own stays behind, the rest goes as it came."""

import pytest

from xaiproxy import headers, response_head

OURS = [("Host", "api.x.ai"), ("User-Agent", "xaiproxy/1"), ("Authorization", "Bearer the-token")]
HOP_BY_HOP = ["Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"]


def to_upstream(*fields):
    """What is sent, but for the three fields of our own that must come first."""
    sent = headers.to_upstream(list(fields), host="api.x.ai", user_agent="xaiproxy/1",
                               access_token="the-token")
    assert sent[:3] == OURS
    assert not {name.lower() for name, _ in sent[3:]} & {"host", "user-agent", "authorization"}
    return sent[3:]


def accepted(*values) -> str:
    """The one Accept-Encoding that is sent for these."""
    sent = to_upstream(*(("accept-Encoding", value) for value in values))
    assert [name for name, _ in sent] == ["Accept-Encoding"]
    return sent[0][1]


def spellings(name):
    return name, name.lower(), name.upper(), name.swapcase()


# to upstream

def test_order_case_and_repetitions_are_kept_to_upstream():
    fields = [("x-B", "2"), ("Content-Type", "application/json; charset=\"é\""), ("x-a", "1"), ("X-b", ""),
              ("x-B", "2"), ("Accept", "text/event-stream"), ("Range", "bytes=0-"), ("If-None-Match", "*"),
              ("Origin", "http://a"), ("Idempotency-Key", "k"), ("Content-Encoding", "gzip"),
              ("Via", "1.1 x"), ("X-Grok-Conv-Id", "c")]
    assert to_upstream(*fields) == [*fields]


@pytest.mark.parametrize("name", [
    *HOP_BY_HOP, "Authorization", "X-Api-Key", "Cookie", "Host", "User-Agent", "Content-Length", "Expect",
    "Proxy-Authorization", "Proxy-Authenticate", "Proxy-", "Proxy-X", "Forwarded", "X-Forwarded-For",
    "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-", "X-Forwarded-Client-Cert"])
def test_what_is_the_hops_own_or_ours_or_secret_is_dropped(name):
    for spelling in spellings(name):
        assert to_upstream((spelling, "x"), ("X-One", "1"), (spelling, "y")) == [("X-One", "1")]


@pytest.mark.parametrize("name", [
    "X-Authorization", "Authorization-X", "Cookie2", "Proxy", "X-Proxy-A", "X-Forwarded", "Forwarded-For",
    "X-Host", "X-Api-Key-Id", "Te-X", "Set-Cookie", "Connection-X"])
def test_names_that_only_look_like_those_pass(name):
    assert to_upstream((name, "x")) == [(name, "x")]


@pytest.mark.parametrize("value", ["x-one", "X-ONE", " x-one ", "close, x-One", "x-one,close", ",,\tx-one ,",
                                   "\"x-one\", x-one"])
def test_those_that_connection_names_are_dropped(value):
    sent = to_upstream(("X-One", "1"), ("Connection", value), ("x-one", "2"), ("X-Two", "3"))
    assert sent == [("X-Two", "3")]


def test_several_connection_headers_name_more():
    sent = to_upstream(("connection", "a"), ("A", "1"), ("B", "2"), ("CONNECTION", "b"), ("C", "3"))
    assert sent == [("C", "3")]


def test_connection_cannot_take_away_what_we_set():
    named = "authorization, host, user-agent, content-length, connection"
    assert to_upstream(("Connection", named)) == []


def test_connection_can_take_away_what_the_client_sent():
    named = "content-type, accept-encoding"
    sent = to_upstream(("Connection", named), ("Content-Type", "a"), ("Accept-Encoding", "gzip"))
    assert sent == []


@pytest.mark.parametrize("value, reduced", [
    ("gzip, deflate, br, zstd", "gzip, deflate"),
    ("gzip", "gzip"), ("deflate", "deflate"), ("identity", "identity"), ("GZip", "GZip"),
    ("br", "identity"), ("br, zstd", "identity"), ("*", "identity"), ("", "identity"), (" , ,", "identity"),
    ("br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip;q=0.8"),
    ("gzip;q=0", "gzip;q=0"), ("gzip;q=0, *;q=0", "gzip;q=0"), ("identity;q=0, br", "identity;q=0"),
    ("gzip ; q=0.5,deflate; q=0.4", "gzip ; q=0.5, deflate; q=0.4"),
    ("br,gzip,zstd,deflate,compress,x-gzip,identity", "gzip, deflate, identity"),
    ("xgzip, gzipx, gzip-x", "identity"), ("gzip br", "identity"),
])
def test_accept_encoding_is_reduced_to_what_an_error_can_be_read_in(value, reduced):
    assert accepted(value) == reduced


def test_several_accept_encodings_become_one():
    assert accepted("br", "gzip;q=0.5", "deflate") == "gzip;q=0.5, deflate"


def test_a_client_that_sends_no_accept_encoding_asks_for_none():
    assert to_upstream() == []


def test_nothing_is_changed_in_place():
    fields = [("Connection", "x"), ("X", "1"), ("Accept-Encoding", "br")]
    before = list(fields)
    to_upstream(*fields)
    assert fields == before


# to the client

def to_client(*lines, length=None):
    """What is made of these lines by a head and the rule together."""
    data = "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""])
    head = response_head.parse(data.encode("latin-1"), "GET")
    first, *passed = headers.to_client(head.lines, head.values, length=length).split("\r\n")
    assert first == ""
    return passed


def test_order_case_and_repetitions_are_kept_to_the_client():
    lines = ["x-B: 2", "Content-Type:text/event-stream", "x-a: é\xff", "X-b:", "x-B: 2", "Content-Encoding: gzip",
             "date: Mon, 01 Jan 2024 00:00:00 GMT", "Server: cloudflare", "WWW-Authenticate: Bearer", "Vary: a",
             "vary: b", "Retry-After: 5", "ETag: W/\"a\"", "x-should-retry: true", "Access-Control-Allow-Origin: *",
             "User-Agent: x", "tab: a\tb "]
    assert to_client(*lines) == lines


@pytest.mark.parametrize("name", [*(name for name in HOP_BY_HOP if name != "Transfer-Encoding"), "Set-Cookie"])
def test_hop_by_hop_and_set_cookie_are_dropped(name):
    for spelling in spellings(name):
        assert to_client(f"{spelling}: x", "X-One: 1", f"{spelling}: y") == ["X-One: 1"]


@pytest.mark.parametrize("value", ["x-one", "close, X-ONE", " x-one\t, ", "keep-alive,,x-One", "(, x-one, )"])
def test_those_that_upstreams_connection_names_are_dropped(value):
    assert to_client("X-One: 1", f"Connection: {value}", "X-Two: 2", "x-one: 3", "x-one-more: 4") == [
        "X-Two: 2", "x-one-more: 4"]
    assert to_client("X-One: 1", "Connection: x-two", f"Connection: {value}", "X-Two: 2") == []


def test_connection_cannot_take_the_length_away():
    assert to_client("Connection: content-length, x", "X: y", "Content-Length: 5", length=5) == ["Content-Length: 5"]


def test_the_content_length_is_the_one_that_we_count_by():
    for spelling in spellings("Content-Length"):
        lines = ["A: 1", f"{spelling}: 5", "B: 2"]
        assert to_client(*lines, length=5) == lines
    assert to_client("Content-Length: 05", length=5) == ["Content-Length: 5"]
    assert to_client("Content-Length: 0", length=0) == ["Content-Length: 0"]


def test_a_repeated_content_length_goes_out_once():
    assert to_client("Content-Length: 5", "A: 1", "content-length: 5", length=5) == ["A: 1", "Content-Length: 5"]


def test_a_length_that_nobody_can_vouch_for_is_dropped():
    assert to_client("Transfer-Encoding: chunked", "Content-Length: 5", length=None) == []
    assert to_client("Content-Length: 5", length=None) == []


def test_no_length_is_made_up():
    assert to_client("A: 1", length=5) == ["A: 1"]
