"""The sandbox's WebSockets: the handshake, the events, and the closing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets.asyncio.client
import websockets.sync.client
from raw_connection import Message, RawConnection
from sandbox import Sandbox
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus

Connection = websockets.sync.client.ClientConnection
MODEL = {"type": "response.create", "model": "grok-4.5"}


@pytest.fixture
def connect(sandbox: Sandbox, token: str) -> Iterator[Callable[..., Connection]]:
    """Opens a connection to a path of the sandbox; all are closed in the end."""
    with contextlib.ExitStack() as stack:

        def connect(path: str, token: str | None = token, **options: Any) -> Connection:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return stack.enter_context(
                websockets.sync.client.connect(
                    websocket_url(sandbox, path),
                    additional_headers=headers,
                    proxy=None,
                    close_timeout=2,
                    **options,
                )
            )

        yield connect


@pytest.fixture
def conversation(connect: Callable[..., Connection]) -> Connection:
    """A realtime conversation that has begun."""
    connection = connect("/v1/realtime")
    assert types_of_next(connection, 3) == ["session.created", "conversation.created", "ping"]
    return connection


def websocket_url(sandbox: Sandbox, path: str) -> str:
    return sandbox.url.replace("http:", "ws:") + path


def handshake(
    sandbox: Sandbox, token: str, path: str = "/v1/realtime", **fields: Any
) -> tuple[RawConnection, Message]:
    """A raw connection with this handshake, and the sandbox's response."""
    raw = RawConnection(socket.create_connection((sandbox.host, sandbox.port)))
    raw.send(
        sandbox.head(
            f"GET {path}",
            **{
                "Authorization": f"Bearer {token}",
                "Connection": "keep-alive, Upgrade",
                "Upgrade": "websocket",
                "Sec_WebSocket_Version": "13",
                "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
                **fields,
            },
        )
    )
    answer = raw.head()
    if answer.status != 101:
        answer.body = raw.exactly(int(answer.value("Content-Length")))
    return raw, answer


def types_of_next(connection: Connection, count: int) -> list[str]:
    """The types of the next events."""
    return [json.loads(connection.recv(5))["type"] for _ in range(count)]


def answers(connection: Connection, last: str, event: dict[str, Any]) -> list[dict[str, Any]]:
    """Send an event; return the events up to one of type `last`."""
    connection.send(json.dumps(event))
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] != last:
        events.append(json.loads(connection.recv(5)))
    return events


def text(events: list[dict[str, Any]]) -> str:
    return "".join(
        event["delta"] for event in events if event["type"] == "response.output_text.delta"
    )


# The handshake


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/responses", "/v1/stt", "/v1/tts"])
def test_the_token_is_checked_before_the_upgrade(sandbox: Sandbox, path: str) -> None:
    for authorization, status, code in (
        ("Bearer dead", 403, "bad-credentials"),
        (None, 401, "no-credentials"),
    ):
        raw, answer = handshake(sandbox, "", path, Authorization=authorization)
        raw.close()
        assert (
            answer.status == status and json.loads(answer.body)["code"] == f"unauthenticated:{code}"
        )
    assert sandbox.counters()["websockets"] == 0


def test_the_token_is_not_checked_after_the_upgrade(
    sandbox: Sandbox, conversation: Connection
) -> None:
    sandbox.kill()
    assert answers(conversation, "pong", {"type": "ping", "timestamp": 7})[0]["timestamp"] == 7


@pytest.mark.parametrize(
    "fields, status, sentence",
    [
        ({"Upgrade": None}, 400, b"Upgrade: websocket"),
        ({"Connection": "keep-alive"}, 400, b"Connection: Upgrade"),
        ({"Sec_WebSocket_Key": None}, 400, b"Sec-WebSocket-Key"),
        ({"Sec_WebSocket_Version": "12"}, 426, b"Sec-WebSocket-Version: 13"),
    ],
)
def test_an_incomplete_handshake_is_refused(
    sandbox: Sandbox, token: str, fields: dict[str, Any], status: int, sentence: bytes
) -> None:
    raw, answer = handshake(sandbox, token, **fields)
    raw.close()
    assert answer.status == status and sentence.lower() in (answer.head + answer.body).lower()


