"""The tokens that a response used, in the bytes that xAI sends, and in hostile ones."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from used_tokens import (
    CHAT,
    CHAT_STREAM,
    MESSAGE,
    MESSAGE_STREAM,
    RESPONSE,
    RESPONSE_STREAM,
)

from xaiproxy.http1 import response_head
from xaiproxy.http1.sample import END, START, WHOLE_LIMIT, Sample
from xaiproxy.proxy import usage
from xaiproxy.proxy.usage import Usage

IN_CHAT_STREAM = Usage("grok-3-mini", 12, 5, 291, 290)
IN_RESPONSE = Usage("grok-code-fast-1", 32, 6, 100, 90)
IN_MESSAGE = Usage("grok-4.5", 33, 20, 7, 0)


def head(media_type: str, status: int = 200, coding: str = "") -> response_head.Head:
    values = {"content-type": [media_type]}
    if coding:
        values["content-encoding"] = [coding]
    return response_head.Head(status, "", "", values)


JSON, STREAM = head("application/json"), head("Text/Event-Stream; charset=utf-8")


@pytest.mark.parametrize(
    "content, found",
    [
        (CHAT, Usage("grok-4.5", 502, 384, 14, 13)),
        (RESPONSE, IN_RESPONSE),
        (MESSAGE, IN_MESSAGE),
    ],
)
def test_a_json_response(content: bytes, found: Usage) -> None:
    assert usage.read(content, False) == found
    spaced = json.dumps(json.loads(content), indent=4).encode()
    assert usage.read(spaced, False) == found


@pytest.mark.parametrize(
    "content, found",
    [
        (CHAT_STREAM, IN_CHAT_STREAM),
        (RESPONSE_STREAM, IN_RESPONSE),
        (MESSAGE_STREAM, IN_MESSAGE),
    ],
)
@pytest.mark.parametrize("size", [0, START, END, 100_000])
def test_a_stream_of_any_length(content: bytes, found: Usage, size: int) -> None:
    event = b'data: {"delta":"\xe2\x82\xac and \\"usage\\":{\\"input_tokens\\":99}"}\n\n'
    sample = usage.sample_for("chat", STREAM)
    assert sample is not None
    data = content % (event * (size // len(event)))
    for start in range(0, len(data), 1000):
        sample.add(data[start : start + 1000])
    assert usage.read(sample.take(), True) == found


def test_a_chat_completion_whose_completion_tokens_include_the_reasoning() -> None:
    """OpenAI's, where the total is the sum of the two."""
    members = {
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "total_tokens": 30,
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    content = json.dumps({"model": "m", "usage": members}).encode()
    assert usage.read(content, False) == Usage("m", 10, 0, 20, 5)


def test_without_a_total_the_output_is_the_sum() -> None:
    members = {"prompt_tokens": 1, "completion_tokens": 2}
    content = json.dumps(
        {"usage": {**members, "completion_tokens_details": {"reasoning_tokens": 5}}}
    ).encode()
    assert usage.read(content, False) == Usage("unknown", 1, 0, 7, 5)


def test_a_stream_of_messages_that_was_cut_has_its_input() -> None:
    content = MESSAGE_STREAM.partition(b"%b")[0] + b'data: {"type":"content_block_delta"'
    assert usage.read(content, True) == Usage("grok-4.5", 33, 20, 1, 0, True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"data: [DONE]\n\n",
        b'{"usage":null}',
        b'{"usage":{}}',
        b'{"usage":{"input_tokens":',
        b'{"usage":{"input_tokens":"many"}}',
        b'{"usage":{"input_tokens":true}}',
        b'{"usage":{"input_tokens":1.5}}',
        b'{"usage":[{"input_tokens":1}]}',
        b'{"text":"\\"usage\\":{\\"input_tokens\\":1}"}',
        CHAT[:-400],
    ],
)
def test_no_usage(content: bytes) -> None:
    assert usage.read(content, False) is None
    assert usage.read(content, True) is None


def test_a_tools_argument_called_usage_is_none() -> None:
    schema = (
        b'"tools":[{"properties":{"usage":{"type":"object","input_tokens":{"type":"number"}}}}]'
    )
    for content in (RESPONSE[:-1] + b"," + schema + b"}", b"{" + schema + b"," + RESPONSE[1:]):
        assert usage.read(content, False) == IN_RESPONSE


def test_the_last_of_several_counts() -> None:
    chunk = b'data: {"model":"m","usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n'
    assert usage.read(chunk % (5, 1) + chunk % (5, 9), True) == Usage("m", 5, 0, 9, 0)


