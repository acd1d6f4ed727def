"""The tokens that a response used, read from its content after the client has it.

The usage object is searched for from the end, instead of parsing all of the content, which would
delay other streams. What a model wrote comes before it, and mostly as strings, whose quotes are
escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from xaiproxy.http1 import headers, response_head
from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.sample import END, START, Sample
from xaiproxy.proxy import content

ROUTES = frozenset(("chat", "responses", "messages"))
# Ends of paths on these routes whose responses use no tokens, or repeat former numbers.
WITHOUT_USAGE = ("/count_tokens", "/input_tokens", "/cancel")
MEMORY = 64 << 20  # bytes that all samples of whole content together may keep

NAME = b'"usage"'
OBJECT = re.compile(rb"\s{0,9}:\s{0,9}(?=\{)")
OBJECT_LIMIT = 4096  # bytes; xAI's has about 700
# Occurrences of the name that are examined: a tool's schema may have it too.
TRIES = 16
NUMBERS = ("prompt_tokens", "input_tokens", "output_tokens")
COUNT_LIMIT = 1 << 40  # a larger number is no number of tokens
MODEL = re.compile(rb'"model"\s{0,9}:\s{0,9}"([^"\\]{1,100})"')
UNKNOWN = "unknown"  # the model, if the content does not name it
MODEL_LIMIT = 65536  # bytes of content before its model

_budget = MemoryBudget(MEMORY)
_decode = json.JSONDecoder().raw_decode


class Usage(NamedTuple):
    """Numbers of tokens. `input` includes `cached_input`, `output` includes `reasoning`.

    `is_partial`: the output is what the begin of the stream announced, because no end came.
    """

    model: str
    input: int
    cached_input: int
    output: int
    reasoning: int
    is_partial: bool = False


def sample_for(route: str, head: response_head.Head) -> Sample | None:
    """What is to be kept of a response, or None: errors are for the log, usage for the metrics."""
    if head.status >= 400:
        return Sample()
    if route not in ROUTES or not 200 <= head.status < 300:
        return None
    is_stream = headers.media_type(head.values) == "text/event-stream"
    ends_suffice = is_stream and not content.codings(head)
    return Sample(None if ends_suffice else _budget, is_stream)


def is_expected(method: str, path: str, status: int) -> bool:
    """Whether a 2xx response on one of ROUTES used tokens, and is the first to report them."""
    if method == "GET":
        # A deferred completion can be fetched once; until it is there, the status is 202.
        return status == 200 and "/deferred-completion/" in path
    return method == "POST" and not path.endswith(WITHOUT_USAGE)


def read(data: bytes, of_stream: bool) -> Usage | None:
    """The usage in the content of a response; None if there is none.

    `data`: of a long stream its start and its end are enough.
    """
    at, members = _last(data)
    if not members:
        return None
    is_partial = False
    if of_stream and data.find(b'"message_start"', 0, START) >= 0:
        # The first event of Anthropic's streams has the input, and the last but one the output.
        first_at = data.find(NAME, 0, START)
        is_partial = first_at == at
        if 0 <= first_at < at:
            members = {**_object(data, first_at + len(NAME)), **members}
    model = MODEL.search(data, 0, MODEL_LIMIT) or MODEL.search(data, max(0, len(data) - END))
    name = model[1].decode("utf-8", "replace") if model else UNKNOWN
    return _usage(name, members, is_partial)


def _last(data: bytes) -> tuple[int, dict[str, Any]]:
    """Where the last usage object is, and its members; {} without one."""
    at = len(data)
    for _ in range(TRIES):
        at = data.rfind(NAME, 0, at)
        if at < 0:
            break
        if members := _object(data, at + len(NAME)):
            return at, members
    return -1, {}


def _object(data: bytes, start: int) -> dict[str, Any]:
    """The usage object after the name that ends at `start`; {} if it is another one."""
    before = OBJECT.match(data, start)
    if before is None:
        return {}
    text = data[before.end() : before.end() + OBJECT_LIMIT].decode("utf-8", "replace")
    members: dict[str, Any]
    try:
        members = _decode(text)[0]
    except (ValueError, RecursionError):
        return {}
    for name in NUMBERS:
        if type(members.get(name)) is int:
            return members
    # The definition of a tool's argument that is called usage.
    return {}


def _usage(model: str, members: dict[str, Any], is_partial: bool) -> Usage:
    if "prompt_tokens" in members:
        # Chat completions, where completion_tokens lacks the reasoning (protocol.md 5.3).
        prompt, completion = _count(members, "prompt_tokens"), _count(members, "completion_tokens")
        cached = _count(members.get("prompt_tokens_details"), "cached_tokens")
        reasoning = _count(members.get("completion_tokens_details"), "reasoning_tokens")
        output = completion + reasoning
        if "total_tokens" in members:
            output = max(_count(members, "total_tokens") - prompt, completion)
        return Usage(model, prompt, cached, output, reasoning, is_partial)
    tokens, output = _count(members, "input_tokens"), _count(members, "output_tokens")
    cached = _count(members, "cache_read_input_tokens")
    if cached or "cache_creation_input_tokens" in members:
        # Anthropic's, where input_tokens lacks the cached ones.
        tokens += cached + _count(members, "cache_creation_input_tokens")
        return Usage(model, tokens, cached, output, 0, is_partial)
    cached = _count(members.get("input_tokens_details"), "cached_tokens")
    reasoning = _count(members.get("output_tokens_details"), "reasoning_tokens")
    return Usage(model, tokens, cached, output, reasoning, is_partial)


def _count(members: Any, name: str) -> int:
    """A number of tokens; 0 for anything else."""
    value = members.get(name) if isinstance(members, dict) else 0
    return value if type(value) is int and 0 <= value < COUNT_LIMIT else 0