def test_the_response_to_a_handshake_has_xais_headers(sandbox: Sandbox, token: str) -> None:
    """And none of a body; no knob compresses it."""
    sandbox.set(gzip="all")
    raw, answer = handshake(sandbox, token, Accept_Encoding="gzip")
    raw.close()
    assert (answer.status, answer.value("Upgrade").lower(), answer.value("Connection")) == (
        101,
        "websocket",
        "Upgrade",
    )
    # The value of RFC 6455 section 1.3.
    assert answer.value("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (answer.value("Server"), answer.value("X-Sandbox")) == ("cloudflare", "not xAI")
    assert not re.search(rb"\r\n(Content-|Transfer-|Sec-WebSocket-(Ext|Prot))", answer.head)


@pytest.mark.parametrize(
    "offered, chosen",
    [
        (["realtime"], "realtime"),
        (["a", "realtime", "xai-client-secret.x"], "realtime"),
        (["xai-client-secret.x"], "xai-client-secret.x"),
        (["a"], None),
        (None, None),
    ],
)
def test_the_first_subprotocol_that_is_known_is_chosen(
    connect: Callable[..., Connection], offered: Any, chosen: str | None
) -> None:
    assert connect("/v1/realtime", subprotocols=offered).subprotocol == chosen


def test_a_client_secret_opens_one_websocket(
    sandbox: Sandbox, connect: Callable[..., Connection], token: str
) -> None:
    secret = sandbox.post("/v1/realtime/client_secrets", {"expires_after": {"seconds": 60}}, token)[
        1
    ]
    assert 50 < secret["expires_at"] - time.time() <= 60
    offered = ["realtime", f"xai-client-secret.{secret['value']}"]
    assert types_of_next(connect("/v1/realtime", None, subprotocols=offered), 1) == [
        "session.created"
    ]
    with pytest.raises(InvalidStatus, match="HTTP 401"):
        connect("/v1/realtime", None, subprotocols=offered)
    assert secret["value"] not in json.dumps(sandbox.requests())
    expired = sandbox.post("/v1/realtime/client_secrets", {"expires_after": {"seconds": 0}}, token)[
        1
    ]["value"]
    with pytest.raises(InvalidStatus, match="HTTP 401"):
        connect("/v1/realtime", None, subprotocols=[f"xai-client-secret.{expired}"])


# The events


def test_a_conversation_has_the_events_of_a_real_one(
    sandbox: Sandbox, conversation: Connection
) -> None:
    sandbox.set(events=3)
    assert (
        answers(
            conversation, "session.updated", {"type": "session.update", "session": {"voice": "rex"}}
        )[0]["session"]["voice"]
        == "rex"
    )
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
    added = answers(
        conversation, "conversation.item.added", {"type": "conversation.item.create", "item": item}
    )[0]
    assert added["item"]["content"] == item["content"] and added["event_id"]
    events = answers(conversation, "response.done", {"type": "response.create"})
    assert [event["type"] for event in events] == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    assert (
        text(events) == events[-1]["response"]["output"][0]["content"][0]["text"] == "This is the."
    )
    conversation.send(json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"}))
    answers(conversation, "input_audio_buffer.committed", {"type": "input_audio_buffer.commit"})
    assert (
        answers(conversation, "error", {"type": "nonsense"})[0]["error"]["code"] == "invalid_event"
    )


def test_responses_come_one_after_the_other(
    sandbox: Sandbox, connect: Callable[..., Connection], token: str
) -> None:
    sandbox.set(events=2)
    connection = connect("/v1/responses")
    first = answers(connection, "response.completed", {**MODEL, "input": "x"})
    assert text(first) == "This is." and first[0]["sequence_number"] == 0
    name = first[-1]["response"]["id"]
    second = answers(
        connection, "response.completed", {**MODEL, "input": [], "previous_response_id": name}
    )
    assert second[-1]["response"]["previous_response_id"] == name
    warmed = answers(connection, "response.completed", {**MODEL, "generate": False})
    assert [event["type"] for event in warmed] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    for wrong, code in (
        ({"previous_response_id": "no"}, "previous_response_not_found"),
        ({"model": "x"}, "not-found"),
        ({"type": "x"}, "invalid_event"),
    ):
        problem = answers(connection, "error", {**MODEL, **wrong})[0]
        assert problem["error"]["code"] == code and problem["status"] >= 400
    assert (
        sandbox.get(f"/v1/responses/{name}", token)[1]["output"][1]["content"][0]["text"]
        == "This is."
    )


def test_speech_goes_both_ways(connect: Callable[..., Connection]) -> None:
    listening = connect("/v1/stt")
    assert types_of_next(listening, 1) == ["transcript.created"]
    listening.send(b"\0" * 3200)
    heard = json.loads(listening.recv(5))
    assert (heard["type"], heard["is_final"]) == ("transcript.partial", False)
    assert answers(listening, "transcript.partial", {"type": "finalize"})[0]["is_final"]
    answers(listening, "transcript.done", {"type": "audio.done"})
    with pytest.raises(ConnectionClosedOK):
        listening.recv(5)
    speaking = connect("/v1/tts")
    assert answers(speaking, "audio.delta", {"type": "text.delta", "delta": "x"})[0]["delta"]
    answers(speaking, "audio.done", {"type": "text.done"})


# Any size


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize(
    "message",
    ["", b"", "é" * 70_000, bytes(range(256)) * 5000],
    ids=["no text", "nothing", "text", "bytes"],
)
def test_a_message_of_any_size_is_echoed(
    connect: Callable[..., Connection], compression: str | None, message: str | bytes
) -> None:
    connection = connect("/v1/realtime?model=echo", compression=compression, max_size=None)
    assert bool(connection.protocol.extensions) == bool(compression)
    for _ in range(2):
        connection.send(message)
        assert connection.recv(5) == message


def test_an_echo_of_any_size_needs_little_memory(sandbox: Sandbox, token: str) -> None:
    size = 30_000_000

    async def echo() -> None:
        # The synchronous client cannot read while it writes.
        async with websockets.asyncio.client.connect(
            websocket_url(sandbox, "/v1/realtime?model=echo"),
            max_size=None,
            compression=None,
            proxy=None,
            additional_headers={"Authorization": f"Bearer {token}"},
        ) as connection:
            message = bytes(size)
            sending = asyncio.create_task(connection.send(message))
            assert await connection.recv() == message
            await sending

    before = resident_kib(sandbox)
    asyncio.run(echo())
    assert resident_kib(sandbox) - before < 5000


def resident_kib(sandbox: Sandbox) -> int:
    described = pathlib.Path(f"/proc/{sandbox.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", described)[1])


def test_a_client_that_does_not_read_meets_back_pressure(sandbox: Sandbox, token: str) -> None:
    raw, _ = handshake(sandbox, token, "/v1/realtime?model=echo")
    raw.sock.settimeout(0.3)
    # A frame of a gigabyte, masked with zeros.
    raw.send(b"\x82\xff" + (1 << 30).to_bytes(8, "big") + bytes(4))
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 100_000_000:
            sent += raw.sock.send(bytes(65536))
    assert sandbox.counters()["open_websockets"] == 1
    raw.close()
    sandbox.wait(lambda seen: seen["cancelled_websockets"] == 1, seconds=1)


# Closing


def test_websockets_are_counted(sandbox: Sandbox, connect: Callable[..., Connection]) -> None:
    first, second = connect("/v1/realtime"), connect("/v1/stt")
    assert counted(sandbox) == (2, 2, 0)
    first.close()
    sandbox.wait(lambda seen: seen["open_websockets"] == 1)
    second.socket.shutdown(socket.SHUT_RDWR)
    sandbox.wait(lambda seen: seen["open_websockets"] == 0, seconds=1)
    assert counted(sandbox) == (2, 0, 1)


def counted(sandbox: Sandbox) -> tuple[int, int, int]:
    seen = sandbox.counters()
    return seen["websockets"], seen["open_websockets"], seen["cancelled_websockets"]


@pytest.mark.parametrize(
    "message, code",
    [("{", 1007), ("[]", 1007), (b"{}", 1003), ('"' + "x" * (16 << 20) + '"', 1009)],
    ids=["no JSON", "no object", "binary", "too large"],
)
def test_a_message_that_is_no_json_object_closes_the_connection(
    conversation: Connection, message: str | bytes, code: int
) -> None:
    conversation.send(message)
    with pytest.raises(ConnectionClosedError) as closed:
        conversation.recv(5)
    assert closed.value.rcvd.code == code


def test_bytes_that_are_no_frame_close_the_connection(conversation: Connection) -> None:
    conversation.socket.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionClosedError) as closed:
        conversation.recv(5)
    assert closed.value.rcvd.code == 1002


