"""The tokens that a response used, read from its content after the client has it.

The usage object is searched for from the end, instead of parsing all of the content, which would
delay other streams. What a model wrote cannot be taken for it: the quotes in a string are escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from xaiproxy.http1 import headers, response_head
from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.sample import Sample
from xaiproxy.proxy import content

ROUTES = frozenset(("chat", "responses", "messages"))
MEMORY = 64 << 20  # bytes that all samples of whole content together may keep
USAGE = re.compile(r'"usage"\s*:\s*(?=\{)')
MODEL = re.compile(r'"model"\s*:\s*"([^"\\]{1,100})"')
COUNT_LIMIT = 1 << 40  # a larger number is no number of tokens

_budget = MemoryBudget(MEMORY)
_decode = json.JSONDecoder().raw_decode


class Usage(NamedTuple):
    """Numbers of tokens. `input` includes `cached_input`, `output` includes `reasoning`."""

    model: str
    input: int
    cached_input: int
    output: int
    reasoning: int


def sample_for(route: str, head: response_head.Head) -> Sample | None:
    """What is to be kept of a response, or None: errors are for the log, usage for the metrics."""
    if head.status >= 400:
        return Sample()
    if route not in ROUTES or not 200 <= head.status < 300:
        return None
    is_stream = headers.media_type(head.values) == "text/event-stream"
    return Sample() if is_stream and not content.codings(head) else Sample(_budget)


def read(text: str) -> Usage | None:
    """The usage in the content of a response; None if there is none.

    `text`: of a long stream its start and its end are enough.
    """
    found = [usage for match in USAGE.finditer(text) if (usage := _object(text, match.end()))]
    if not found:
        return None
    model = MODEL.search(text)
    # The first event of Anthropic's streams has the input, and the last the output.
    members = {**found[0], **found[-1]}
    return _usage(model[1] if model else "", members)


def _object(text: str, start: int) -> dict[str, Any] | None:
    try:
        members = _decode(text, start)[0]
    except (ValueError, RecursionError):
        return None
    # Not the definition of a tool's argument that is called usage.
    numbers = ("prompt_tokens", "input_tokens", "output_tokens")
    return members if any(_count(members, name) is not None for name in numbers) else None


def _usage(model: str, members: dict[str, Any]) -> Usage:
    def count(name: str, of: str = "") -> int:
        inside = members.get(of) if of else members
        return _count(inside, name) or 0

    if "prompt_tokens" in members:
        # Chat completions, where completion_tokens lacks the reasoning (protocol.md 5.3).
        prompt, completion = count("prompt_tokens"), count("completion_tokens")
        reasoning = count("reasoning_tokens", "completion_tokens_details")
        total = _count(members, "total_tokens")
        output = completion + reasoning if total is None else max(total - prompt, completion)
        return Usage(
            model, prompt, count("cached_tokens", "prompt_tokens_details"), output, reasoning
        )
    cached = count("cache_read_input_tokens")
    if cached or "cache_creation_input_tokens" in members:
        # Anthropic's, where input_tokens lacks the cached ones.
        tokens = count("input_tokens") + cached + count("cache_creation_input_tokens")
        return Usage(model, tokens, cached, count("output_tokens"), 0)
    return Usage(
        model,
        count("input_tokens"),
        count("cached_tokens", "input_tokens_details"),
        count("output_tokens"),
        count("reasoning_tokens", "output_tokens_details"),
    )


def _count(members: Any, name: str) -> int | None:
    value = members.get(name) if isinstance(members, dict) else None
    return value if type(value) is int and 0 <= value < COUNT_LIMIT else None
