"""The knobs of the sandbox, each with its effect."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import pathlib
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from sandbox import CHAT, CLIENT_ID, DEVICE_CODE, FORM, Sandbox, body, status, until

from xaiproxy.sandbox.knobs import KNOBS, SCRIPT

# Knobs


def test_every_knob_has_a_test() -> None:
    files = pathlib.Path(__file__).parent.glob("test_*.py")
    source = "".join(file.read_text() for file in files)
    assert [name for name in KNOBS if f"{name}=" not in source] == []
    assert [name for name in SCRIPT if f'"{name}": ' not in source] == []


@pytest.mark.parametrize(
    "knob, problem",
    [
        ({"nonsense": 1}, "there is no nonsense; there are "),
        ({"events": -1}, "events must be a whole number from 0"),
        ({"events": 1.5}, "events must be a whole number"),
        ({"events": True}, "not true"),
        ({"gzip": "some"}, "gzip must be "),
        ({"send_expires_in": 1}, "send_expires_in must be true or false, not 1"),
        ({"answers": {}}, "answers must be a list"),
        ({"answers": [{"status": 500}]}, "each with a path"),
        ({"answers": [{"path": "/", "x": 1}]}, "there is no x"),
        ({"answers": [{"path": "/", "error": "x"}]}, "error must be "),
        ({"answers": [{"path": "/", "status": 99}]}, "status must be "),
        ({"answers": [{"path": "/", "headers": {"a": "b\r\nc: d"}}]}, "headers must be "),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_knob_is_refused_and_changes_nothing(
    sandbox: Sandbox, knob: Any, problem: str
) -> None:
    before = sandbox.get("/_sandbox/knobs")
    sent = json.dumps({"keepalives": 9, **knob} if isinstance(knob, dict) else knob)
    refused, answer = sandbox.post("/_sandbox", sent)
    assert refused == 400 and problem in answer["error"]
    assert sandbox.get("/_sandbox/knobs") == before


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_web_page_can_neither_read_nor_set_knobs(sandbox: Sandbox, method: str) -> None:
    for field in (
        {"Origin": sandbox.url},
        {"Origin": "null"},
        {"Host": f"evil.example:{sandbox.port}"},
        {"Host": "evil.example"},
        {"Host": None},
    ):
        assert status(sandbox.raw(sandbox.head(f"{method} /_sandbox", **field))) == 403
    for host in (f"localhost:{sandbox.port}", "[::1]", "127.0.0.9"):
        assert status(sandbox.raw(sandbox.head("GET /_sandbox", Host=host))) == 200


def test_expires_in_can_be_absent(sandbox: Sandbox) -> None:
    sandbox.set(send_expires_in=False)
    login = sandbox.mint()
    assert (
        "expires_in" not in login and "expires_in" not in sandbox.refresh(login["refresh_token"])[1]
    )


def test_an_omitted_refresh_token_stays_valid(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    sandbox.set(send_refresh_token=False)
    for _ in range(2):
        accepted, tokens = sandbox.refresh(login["refresh_token"])
        assert accepted == 200 and "refresh_token" not in tokens


def test_a_former_refresh_token_is_accepted_within_the_grace(sandbox: Sandbox) -> None:
    sandbox.set(grace=1)
    login = sandbox.mint()
    begun = time.time()
    assert sandbox.refresh(login["refresh_token"])[0] == 200
    assert sandbox.refresh(login["refresh_token"])[0] == 200
    until(lambda: sandbox.refresh(login["refresh_token"])[0] == 400)
    assert time.time() > begun + 1 and sandbox.counters()["reuses"] == 1


def test_a_fresh_token_is_refused_at_first(sandbox: Sandbox) -> None:
    sandbox.set(refuse_fresh=2)
    login = sandbox.mint()
    assert [sandbox.get("/v1/me", login["access_token"])[0] for _ in range(3)] == [403, 403, 200]


def test_refusals_can_have_another_status_and_shape(sandbox: Sandbox) -> None:
    sandbox.set(dead_token_status=401, old_shape=True)
    assert sandbox.get("/v1/me", "x") == (
        401,
        {
            "code": "The caller does not have permission to execute the specified operation",
            "error": "The OAuth2 access token could not be validated. "
            "[WKE=unauthenticated:bad-credentials]",
        },
    )
    assert sandbox.get("/v1/me")[1]["error"].endswith("[WKE=unauthenticated:no-credentials]")


def test_the_knobs_of_billing(sandbox: Sandbox, token: str) -> None:
    sandbox.set(credit_usage_percent=99.5, prepaid_balance=2500, subscription_tier="SuperGrokPro")
    status, body = sandbox.get("/v1/billing?format=credits", token)
    config = body["config"]
    assert (status, body["subscriptionTier"]) == (200, "SuperGrokPro")
    assert (config["creditUsagePercent"], config["prepaidBalance"]) == (99.5, {"val": 2500})
    period = config["currentPeriod"]
    assert period.pop("type") == "USAGE_PERIOD_TYPE_WEEKLY"
    start, end = (datetime.datetime.fromisoformat(period[name]) for name in ("start", "end"))
    now = datetime.datetime.now(datetime.timezone.utc)
    assert start <= now < end and end - start == datetime.timedelta(days=7)
    # xAI omits a member that is 0.
    sandbox.set(credit_usage_percent=0)
    assert "creditUsagePercent" not in sandbox.get("/v1/billing", token)[1]["config"]
    assert sandbox.get("/v1/billing", "x")[0] == 403


def test_the_gzip_knob_chooses_which_responses_are_compressed(sandbox: Sandbox, token: str) -> None:
    for wanted, compressed in (
        ("none", [False, False]),
        ("refusals", [True, False]),
        ("all", [True, True]),
    ):
        sandbox.set(gzip=wanted)
        heads = [
            sandbox.head("GET /v1/me", Authorization=f"Bearer {key}", Accept_Encoding="gzip")
            for key in ("x", token)
        ]
        answers = [sandbox.raw(head) for head in heads]
        assert [b"\r\nContent-Encoding: gzip\r\n" in answer for answer in answers] == compressed


def test_a_compressed_stream_can_be_read_event_by_event(sandbox: Sandbox, token: str) -> None:
    sandbox.set(gzip="all", silence_after=1, events=3)
    with sandbox.streaming(sandbox.chat(token, Accept_Encoding="gzip")) as (_, answer):
        size = int(answer.readline(), 16)
        assert zlib.decompressobj(wbits=31).decompress(answer.read(size)).endswith(b"}\n\n")


def test_an_idle_connection_is_closed(sandbox: Sandbox) -> None:
    sandbox.set(idle_timeout=0.2)
    begun = time.monotonic()
    assert sandbox.raw() == b"" and time.monotonic() - begun > 0.15
    answer = sandbox.raw(sandbox.head("GET /oauth2/device", Connection="keep-alive"))
    assert status(answer) == 200


# Streams


def events(answer: bytes) -> list[bytes]:
    """The events of a streamed response, without its framing."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" in head:
        parts, rest = rest, b""
        while parts:
            size, _, parts = parts.partition(b"\r\n")
            rest, parts = rest + parts[: int(size, 16)], parts[int(size, 16) + 2 :]
    return rest.split(b"\n\n")[:-1]