def test_close_code_closes_the_connection_with_that_code(
    sandbox: Sandbox, connect: Callable[..., Connection]
) -> None:
    sandbox.set(close_code=4001)
    connection = connect("/v1/realtime")
    types_of_next(connection, 3)
    with pytest.raises(ConnectionClosedError) as closed:
        connection.recv(5)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "the sandbox's close_code")
    sandbox.wait(lambda seen: seen["open_websockets"] == 0)
    assert counted(sandbox) == (1, 0, 0)


@pytest.mark.parametrize("cut", ["close", "reset"])
def test_cut_after_cuts_the_connection_in_the_middle_of_an_event(
    sandbox: Sandbox, connect: Callable[..., Connection], cut: str
) -> None:
    sandbox.set(cut_after=2, cut=cut)
    connection = connect("/v1/realtime")
    types_of_next(connection, 2)
    with pytest.raises(ConnectionClosedError) as closed:
        connection.recv(5)
    # The code is 1006: there was no Close frame.
    assert closed.value.rcvd is None
    sandbox.wait(lambda seen: seen["open_websockets"] == 0)
    assert counted(sandbox) == (1, 0, 0)


def test_in_silence_pings_are_answered_and_a_disconnect_is_noticed(
    sandbox: Sandbox, connect: Callable[..., Connection]
) -> None:
    sandbox.set(silence_after=1)
    connection = connect("/v1/realtime")
    types_of_next(connection, 1)
    assert connection.ping().wait(5)
    connection.socket.shutdown(socket.SHUT_RDWR)
    sandbox.wait(lambda seen: seen["cancelled_websockets"] == 1, seconds=1)


