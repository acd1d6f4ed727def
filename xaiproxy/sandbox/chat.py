"""Chat completions, streamed, at once or deferred, and the two older forms of completion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, g

from xaiproxy.sandbox import stream, tool_calls
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.models import known
from xaiproxy.sandbox.prompt_cache import Prompt, PromptCache
from xaiproxy.sandbox.replies import Answer, compact, reply
from xaiproxy.sandbox.stream import THOUGHT, deltas, sse
from xaiproxy.sandbox.xai_errors import CAPACITY

FINGERPRINT = {"system_fingerprint": "fp_0000000000"}
FAILURE = sse(
    {"error": {"message": CAPACITY, "type": "server_error", "code": "resource-exhausted"}}
)


def create(grants: Grants) -> Blueprint:
    chat = Blueprint("chat", __name__)
    knobs = grants.knobs
    cache = PromptCache(knobs)
    deferred: dict[str, list[Answer]] = {}  # responses still to be sent, last one first

    @chat.post("/v1/chat/completions")
    def complete_chat() -> Answer:
        body = json_body(model=str, messages=list)
        known(body["model"])
        if body.get("stream") and body.get("deferred"):
            sentence = "A request may either be streaming or deferred, but not both."
            return Answer(compact(sentence), 400, content_type="application/json")
        pieces, call = deltas(knobs), tool_calls.call(body, body["messages"])
        used = usage(len(pieces), cache.read(body, body["messages"]))
        if body.get("stream"):
            return stream.answer(chunks(body, pieces, call, used), FAILURE, grants)
        answer = reply(
            {
                **head("chat.completion", body),
                "choices": [choice(pieces, call)],
                "usage": used,
                **FINGERPRINT,
                "service_tier": "default",
            }
        )
        if body.get("deferred"):
            deferred[g.request_id] = [answer, Answer(status=202)]
            return reply({"request_id": g.request_id})
        return answer

    @chat.get("/v1/chat/deferred-completion/<request_id>")
    def deferred_completion(request_id: str) -> Answer:
        if not deferred.get(request_id):
            return reply({"code": "not-found", "error": "No such deferred completion."}, 404)
        # 202 at first, then the completion, once.
        return deferred[request_id].pop()

    @chat.post("/v1/completions")
    def complete() -> Answer:
        body = json_body(model=str, prompt=(str, list))
        pieces, start = deltas(knobs), head("text_completion", body)
        known(body["model"])
        if body.get("stream"):
            choices = [{"index": 0, "text": piece, "finish_reason": None} for piece in pieces[:-1]]
            choices.append({"index": 0, "text": "".join(pieces[-1:]), "finish_reason": "stop"})
            events = [*({**start, "choices": [one]} for one in choices), "[DONE]"]
            return stream.answer(map(sse, events), FAILURE, grants)
        return reply(
            {
                **start,
                "usage": usage(len(pieces), Prompt()),
                "choices": [{"index": 0, "text": "".join(pieces), "finish_reason": "stop"}],
            }
        )

    @chat.post("/v1/complete")
    def complete_as_anthropic_once_did() -> Answer:
        body = json_body(model=str, prompt=str)
        return reply(
            {
                "type": "completion",
                "id": g.request_id,
                "completion": "".join(deltas(knobs)),
                "stop_reason": "stop_sequence",
                "model": known(body["model"]),
            }
        )

    return chat


def head(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"id": g.request_id, "object": kind, "created": int(time.time()), "model": body["model"]}


def choice(pieces: list[str], call: tool_calls.Call | None) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": "" if call else "".join(pieces),
        "reasoning_content": THOUGHT,
        "refusal": None,
        **({"tool_calls": [tool_call(call)]} if call else {}),
    }
    return {"index": 0, "message": message, "finish_reason": "tool_calls" if call else "stop"}


def tool_call(call: tool_calls.Call) -> dict[str, Any]:
    return {
        "id": f"call_{g.request_id[:8]}",
        "function": {"name": call.name, "arguments": call.json},
        "index": 0,
        "type": "function",
    }


def chunks(
    body: dict[str, Any],
    pieces: list[str],
    call: tool_calls.Call | None,
    used: dict[str, Any],
) -> Iterator[bytes]:
    """A streamed completion; a tool call is one chunk."""
    start = head("chat.completion.chunk", body)
    contents = (
        [{"tool_calls": [tool_call(call)]}] if call else [{"content": piece} for piece in pieces]
    )

    def chunk(**fields: Any) -> bytes:
        return sse({**start, "choices": [{"index": 0, **fields}], **FINGERPRINT})

    def events() -> Iterator[bytes]:
        yield chunk(delta={"reasoning_content": THOUGHT, "role": "assistant"})
        for delta in contents:
            yield chunk(delta=delta)
        yield chunk(delta={}, finish_reason="tool_calls" if call else "stop")
        if (body.get("stream_options") or {}).get("include_usage", True):
            yield sse({**start, "choices": [], "usage": used, **FINGERPRINT})
        yield sse("[DONE]")

    return events()


def usage(count: int, prompt: Prompt) -> dict[str, Any]:
    """total_tokens includes the reasoning, completion_tokens does not."""
    return {
        "prompt_tokens": prompt.tokens,
        "completion_tokens": count,
        "total_tokens": prompt.tokens + count + 3,
        "prompt_tokens_details": {
            "text_tokens": prompt.tokens,
            "audio_tokens": 0,
            "image_tokens": 0,
            "cached_tokens": prompt.cached,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 3,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "num_sources_used": 0,
        "cost_in_usd_ticks": 1466250,
    }