def test_a_chat_stream_has_the_events_of_a_real_one(sandbox: Sandbox, token: str) -> None:
    sandbox.set(events=2, event_size=5, keepalives=2)
    first, second, *chunks, done = events(sandbox.raw(sandbox.chat(token)))
    assert (first, second, done) == (b": keepalive", b": keepalive", b"data: [DONE]")
    sent = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert [chunk["choices"][0]["delta"] for chunk in sent[:-1]] == [
        {"reasoning_content": "Hm.", "role": "assistant"},
        {"content": "This "},
        {"content": "is is"},
        {},
    ]
    assert (
        sent[-2]["choices"][0]["finish_reason"] == "stop"
        and "finish_reason" not in sent[0]["choices"][0]
    )
    assert sent[-1]["choices"] == [] and sent[-1]["usage"]["completion_tokens"] == 2


def test_a_responses_stream_has_the_events_of_a_real_one(sandbox: Sandbox, token: str) -> None:
    _, answer = sandbox.post(
        "/v1/responses", {"model": "grok-4.5", "input": "x", "stream": True}, token
    )
    sent = [json.loads(event.removeprefix(b"data: ")) for event in answer.split(b"\n\n")[:-1]]
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    assert (
        list(sent[0])[:2] == ["sequence_number", "type"] and sent[0]["type"] == "response.created"
    )
    assert sent[-1]["type"] == "response.completed" and "usage" in sent[-1]["response"]
    text = "".join(
        event["delta"] for event in sent if event["type"] == "response.output_text.delta"
    )
    assert text == sent[-1]["response"]["output"][1]["content"][0]["text"]
    kinds = [event["type"].removeprefix("response.") for event in sent]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_the_head_of_a_stream_is_sent_before_its_first_event(sandbox: Sandbox, token: str) -> None:
    sandbox.set(first_event_delay=60)
    with sandbox.streaming(sandbox.chat(token)):
        # The context manager has read the head.
        pass
    sandbox.set(first_event_delay=0.3)
    begun = time.monotonic()
    with sandbox.streaming(sandbox.chat(token)) as (_, answer):
        assert answer.readline() and time.monotonic() - begun > 0.3
        assert answer.read().endswith(b"0\r\n\r\n")


