"""The prompt caches of xAI's servers, each of which has only the prompts that were sent to it.

Requests with one conversation id go to one server, and requests without an id to each server in
turn. The id is x-grok-conv-id, else the body's prompt_cache_key.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from typing import Any, NamedTuple

from flask import request

from xaiproxy.sandbox.knobs import Knobs
from xaiproxy.sandbox.replies import compact

KEPT = 64  # prompts of a server, of which the oldest is dropped
BYTES_PER_TOKEN = 4


class Prompt(NamedTuple):
    """`tokens`: size of the prompt; `cached`: number of them that the server had already."""

    tokens: int = 12
    cached: int = 0


class PromptCache:
    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._servers: dict[int, collections.deque[list[str]]] = collections.defaultdict(
            lambda: collections.deque(maxlen=KEPT)
        )
        self._turns = itertools.count()

    def read(self, body: dict[str, Any], messages: list[Any]) -> Prompt:
        """Return the sizes of the current request's prompt, and cache it.

        Without cache servers every prompt has the same size, and none is cached.
        """
        count = self._knobs.cache_servers
        if not count:
            return Prompt()
        name = request.headers.get("x-grok-conv-id") or body.get("prompt_cache_key")
        number = zlib.crc32(str(name).encode()) if name else next(self._turns)
        server = self._servers[number % count]
        prompt = [compact(message) for message in messages]
        cached = max((_common_length(prompt, former) for former in server), default=0)
        server.append(prompt)
        return Prompt(_tokens(prompt), _tokens(prompt[:cached]))


def _tokens(messages: list[str]) -> int:
    return sum(map(len, messages)) // BYTES_PER_TOKEN


def _common_length(one: list[str], other: list[str]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