@pytest.mark.parametrize("number", ["-1", "1e3", str(1 << 40), "9" * 3000, "1e999"])
def test_what_is_no_number_of_tokens_counts_as_none(number: str) -> None:
    content = f'{{"model":"m","usage":{{"input_tokens":5,"output_tokens":{number}}}}}'.encode()
    assert usage.read(content, False) == Usage("m", 5, 0, 0, 0)


def test_a_model_that_is_no_text_or_too_long_is_unknown() -> None:
    for model in (b'"%b"' % (b"m" * 101), b"null", b'{"a":1}', b'""'):
        content = b'{"model":%b,"usage":{"input_tokens":5}}' % model
        found = usage.read(content, False)
        assert found is not None and found.model == "unknown"
    found = usage.read(b'{"model":"\xff","usage":{"input_tokens":5}}', False)
    assert found is not None and found.model == "\ufffd"


def test_the_model_is_found_after_a_long_content() -> None:
    content = b'{"content":"%b","model":"m","usage":{"input_tokens":5}}' % (b"x" * 900_000)
    found = usage.read(content, False)
    assert found is not None and found.model == "m"


HOSTILE = [
    b'"usage":{',
    b'"usage":{"input_tokens":[',
    b'"usage"',
    b'"usage":         ',
    b'{"a":' + b'"usage":{"input_tokens":{',
    b'"model":"',
    b'"model":"' + b"x" * 99,
    b"[",
    b'{"usage":',
    b"\xff\xfe",
    b'\\"usage\\":{',
]


@pytest.mark.parametrize("part", HOSTILE)
def test_a_mebibyte_of_anything_is_read_in_linear_time(part: bytes) -> None:
    """Twice as much takes about twice as long; if not, 8 times as much would take 64 times."""
    seconds = []
    for size in (WHOLE_LIMIT // 8, WHOLE_LIMIT):
        data = part * (size // len(part))
        tries = []
        for of_stream in (False, True, False, True):
            began_at = time.thread_time()
            assert usage.read(data, of_stream) is None
            tries.append(time.thread_time() - began_at)
        seconds.append(min(tries))
    assert seconds[1] < 0.05 and seconds[1] < max(24 * seconds[0], 0.01)


def test_deep_nesting_is_no_usage() -> None:
    for depth in (100, 1000, 100_000):
        content = b'{"usage":{"input_tokens":1,"x":' + b'{"a":' * depth
        assert usage.read(content, False) is None


@pytest.mark.parametrize(
    "route, answer, is_kept, is_whole",
    [
        ("chat", JSON, True, True),
        ("responses", STREAM, True, False),
        ("messages", head("text/event-stream", coding="gzip"), True, True),
        ("chat", head("text/event-stream", coding="identity"), True, False),
        ("models", JSON, False, False),
        ("models", head("application/json", 404), True, False),
        ("chat", head("text/plain", 500), True, False),
        ("chat", head("text/plain", 302), False, False),
        ("responses", head("", 101), False, False),
    ],
)
def test_what_is_kept(route: str, answer: Any, is_kept: bool, is_whole: bool) -> None:
    sample = usage.sample_for(route, answer)
    assert (sample is not None) == is_kept
    if sample is not None:
        sample.add(b"x" * 100_000)
        assert (len(sample.take()) == 100_000) == is_whole


def test_the_memory_of_all_samples_is_limited() -> None:
    samples: list[Sample] = []
    # Other tests may not have taken theirs.
    free = usage.MEMORY - usage._budget.used
    while not samples or not samples[-1].too_long:
        sample = usage.sample_for("chat", JSON)
        assert sample is not None
        sample.add(bytes(1_000_000))
        samples.append(sample)
    assert len(samples) == free // 1_000_000 + 1
    for sample in samples:
        sample.take()
    again = usage.sample_for("chat", JSON)
    assert again is not None
    again.add(b"x")
    assert not again.too_long and again.take() == b"x"


@pytest.mark.parametrize(
    "method, path, status, is_expected",
    [
        ("POST", "/v1/chat/completions", 200, True),
        ("POST", "/v1/responses", 200, True),
        ("POST", "/v1/responses/compact", 200, True),
        ("POST", "/v2/messages", 201, True),
        ("POST", "/v1/messages/count_tokens", 200, False),
        ("POST", "/v1/responses/input_tokens", 200, False),
        ("POST", "/v1/responses/resp_1/cancel", 200, False),
        ("GET", "/v1/responses/resp_1", 200, False),
        ("DELETE", "/v1/responses/resp_1", 200, False),
        ("HEAD", "/v1/chat/completions", 200, False),
        ("GET", "/v1/chat/deferred-completion/1", 200, True),
        ("GET", "/v1/chat/deferred-completion/1", 202, False),
    ],
)
def test_which_responses_should_have_a_usage(
    method: str, path: str, status: int, is_expected: bool
) -> None:
    assert usage.is_expected(method, path, status) == is_expected
