"""/v1/realtime: a conversation over a WebSocket, text only, and the client secrets for web pages.

For tests of proxies, /v1/realtime?model=echo echoes every part of every message as it arrives, text
or binary, of any size. It does not read from a client that does not read.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flask import Blueprint, request

from xaiproxy.sandbox import stream
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.stream import deltas
from xaiproxy.sandbox.websocket import WebSocket, upgrade
from xaiproxy.sandbox.xai_errors import CAPACITY

Event = dict[str, Any]
FAILURE = {
    "type": "error",
    "error": {"type": "server_error", "code": "resource-exhausted", "message": CAPACITY},
}


def create(grants: Grants) -> Blueprint:
    realtime = Blueprint("realtime", __name__)

    @realtime.get("/v1/realtime")
    def connect() -> Answer:
        model = request.args.get("model", "grok-voice")
        return upgrade(
            grants, echo if model == "echo" else functools.partial(converse, grants, model)
        )

    @realtime.post("/v1/realtime/client_secrets")
    def client_secret() -> Answer:
        seconds = (json_body().get("expires_after") or {}).get("seconds", 600)
        return reply(grants.mint_secret(min(seconds, 3600)))

    @realtime.post("/v1/realtime/calls/<call>/<any('refer', 'hangup'):what>")
    def call(call: str, what: str) -> Answer:
        return reply({})

    @realtime.route("/v2/phone-numbers", methods=["GET", "POST"])
    def phone_numbers() -> Answer:
        return reply({"phone_numbers": []})

    return realtime


def echo(client: WebSocket) -> None:
    for part in client.parts():
        client.send(part)


def converse(grants: Grants, model: str, client: WebSocket) -> None:
    knobs = grants.knobs
    session = {
        "id": new("sess"),
        "object": "realtime.session",
        "type": "realtime",
        "model": model,
        "voice": "ara",
        "instructions": "",
        "output_modalities": ["text"],
        "turn_detection": None,
        "tools": [],
    }
    conversation = {"id": new("conv"), "object": "realtime.conversation"}
    begin: list[Event] = [
        {"type": "session.created", "session": session},
        {"type": "conversation.created", "conversation": conversation},
        {"type": "ping", "timestamp": int(time.time() * 1000)},
    ]
    client.stream(map(numbered, begin))
    if knobs.close_code:
        client.close(knobs.close_code, "the sandbox's close_code")
    for event in client.messages():
        kind = event.get("type")
        if kind == "session.update":
            session.update(event.get("session") or {})
            client.send_json(numbered({"type": "session.updated", "session": session}))
        elif kind == "response.create":
            events = stream.limited(response_events(deltas(knobs)), FAILURE, knobs)
            client.stream(map(numbered, events))
        elif kind in SIMPLE:
            client.send_json(*map(numbered, SIMPLE[kind](event)))
        else:
            error = {
                "type": "invalid_request_error",
                "code": "invalid_event",
                "message": f"There is no event {kind}.",
                "param": None,
                "event_id": None,
            }
            client.send_json(numbered({"type": "error", "error": error}))


def item_added(item: Any) -> Event:
    return {
        "type": "conversation.item.added",
        "previous_item_id": None,
        "item": {"id": new("item"), **(item or {})},
    }


# Events with an immediate response, or none.
SIMPLE: dict[str, Callable[[Event], list[Event]]] = {
    "ping": lambda event: [{"type": "pong", "timestamp": event.get("timestamp")}],
    "pong": lambda event: [],
    "conversation.item.create": lambda event: [item_added(event.get("item"))],
    "input_audio_buffer.append": lambda event: [],
    "input_audio_buffer.clear": lambda event: [{"type": "input_audio_buffer.cleared"}],
    "input_audio_buffer.commit": lambda event: [
        {"type": "input_audio_buffer.committed", "previous_item_id": None, "item_id": new("item")}
    ],
}


def response_events(pieces: list[str]) -> Iterator[Event]:
    part = {"type": "output_text", "text": "".join(pieces)}
    item = {
        "id": new("item"),
        "object": "realtime.item",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    response = {
        "id": new("resp"),
        "object": "realtime.response",
        "status": "completed",
        "status_details": None,
        "output": [item],
        "output_modalities": ["text"],
        "metadata": None,
        "usage": {
            "input_tokens": 12,
            "output_tokens": len(pieces),
            "total_tokens": 12 + len(pieces),
        },
    }
    where = {"response_id": response["id"], "output_index": 0}
    inside = {**where, "item_id": item["id"], "content_index": 0}
    begun = {**item, "status": "in_progress", "content": []}
    yield {
        "type": "response.created",
        "response": {**response, "status": "in_progress", "output": [], "usage": None},
    }
    yield {"type": "response.output_item.added", **where, "item": begun}
    yield item_added(begun)
    yield {"type": "response.content_part.added", **inside, "part": {**part, "text": ""}}
    for piece in pieces:
        yield {"type": "response.output_text.delta", **inside, "delta": piece}
    yield {"type": "response.output_text.done", **inside, "text": part["text"]}
    yield {"type": "response.content_part.done", **inside, "part": part}
    yield {"type": "response.output_item.done", **where, "item": item}
    yield {"type": "response.done", "response": response}


def new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:16]}"


def numbered(event: Event) -> Event:
    return {"event_id": new("event"), **event}
