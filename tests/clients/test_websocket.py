"""WebSockets of real clients, to the sandbox itself and through the proxy."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox

openai = ClientLibrary("openai")
pytest.importorskip("websockets")
import websockets.asyncio.client
import websockets.sync.client
from websockets.exceptions import ConnectionClosedError, InvalidStatus

MODEL = "grok-4.5"


class Way:
    """The address and the key that a client connects with."""

    def __init__(self, url: str, key: str):
        self.url, self.key = url, key

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key)

    def address(self, path: str) -> tuple[str, dict[str, Any]]:
        """The arguments with which websockets.connect() connects to this path."""
        return self.url.replace("http:", "ws:") + path, {
            "additional_headers": {"Authorization": f"Bearer {self.key}"},
            "proxy": None,
            "max_size": None,
        }

    def connect(self, path: str, **options: Any) -> websockets.sync.client.ClientConnection:
        url, common = self.address(path)
        return websockets.sync.client.connect(url, **common, **options)


@pytest.fixture(params=["direct", "proxied"])
def way(request: pytest.FixtureRequest, sandbox: Sandbox) -> Way:
    if request.param == "direct":
        way = Way(sandbox.url, sandbox.mint()["access_token"])
        sandbox.reset()
        return way
    return Way(request.getfixturevalue("endpoint").url, "none")


def test_openais_realtime_client_converses(way: Way, sandbox: Sandbox) -> None:
    with way.openai() as client, client.realtime.connect(model="grok-voice") as connection:
        assert connection.recv().type == "session.created"
        connection.session.update(session={"type": "realtime", "instructions": "Be brief."})
        connection.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Hello"}],
            }
        )
        connection.response.create()
        text = ""
        for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                break
    assert text == event.response.output[0].content[0].text and text.startswith(
        "This is the sandbox"
    )
    sandbox.wait(lambda seen: seen["open_websockets"] == 0)
    assert sandbox.counters()["cancelled_websockets"] == 0


def test_openais_responses_client_converses(way: Way) -> None:
    with way.openai() as client, client.responses.connect() as connection:
        previous: Any = openai.omit
        for _ in range(2):
            connection.response.create(model=MODEL, input="Hello", previous_response_id=previous)
            events = []
            while not events or events[-1].type != "response.completed":
                events.append(connection.recv())
            previous = events[-1].response.id
            text = "".join(
                event.delta for event in events if event.type == "response.output_text.delta"
            )
            assert text == events[-1].response.output[1].content[0].text


def test_the_chosen_subprotocol_is_returned(way: Way) -> None:
    with way.connect(
        "/v1/realtime", subprotocols=["realtime", "xai-client-secret.x"]
    ) as connection:
        assert connection.subprotocol == "realtime"


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_extensions_are_negotiated_by_client_and_upstream(
    way: Way, compression: str | None
) -> None:
    with way.connect("/v1/realtime?model=echo", compression=compression) as connection:
        assert bool(connection.protocol.extensions) == bool(compression)
        connection.send("é" * 1000)
        assert connection.recv(5) == "é" * 1000


def test_an_event_arrives_when_it_is_sent(way: Way, sandbox: Sandbox) -> None:
    sandbox.set(silence_after=1)
    with way.connect("/v1/realtime", close_timeout=1) as connection:
        assert json.loads(connection.recv(5))["type"] == "session.created"
        begun = time.monotonic()
        assert connection.ping().wait(5) and time.monotonic() - begun < 1


def test_a_close_code_is_forwarded(way: Way, sandbox: Sandbox) -> None:
    sandbox.set(close_code=4001)
    with way.connect("/v1/realtime") as connection, pytest.raises(ConnectionClosedError) as closed:
        while True:
            connection.recv(5)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "the sandbox's close_code")


@pytest.mark.parametrize("cut", ["close", "reset"])
def test_a_cut_upstream_connection_is_cut_for_the_client(
    way: Way, sandbox: Sandbox, cut: str
) -> None:
    sandbox.set(cut_after=2, cut=cut)
    with way.connect("/v1/realtime") as connection, pytest.raises(ConnectionClosedError) as closed:
        while True:
            connection.recv(5)
    # The code is 1006: there was no Close frame.
    assert closed.value.rcvd is None


def test_a_client_that_disconnects_is_noticed(way: Way, sandbox: Sandbox) -> None:
    with way.connect("/v1/realtime?model=echo") as connection:
        connection.socket.shutdown(2)
        sandbox.wait(
            lambda seen: (seen["cancelled_websockets"], seen["open_websockets"]) == (1, 0),
            seconds=1,
        )


def test_a_refusal_comes_before_the_upgrade(way: Way, sandbox: Sandbox) -> None:
    sandbox.set(answers=[{"path": "/v1/realtime", "error": "no_subscription"}])
    with pytest.raises(InvalidStatus) as refused:
        way.connect("/v1/realtime")
    answer = refused.value.response
    assert (
        answer.status_code == 403 and "active Grok subscription" in json.loads(answer.body)["error"]
    )


@pytest.mark.parametrize("size, count", [(30_000_000, 1), (1_000_000, 30)])
def test_thirty_megabytes_pass_each_way(way: Way, size: int, count: int) -> None:
    async def echo() -> None:
        url, options = way.address("/v1/realtime?model=echo")
        message = bytes(range(250)) * (size // 250)
        async with websockets.asyncio.client.connect(
            url, **options, compression=None
        ) as connection:

            async def send() -> None:
                for _ in range(count):
                    await connection.send(message)

            sending = asyncio.create_task(send())
            for _ in range(count):
                assert await connection.recv() == message
            await sending

    asyncio.run(echo())


def test_without_a_login_the_refusal_advises_to_sign_in(endpoint: ProxyProcess) -> None:
    endpoint.token_path.unlink()
    with pytest.raises(InvalidStatus) as refused:
        Way(endpoint.url, "none").connect("/v1/realtime")
    answer = refused.value.response
    assert (
        answer.status_code == 401 and json.loads(answer.body)["error"]["code"] == "login_required"
    )