def test_events_are_sent_at_events_per_second(sandbox: Sandbox, token: str) -> None:
    sandbox.set(events_per_second=20, events=6)
    begun, times = time.monotonic(), []
    with sandbox.streaming(sandbox.chat(token)) as (_, answer):
        while size := int(answer.readline(), 16):
            answer.read(size + 2)
            times.append(time.monotonic() - begun)
    assert len(times) == 10 and times[-1] < 2
    assert all(at > count * 0.05 for count, at in enumerate(times))


@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_disconnects_in_silence_is_noticed(
    sandbox: Sandbox, token: str, half: bool
) -> None:
    sandbox.set(silence_after=2)
    with sandbox.streaming(sandbox.chat(token)) as (connection, answer):
        for _ in range(2):
            answer.read(int(answer.readline(), 16) + 2)
        seen = sandbox.counters()
        assert (seen["streams"], seen["open_streams"], seen["cancelled_streams"]) == (1, 1, 0)
        if half:
            connection.shutdown(socket.SHUT_WR)
            sandbox.wait(lambda seen: seen["cancelled_streams"] == 1, seconds=1)
    assert sandbox.wait(lambda seen: seen["cancelled_streams"] == 1, seconds=1)["open_streams"] == 0


def test_a_client_that_disconnects_between_events_is_noticed(sandbox: Sandbox, token: str) -> None:
    sandbox.set(events=100000, event_size=1000)
    with sandbox.streaming(sandbox.chat(token)) as (_, answer):
        answer.read(10000)
    sandbox.wait(
        lambda seen: (seen["cancelled_streams"], seen["open_streams"]) == (1, 0), seconds=1
    )


def test_a_client_that_disconnects_before_the_head_is_noticed(sandbox: Sandbox, token: str) -> None:
    sandbox.set(answers=[{"path": "/v1/*", "delay": 60}])
    with socket.create_connection(("127.0.0.1", sandbox.port)) as connection:
        connection.sendall(sandbox.chat(token))
        sandbox.wait(lambda seen: seen["requests"] == 1)
    seen = sandbox.wait(lambda seen: seen["cancelled_requests"] == 1, seconds=1)
    assert seen["streams"] == 0


