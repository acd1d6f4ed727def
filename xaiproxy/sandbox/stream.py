"""Streaming as server-sent events or over a WebSocket; knobs make it slow, silent or cut."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flask import request

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.knobs import Knobs
from xaiproxy.sandbox.replies import Answer, compact

# As many words as a response has deltas by default.
TEXT = (
    "This is the sandbox, not xAI: it answers every question with this one sentence, "
    "which no model wrote or read."
)
WORDS = [f"{word} " for word in TEXT.split(" ")]
THOUGHT = "Hm."  # the reasoning of every response


def deltas(knobs: Knobs) -> list[str]:
    """The pieces of every response's text, streamed or not."""
    return _deltas(knobs.events, knobs.event_size)


# A thousand long streams share one list.
@functools.lru_cache(maxsize=8)
def _deltas(events: int, event_size: int | None) -> list[str]:
    words = list(itertools.islice(itertools.cycle(WORDS), events))
    if event_size:
        return [(word * event_size)[:event_size] for word in words]
    # A response of any length ends like a sentence, so that it does not look cut.
    return [*words[:-1], *(f"{word.rstrip(' ,:.')}." for word in words[-1:])]


def sse(event: Any) -> bytes:
    """A server-sent event with data only, as xAI sends it."""
    return b"data: " + (event if isinstance(event, str) else compact(event)).encode() + b"\n\n"


def named_sse(event: dict[str, Any]) -> bytes:
    """A server-sent event with its type on a line of its own."""
    return f"event: {event['type']}\n".encode() + sse(event)


def answer(events: Iterable[bytes], failure: bytes, grants: Grants) -> Answer:
    """The response to the current request: these events, as the knobs limit and pace them."""
    knobs, handler = grants.knobs, request.environ["sandbox.handler"]
    handler.close_delimited = knobs.framing == "close"
    response = Answer(content_type="text/event-stream")
    events = itertools.chain(
        [b": keepalive\n\n"] * knobs.keepalives, limited(events, failure, knobs)
    )
    if knobs.framing == "length":
        events = list(events)
        response.content_length = sum(map(len, events))
    response.response = _counted(paced(events, knobs, handler), grants)
    return response


def _counted(events: Iterator[bytes], grants: Grants) -> Iterator[bytes]:
    with grants.witness.open("streams"):
        yield from events


def limited(events: Iterable[Any], failure: Any, knobs: Knobs) -> Iterator[Any]:
    """The events; with capacity_error_after only so many of them, then `failure`."""
    yield from itertools.islice(events, knobs.capacity_error_after)
    if knobs.capacity_error_after is not None:
        yield failure


def paced(events: Iterable[bytes], knobs: Knobs, peer: Any) -> Iterator[bytes]:
    """The events at the rate of the knobs.

    `peer`: Handler or WebSocket, whose pause(seconds) raises as soon as the client is gone.
    """
    interval = 1 / knobs.events_per_second if knobs.events_per_second else 0
    silence_after, cut_after = knobs.silence_after, knobs.cut_after
    peer.pause(knobs.first_event_delay)
    due = time.monotonic()
    for count, event in enumerate(events):
        peer.pause(due - time.monotonic())
        if count == silence_after:
            peer.pause(knobs.silence)
        if count == cut_after:
            yield event[: len(event) // 2]
            peer.cut(knobs.cut)
        yield event
        due += interval
