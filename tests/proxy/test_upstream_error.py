"""The errors of protocol.md 5.5 and 5.9, and what else may come."""

from __future__ import annotations

import json

import pytest

from xaiproxy.proxy import upstream_error

SENTENCE = "The caller does not have permission to execute the specified operation"


@pytest.mark.parametrize(
    "text, code",
    [
        ('{"code":"invalid-argument","error":"Model x does not ..."}', "invalid-argument"),
        ('{"code":"400","error":"Argument not supported: logit_bias"}', "400"),
        ('{"code":429,"error":"Too many"}', "429"),
        (
            '{"code":429,"error":"Out. [WKE=personal-team-blocked:spending-limit]"}',
            "personal-team-blocked:spending-limit",
        ),
        (
            f'{{"code":"{SENTENCE}","error":"No. [WKE=unauthenticated:bad-credentials]"}}',
            "unauthenticated:bad-credentials",
        ),
        (
            '{"error":{"message":"m","type":"server_error","code":"resource-exhausted"}}',
            "resource-exhausted",
        ),
        ('{"error":{"message":"m","type":"server_error","code":null}}', "server_error"),
        ('{"type":"error","error":{"type":"overloaded_error","message":"m"}}', "overloaded_error"),
        ('{"error":"text"}', "upstream_418"),
        ('"a bare string"', "upstream_418"),
        ("<html>not json</html>", "upstream_418"),
        ("", "upstream_418"),
        ('{"code":true,"error":false}', "upstream_418"),
        ('{"code":{"a":[]},"error":[1]}', "upstream_418"),
        ("[" * 100_000, "upstream_418"),
        ('{"code":"' + "x" * 500 + '"}', "x" * 80),
    ],
    ids=lambda value: value[:30],
)
def test_code(text: str, code: str) -> None:
    assert upstream_error.of(text, 418)[0] == code


@pytest.mark.parametrize(
    "code, reason",
    [
        ("unauthenticated:bad-credentials", "upstream refused the access token"),
        (
            "personal-team-blocked:spending-limit",
            "the account has no credits, or no subscription that covers this",
        ),
        (
            "Some resource has been exhausted",
            "a rate limit or the capacity of upstream is exceeded",
        ),
        ("subscription:free-usage-exhausted", "the included usage is used up"),
        ("permission-denied", "the account may not do this"),
        ("invalid-argument", "upstream responded 400"),
    ],
)
def test_reason(code: str, reason: str) -> None:
    assert upstream_error.of(json.dumps({"code": code}), 400) == (code, reason)


@pytest.mark.parametrize(
    "end, code",
    [
        (b'event: error\ndata: {"sequence_number":0,"type":"error","code":null,"message":"The model is currently at capacity","param":null}\n\n', "upstream_error_event"),
        (b'data: {"error":{"message":"at capacity","type":"server_error","code":"resource-exhausted"}}\n\n', "resource-exhausted"),
        (b'data: {"error":{"code":"a"}}\r\n\r\ndata: [DONE]\r\n\r\n', "a"),
        (b'data: {"code":"The service is currently unavailable","error":"Service temporarily unavailable."}\n\n', "The service is currently unavailable"),
        (b'data: {"type":"response.failed","response":{"status":"failed","error":{"code":"server_error","message":"m"}}}\n\n', "server_error"),
        (b'data: {"type":"response.completed","response":{"error":null,"usage":{}}}\n\n', None),
        (b'data: {"choices":[{"delta":{"content":"say \\"error\\": {"}}]}\n\n', None),
        (b'data: {"type":"tool","name":"x","error":{\n\n', None),
        (b"data: [DONE]\n\n", None),
        (b"", None),
        (b'"error":{ data: [1]\n"error":{\ndata: "x"', None),
    ],
)  # fmt: skip
def test_error_that_ends_a_stream(end: bytes, code: str | None) -> None:
    found = upstream_error.in_stream(end)
    assert (found and found[0]) == code


def test_an_error_in_the_middle_of_a_cut_line_is_not_read() -> None:
    assert upstream_error.in_stream(b'...se","error":{"code":"a"}}\n\n') is None
