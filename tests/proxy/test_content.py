"""Content that was kept while it passed, decoded, also if it was cut or is hostile."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable

import pytest

from xaiproxy.http1 import response_head
from xaiproxy.http1.sample import END, START, Sample
from xaiproxy.proxy import content


def head(*codings: str) -> response_head.Head:
    return response_head.Head(200, "", "", {"content-encoding": list(codings)} if codings else {})


def kept(data: bytes) -> Sample:
    sample = Sample()
    sample.add(data)
    return sample


def raw_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(data) + encoder.flush()


@pytest.mark.parametrize(
    "fields, names",
    [
        ((), []),
        (("identity",), []),
        ((" GZip ",), ["gzip"]),
        (("identity, gzip", "br"), ["gzip", "br"]),
        ((",",), []),
    ],
)
def test_the_codings_of_a_response(fields: tuple[str, ...], names: list[str]) -> None:
    assert content.codings(head(*fields)) == names


def test_plain_content_is_returned_as_it_is() -> None:
    assert content.taken(head(), kept(b"\xff plain")) == b"\xff plain"
    assert content.taken(head("identity"), kept(b"")) == b""


@pytest.mark.parametrize(
    "coding, encode", [("gzip", gzip.compress), ("deflate", zlib.compress), ("x-gzip", raw_deflate)]
)
def test_compressed_content_is_decoded(coding: str, encode: Callable[[bytes], bytes]) -> None:
    for data in (b"", b"hello", os.urandom(10_000), b"a" * 20_000):
        assert content.taken(head(coding), kept(encode(data))) == data


def test_nothing_is_no_compressed_content() -> None:
    """The response to HEAD, and one that was cut before its first byte."""
    assert content.taken(head("gzip"), kept(b"")) == b""


def test_content_of_any_length_near_a_step_is_decoded_to_its_end() -> None:
    for size in range(content.STEP - 300, content.STEP + 300):
        data = b"b" * size
        assert content.taken(head("gzip"), kept(gzip.compress(data))) == data


def test_what_came_before_a_cut_is_decoded() -> None:
    data = b"".join(b"line %d\n" % number for number in range(1000))
    encoder = zlib.compressobj(wbits=31)
    sent = encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH)
    assert content.taken(head("gzip"), kept(sent)) == data
    assert data.startswith(content.taken(head("gzip"), kept(sent[:-500])))


def test_of_long_content_start_and_end_are_returned() -> None:
    data = b"start" + bytes(1_000_000) + b"end"
    taken = content.taken(head("gzip"), kept(gzip.compress(data)), lambda: None)
    assert taken.startswith(b"start") and taken.endswith(b"end")
    assert START + END <= len(taken) < 30_000


@pytest.mark.parametrize("data", [b"not compressed", b"\xff" * 1000])
@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "gzip, br"])
def test_what_cannot_be_decoded(coding: str, data: bytes) -> None:
    with pytest.raises(content.Unreadable) as caught:
        content.taken(head(coding), kept(data))
    assert caught.value.reason == "compressed"


def test_damaged_content_is_unreadable() -> None:
    encoded = bytearray(gzip.compress(os.urandom(5000)))
    encoded[-3] ^= 1
    with pytest.raises(content.Unreadable) as caught:
        content.taken(head("gzip"), kept(bytes(encoded)))
    assert caught.value.reason == "compressed"


def test_a_sample_that_was_too_long_is_unreadable() -> None:
    sample = kept(b"x")
    sample.too_long = True
    with pytest.raises(content.Unreadable) as caught:
        content.taken(head(), sample)
    assert caught.value.reason == "too_long"


def test_a_bomb_is_given_up_after_the_limit() -> None:
    encoder = zlib.compressobj(9, wbits=31)
    bomb = b"".join(encoder.compress(bytes(1 << 20)) for _ in range(200)) + encoder.flush()
    assert len(bomb) < 300_000
    steps: list[int] = []
    with pytest.raises(content.Unreadable) as caught:
        content.inflated(bomb, lambda: steps.append(1))
    assert caught.value.reason == "too_long"
    assert len(steps) == content.DECODED_LIMIT // content.STEP


def test_without_a_pause_less_is_decoded() -> None:
    # In a request's path, where an error is read.
    with pytest.raises(content.Unreadable) as caught:
        content.taken(head("gzip"), kept(gzip.compress(bytes(20 << 20))[:20000]))
    assert caught.value.reason == "too_long"
    text = os.urandom(content.UNPAUSED_LIMIT // 2).hex().encode()
    assert content.inflated(gzip.compress(text)).end(END) == text[-END:]


def test_there_is_a_pause_after_each_step() -> None:
    steps: list[int] = []
    sample = kept(gzip.compress(os.urandom(content.STEP)))
    content.taken(head("gzip"), sample, lambda: steps.append(1))
    assert len(steps) >= 2