def test_a_pipelined_request_neither_ends_a_stream_nor_uses_cpu(
    sandbox: Sandbox, token: str
) -> None:
    sandbox.set(silence_after=1, silence=0.6)
    with sandbox.streaming(sandbox.chat(token, Connection="keep-alive")) as (connection, answer):
        connection.sendall(sandbox.head("GET /v1/me", Authorization=f"Bearer {token}"))
        before = processor_seconds(sandbox)
        time.sleep(0.4)
        assert processor_seconds(sandbox) - before < 0.1
        rest = answer.read()
    assert rest.count(b"data: [DONE]") == 1 and b"HTTP/1.1 200 OK" in rest and b'"user_id"' in rest
    assert sandbox.counters()["cancelled_streams"] == 0


def processor_seconds(sandbox: Sandbox) -> float:
    fields = (
        pathlib.Path(f"/proc/{sandbox.process.pid}/stat").read_text().rpartition(")")[2].split()
    )
    # utime and stime.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "framing, mark",
    [
        ("chunked", b"Transfer-Encoding: chunked"),
        ("length", b"Content-Length: "),
        ("close", b"Connection: close"),
    ],
)
def test_a_stream_can_have_each_framing_and_be_cut(
    sandbox: Sandbox, token: str, framing: str, mark: bytes
) -> None:
    sandbox.set(framing=framing, events=3)
    whole = sandbox.raw(
        sandbox.chat(token, Connection="keep-alive" if framing == "close" else "close")
    )
    assert mark in whole.partition(b"\r\n\r\n")[0]
    assert [other in whole for other in (b"Transfer-Encoding", b"Content-Length")] == [
        framing == "chunked",
        framing == "length",
    ]
    assert events(whole)[-1] == b"data: [DONE]"
    sandbox.set(cut_after=2)
    cut = sandbox.raw(sandbox.chat(token))
    assert cut.count(b"data: ") == 3 and cut.count(b"\n\n") == 2
    assert not cut.endswith(b"0\r\n\r\n") and sandbox.counters()["cancelled_streams"] == 0


def test_a_stream_can_be_cut_by_a_reset(sandbox: Sandbox, token: str) -> None:
    sandbox.set(cut_after=1, cut="reset")
    with pytest.raises(ConnectionResetError):
        sandbox.raw(sandbox.chat(token))
    sandbox.wait(lambda seen: seen["open_streams"] == 0)