def test_events_come_at_events_per_second(sandbox: Sandbox, conversation: Connection) -> None:
    sandbox.set(events_per_second=50, events=4)
    begun = time.monotonic()
    answers(conversation, "response.done", {"type": "response.create"})
    assert time.monotonic() - begun > 11 / 50


def test_a_message_sent_during_a_response_is_answered_after_it(
    sandbox: Sandbox, conversation: Connection
) -> None:
    sandbox.set(events_per_second=50, events=4)
    conversation.send(json.dumps({"type": "response.create"}))
    events = answers(conversation, "pong", {"type": "ping", "timestamp": 1})
    assert events[-2]["type"] == "response.done"


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/responses"])
def test_capacity_error_after_ends_a_response_with_an_error(
    sandbox: Sandbox, connect: Callable[..., Connection], path: str
) -> None:
    sandbox.set(capacity_error_after=1)
    connection = connect(path)
    events = answers(connection, "error", {**MODEL, "input": "x"})
    assert [event["type"] for event in events[-2:]] == ["response.created", "error"]


def test_sigterm_ends_the_sandbox_with_a_websocket_open() -> None:
    with Sandbox() as sandbox:
        raw, answer = handshake(sandbox, sandbox.mint()["access_token"])
        assert answer.status == 101
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == 0
        raw.close()
