"""The Responses API: plain, streamed or over a WebSocket, and stored responses."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from flask import Blueprint, abort, g

from xaiproxy.sandbox import credentials, stream, tool_calls, websocket
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.models import MODELS, known
from xaiproxy.sandbox.prompt_cache import Prompt, PromptCache
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.stream import THOUGHT, deltas, sse
from xaiproxy.sandbox.xai_errors import CAPACITY

MAX_STORED = 1000  # beyond it, the oldest is dropped
FAILURE = {"sequence_number": 0, "type": "error", "code": None, "message": CAPACITY, "param": None}


def create(grants: Grants) -> Blueprint:
    responses = Blueprint("responses", __name__)
    knobs = grants.knobs
    cache = PromptCache(knobs)
    stored: dict[str, tuple[dict[str, Any], list[Any]]] = {}  # each with its input

    def respond(name: str, body: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        """The complete response; stored unless the request has "store": false."""
        response = complete(name, body, deltas(knobs), prompt)
        if response["store"]:
            stored[name] = response, input_items(body["input"])
        if len(stored) > MAX_STORED:
            del stored[next(iter(stored))]
        return response

    def existing(name: str) -> tuple[dict[str, Any], list[Any]]:
        if name not in stored:
            abort(reply({"code": "not-found", "error": f"Response {name} does not exist."}, 404))
        return stored[name]

    @responses.post("/v1/responses")
    def create_response() -> Answer:
        body = json_body(model=str, input=(str, list))
        credentials.check(grants)
        known(body["model"])
        if body.get("previous_response_id"):
            existing(body["previous_response_id"])
        response = respond(g.request_id, body, cache.read(body, input_items(body["input"])))
        if body.get("stream"):
            return stream.answer(
                map(sse, events(response, deltas(knobs))), b"event: error\n" + sse(FAILURE), grants
            )
        return reply(response)

    @responses.post("/v1/responses/compact")
    def compact() -> Answer:
        body = json_body(model=str, input=(str, list))
        return reply(
            {
                "id": g.request_id,
                "object": "response.compaction",
                "created_at": int(time.time()),
                "output": [
                    {
                        "id": f"cmp_{g.request_id}",
                        "type": "compaction",
                        "encrypted_content": "sandbox",
                    }
                ],
                "usage": usage(len(body["input"]), Prompt()),
            }
        )

    @responses.get("/v1/responses/<name>")
    def one_response(name: str) -> Answer:
        return reply(existing(name)[0])

    @responses.get("/v1/responses/<name>/input_items")
    def list_input_items(name: str) -> Answer:
        return reply({"object": "list", "data": existing(name)[1], "has_more": False})

    @responses.delete("/v1/responses/<name>")
    def delete(name: str) -> Answer:
        existing(name)
        del stored[name]
        return reply({"id": name, "object": "response", "deleted": True})

    @responses.get("/v1/responses")
    def connect() -> Answer:
        return websocket.upgrade(grants, converse)

    def converse(client: websocket.WebSocket) -> None:
        """Answer one request after the other, an invalid one with an error."""
        for body in client.messages():
            problem = problem_of(body)
            if problem:
                client.send_json(problem)
                continue
            response = respond(str(uuid.uuid4()), {"input": [], **body}, Prompt())
            pieces = deltas(knobs)
            # A warm-up.
            if body.get("generate") is False:
                response["output"], pieces = [], []
            client.stream(stream.limited(events(response, pieces), FAILURE, knobs))

    def problem_of(body: dict[str, Any]) -> dict[str, Any] | None:
        if body.get("type") != "response.create":
            return socket_error(400, "invalid_event", "Only response.create is allowed here.")
        if body.get("model") not in MODELS:
            return socket_error(404, "not-found", "The model does not exist.")
        previous = body.get("previous_response_id")
        if previous and previous not in stored:
            return socket_error(
                400, "previous_response_not_found", f"Previous response {previous} not found."
            )
        return None

    return responses


def socket_error(status: int, code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "status": status, "error": {"code": code, "message": message}}


def input_items(given: Any) -> list[Any]:
    if isinstance(given, list):
        return given
    return [
        {
            "id": "msg_input",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": given}],
        }
    ]


def complete(name: str, body: dict[str, Any], pieces: list[str], prompt: Prompt) -> dict[str, Any]:
    """The completed response to a request. `name`: id of the response."""
    reasoning = {
        "id": f"rs_{name}",
        "type": "reasoning",
        "status": "completed",
        "summary": [{"type": "summary_text", "text": THOUGHT}],
    }
    part = {"type": "output_text", "text": "".join(pieces), "logprobs": [], "annotations": []}
    output = {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "content": [part],
        "status": "completed",
    }
    call = tool_calls.call(body, body["input"])
    if call:
        output = {
            "id": f"fc_{name}_0",
            "type": "function_call",
            "call_id": f"call-{name}-0",
            "name": call.name,
            "arguments": call.json,
            "status": "completed",
        }
    return {
        "created_at": int(time.time()),
        "id": name,
        "max_output_tokens": None,
        "model": body["model"],
        "object": "response",
        "output": [reasoning, output],
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": None,
        "user": None,
        "incomplete_details": None,
        "status": "completed",
        "store": body.get("store") is not False,
        "metadata": {},
        "usage": usage(len(pieces), prompt),
    }


def usage(count: int, prompt: Prompt) -> dict[str, Any]:
    """output_tokens includes the reasoning, which is none here."""
    return {
        "input_tokens": prompt.tokens,
        "input_tokens_details": {"cached_tokens": prompt.cached},
        "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt.tokens + count,
        "num_sources_used": 0,
        "num_server_side_tools_used": 0,
        "cost_in_usd_ticks": 1466250,
    }


def events(response: dict[str, Any], pieces: list[str]) -> Iterator[dict[str, Any]]:
    """The events of a completed response, without [DONE]. `pieces`: parts of its text."""
    begun = {**response, "output": [], "status": "in_progress"}
    begun.pop("usage")
    number = itertools.count()
    for kind, fields in itertools.chain(
        [("response.created", {"response": begun}), ("response.in_progress", {"response": begun})],
        *(_item_events(index, item, pieces) for index, item in enumerate(response["output"])),
        [("response.completed", {"response": response})],
    ):
        yield {"sequence_number": next(number), "type": kind, **fields}


def _item_events(
    index: int, item: dict[str, Any], pieces: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    content = {"reasoning": "summary", "message": "content", "function_call": "arguments"}[
        item["type"]
    ]
    empty = {**item, content: type(item[content])(), "status": "in_progress"}
    yield "response.output_item.added", {"output_index": index, "item": empty}
    yield from _content_events({"item_id": item["id"], "output_index": index}, item, pieces)
    yield "response.output_item.done", {"output_index": index, "item": item}


def _content_events(
    where: dict[str, Any], item: dict[str, Any], pieces: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if item["type"] == "function_call":
        yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
        yield "response.function_call_arguments.done", {**where, "arguments": item["arguments"]}
        return
    more: dict[str, Any] = {}
    if item["type"] == "reasoning":
        [part] = item["summary"]
        noun, text = "reasoning_summary_part", "reasoning_summary_text"
        where = {**where, "summary_index": 0}
        pieces = [part["text"]]
    else:
        [part] = item["content"]
        noun, text = "content_part", "output_text"
        where, more = {**where, "content_index": 0}, {"logprobs": []}
    yield f"response.{noun}.added", {**where, "part": {**part, "text": ""}}
    for piece in pieces:
        yield f"response.{text}.delta", {**where, "delta": piece, **more}
    yield f"response.{text}.done", {**where, "text": part["text"], **more}
    yield f"response.{noun}.done", {**where, "part": part}
