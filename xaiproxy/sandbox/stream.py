"""Server-sent events as xAI sends them, and the ways in which a stream can be slow, silent or cut."""
from __future__ import annotations

import functools
import itertools
import time
from typing import Any, Iterable, Iterator

from xaiproxy.sandbox.knobs import Knobs
from xaiproxy.sandbox.replies import compact
from xaiproxy.sandbox.server import Handler
from xaiproxy.sandbox.xai_errors import CAPACITY

WORDS = [f"{word} " for word in "This is the sandbox, not xAI, and nobody thought about the answer.".split()]


@functools.lru_cache(maxsize=8)  # a thousand long streams share one list
def deltas(events: int, event_size: int | None) -> list[str]:
    """The pieces of every answer, streamed or not."""
    words = itertools.islice(itertools.cycle(WORDS), events)
    return [(word * event_size)[:event_size] if event_size else word for word in words]


def usage(count: int) -> dict[str, Any]:
    """Of a chat completion: completion_tokens leaves out the reasoning, total_tokens does not."""
    return {
        "prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count + 3,
        "prompt_tokens_details": {
            "text_tokens": 12, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 3, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0},
        "num_sources_used": 0, "cost_in_usd_ticks": 1466250}


def response_usage(count: int) -> dict[str, Any]:
    """Of a response: output_tokens has the reasoning, and here there is none."""
    return {
        "input_tokens": 12, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12 + count, "num_sources_used": 0,
        "num_server_side_tools_used": 0, "cost_in_usd_ticks": 1466250}


def data(event: Any) -> bytes:
    return b"data: " + (event if isinstance(event, str) else compact(event)).encode() + b"\n\n"


def chat_events(answer_id: str, model: str, pieces: list[str]) -> Iterator[bytes]:
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    tail = {"system_fingerprint": "fp_0000000000"}

    def chunk(**choice: Any) -> bytes:
        return data({**head, "choices": [{"index": 0, **choice}], **tail})

    yield chunk(delta={"reasoning_content": "Hm.", "role": "assistant"})
    for piece in pieces:
        yield chunk(delta={"content": piece})
    yield chunk(delta={}, finish_reason="stop")
    yield data({**head, "choices": [], "usage": usage(len(pieces)), **tail})
    yield data("[DONE]")


def response_events(response: dict[str, Any], pieces: list[str]) -> Iterator[bytes]:
    """The events of a response, given as it is when it is complete; no [DONE] follows."""
    number = itertools.count()

    def event(kind: str, **fields: Any) -> bytes:
        return data({"sequence_number": next(number), "type": kind, **fields})

    begun = {**response, "output": [], "status": "in_progress"}
    begun.pop("usage")
    [message] = response["output"]
    [part] = message["content"]
    where = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    yield event("response.output_item.added", output_index=0,
                item={**message, "content": [], "status": "in_progress"})
    yield event("response.content_part.added", **where, part={**part, "text": ""})
    for piece in pieces:
        yield event("response.output_text.delta", **where, delta=piece, logprobs=[])
    yield event("response.output_text.done", **where, text=part["text"], logprobs=[])
    yield event("response.content_part.done", **where, part=part)
    yield event("response.output_item.done", output_index=0, item=message)
    yield event("response.completed", response=response)


CHAT_ERROR = data({"error": {"message": CAPACITY, "type": "server_error", "code": "resource-exhausted"}})
RESPONSE_ERROR = b"event: error\n" + data({"sequence_number": 0, "type": "error", "code": None,
                                           "message": CAPACITY, "param": None})


def troubled(events: Iterable[bytes], failure: bytes, knobs: Knobs) -> Iterator[bytes]:
    """The events as the knobs have them, before any waiting: comments first, an error for an end."""
    yield from [b": keepalive\n\n"] * knobs.keepalives
    yield from itertools.islice(events, knobs.capacity_error_after)
    if knobs.capacity_error_after is not None:
        yield failure


def paced(events: Iterable[bytes], knobs: Knobs, handler: Handler,
          counters: dict[str, int]) -> Iterator[bytes]:
    """Send at the pace of the knobs, noticing at once when the client leaves."""
    interval = 1 / knobs.events_per_second if knobs.events_per_second else 0
    silence_after, cut_after = knobs.silence_after, knobs.cut_after
    counters["streams"] += 1
    counters["open_streams"] += 1
    left_early = True
    try:
        handler.pause(knobs.first_event_delay)
        due = time.monotonic()
        for count, event in enumerate(events):
            handler.pause(due - time.monotonic())
            if count == silence_after:
                handler.pause(knobs.silence)
            if count == cut_after:
                yield event[:len(event) // 2]
                left_early = False
                handler.cut(knobs.cut)
            yield event
            due += interval
        left_early = False
    finally:
        counters["open_streams"] -= 1
        counters["cancelled_streams"] += left_early