@pytest.mark.parametrize(
    "path, sent, frame",
    [
        (
            "/v1/chat/completions",
            CHAT,
            b'data: {"error":{"message":"The model is currently at capacity',
        ),
        (
            "/v1/responses",
            {"model": "grok-4.5", "input": "x", "stream": True},
            b'event: error\ndata: {"sequence_number":0,"type":"error","code":null,'
            b'"message":"The model is',
        ),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_stream_can_contain_a_capacity_error(
    sandbox: Sandbox, token: str, path: str, sent: dict[str, Any], frame: bytes, after: int
) -> None:
    sandbox.set(capacity_error_after=after)
    accepted, answer = sandbox.post(path, sent, token)
    parts = answer.split(b"\n\n")[:-1]
    assert accepted == 200 and len(parts) == after + 1 and parts[-1].startswith(frame)


# Scripted responses


def test_scripted_responses_come_in_order_and_as_often_as_set(sandbox: Sandbox, token: str) -> None:
    sandbox.set(
        answers=[
            {
                "path": "/oauth2/token",
                "grant_type": "refresh_token",
                "times": 2,
                "status": 429,
                "headers": {"Retry-After": "7"},
                "body": {"error": "x"},
            },
            {"path": "/v1/*", "method": "GET", "error": "spending_limit"},
        ]
    )
    answer = sandbox.raw(
        sandbox.head("POST /oauth2/token", Content_Type=FORM, Content_Length="24"),
        b"grant_type=refresh_token",
    )
    assert (
        status(answer) == 429
        and b"\r\nRetry-After: 7\r\n" in answer
        and body(answer) == {"error": "x"}
    )
    assert sandbox.token(DEVICE_CODE, device_code="x")[0] == 400
    assert [sandbox.refresh("x")[0] for _ in range(2)] == [429, 400]
    assert [sandbox.get("/v1/me", token)[0] for _ in range(3)] == [402] * 3
    assert sandbox.post("/v1/tts", {"text": "x"}, token)[0] == 200


def test_any_endpoint_can_send_html_or_nothing_or_given_bytes(
    sandbox: Sandbox,
) -> None:
    sandbox.set(
        answers=[
            {"path": "*", "times": 1, "error": "cloudflare_challenge"},
            {"path": "*", "times": 1, "status": 200},
            {"path": "*", "body": "\ufeffdata: x", "headers": {"Content-Type": "a/b"}},
        ]
    )
    challenged = sandbox.raw(sandbox.head("GET /anything"))
    assert (
        status(challenged) == 403 and b"text/html" in challenged and b"Just a moment" in challenged
    )
    assert sandbox.get("/anything") == (200, b"")
    assert sandbox.raw(sandbox.head("GET /anything")).endswith(b"\r\n\r\n\xef\xbb\xbfdata: x")


def test_a_response_can_be_lost_before_or_after_the_request_is_handled(sandbox: Sandbox) -> None:
    first = sandbox.mint()["refresh_token"]
    for process, spent in ((False, 0), (True, 1)):
        sandbox.set(
            answers=[{"path": "/oauth2/token", "times": 1, "cut": "close", "process": process}]
        )
        with pytest.raises(ConnectionError):
            sandbox.refresh(first)
        assert sandbox.counters()["refreshes"] == spent
    assert sandbox.refresh(first)[1]["error_description"] == "Refresh token has been revoked"
    sandbox.set(answers=[{"path": "/oauth2/token", "cut": "reset"}])
    with pytest.raises(ConnectionResetError):
        sandbox.refresh(first)


def test_a_response_can_be_delayed_after_the_token_is_spent(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    sandbox.set(
        answers=[
            {"path": "/oauth2/token", "times": 1, "delay": 60},
            {"path": "/oauth2/token", "delay": 0.3},
        ]
    )
    form = urlencode(
        {
            "grant_type": "refresh_token",
            "client_id": CLIENT_ID,
            "refresh_token": login["refresh_token"],
        }
    ).encode()
    with socket.create_connection(("127.0.0.1", sandbox.port), timeout=10) as connection:
        connection.sendall(
            sandbox.head("POST /oauth2/token", Content_Type=FORM, Content_Length=len(form)) + form
        )
        sandbox.wait(lambda seen: seen["refreshes"] == 1)
    sandbox.wait(lambda seen: seen["cancelled_requests"] == 1)
    begun = time.monotonic()
    assert sandbox.refresh(login["refresh_token"])[0] == 400 and time.monotonic() - begun > 0.3


def test_a_response_can_be_sent_byte_by_byte(sandbox: Sandbox) -> None:
    sandbox.set(answers=[{"path": "/v1/me", "drip": 100, "body": "x" * 30}])
    begun = time.monotonic()
    answer = sandbox.raw(sandbox.head("GET /v1/me"))
    assert (
        answer.endswith(b"x" * 30)
        and b"Content-Length: 30" in answer
        and time.monotonic() - begun > 0.25
    )


def test_a_response_can_be_sent_before_the_body_is_read(sandbox: Sandbox) -> None:
    sandbox.set(answers=[{"path": "/v1/files", "early": True, "error": "too_large"}])
    with streaming_upload(sandbox) as connection:
        assert connection.recv(99).startswith(b"HTTP/1.1 413")
    sandbox.set(answers=[{"path": "/v1/files", "early": True, "cut": "reset"}])
    with streaming_upload(sandbox) as connection, pytest.raises(ConnectionResetError):
        connection.recv(99)


@contextlib.contextmanager
def streaming_upload(sandbox: Sandbox) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", sandbox.port), timeout=10) as connection:
        connection.sendall(sandbox.head("POST /v1/files", Content_Length="1000000") + b"some")
        yield connection
