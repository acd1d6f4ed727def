"""Anthropic's Messages API, plain and streamed; without count_tokens, as at xAI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Blueprint, g

from xaiproxy.sandbox import stream, tool_calls
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.models import known
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.stream import deltas, named_sse
from xaiproxy.sandbox.xai_errors import CAPACITY

FAILURE = named_sse({"type": "error", "error": {"type": "overloaded_error", "message": CAPACITY}})


def create(grants: Grants) -> Blueprint:
    messages = Blueprint("messages", __name__)
    knobs = grants.knobs

    @messages.post("/v1/messages")
    def create_message() -> Answer:
        body = json_body(model=str, messages=list, max_tokens=int)
        known(body["model"])
        pieces, call = deltas(knobs), tool_calls.call(body, body["messages"])
        block = {"type": "text", "text": "".join(pieces)}
        if call:
            block = {
                "type": "tool_use",
                "id": f"toolu_{g.request_id}",
                "name": call.name,
                "input": call.arguments,
            }
        message = {
            "id": f"msg_{g.request_id}",
            "type": "message",
            "role": "assistant",
            "content": [block],
            "model": body["model"],
            "stop_reason": "tool_use" if call else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 12, "output_tokens": len(pieces)},
        }
        if body.get("stream"):
            contents = (
                [{"type": "input_json_delta", "partial_json": call.json}]
                if call
                else [{"type": "text_delta", "text": piece} for piece in pieces]
            )
            return stream.answer(map(named_sse, events(message, contents)), FAILURE, grants)
        return reply(message)

    return messages


def events(message: dict[str, Any], deltas: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events of a complete message. `deltas`: its content."""
    [block] = message["content"]
    content = "input" if block["type"] == "tool_use" else "text"
    begun = {
        **message,
        "content": [],
        "stop_reason": None,
        "usage": {**message["usage"], "output_tokens": 0},
    }
    yield {"type": "message_start", "message": begun}
    yield {
        "type": "content_block_start",
        "index": 0,
        "content_block": {**block, content: type(block[content])()},
    }
    yield {"type": "ping"}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": message["stop_reason"], "stop_sequence": None},
        "usage": message["usage"],
    }
    yield {"type": "message_stop"}
