"""x-grok-conv-id: the conversation that a request belongs to, so that its prompt is cached.

xAI caches prompts on each server separately, and routes the requests of one x-grok-conv-id to one
server. A client that does not know this header may still name its conversation in a header of its
own, from which the proxy derives the id. The id is a digest: xAI does not learn the client's own
name of the conversation from it, and the same name at another login or with another client key
makes another id.
"""

from __future__ import annotations

import hashlib
import secrets

from xaiproxy import tokens
from xaiproxy.http1.request_head import Head

HEADER = "x-grok-conv-id"
# The session headers of clients, the preferred one first: each keeps its value throughout a
# conversation, and has another one in the next. In this order they are sent by OpenCode, which
# made it for routing; Claude Code; Codex; pi and older versions of Codex; these versions of Codex
# again; OpenCode again.
SESSION_HEADERS = (
    "x-session-affinity",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "conversation_id",
    "x-session-id",
)
DIGITS = 32  # hex digits of an id


class ConversationIds:
    def __init__(self) -> None:
        # For a login without a salt: its ids last as long as this process.
        self._salt = secrets.token_hex(16)

    def fields(self, head: Head, key: str | None, login: tokens.Login) -> list[tuple[str, str]]:
        """Return the field x-grok-conv-id; none if the client sent its own, or no session header.

        `key`: name of the client key, or None.
        """
        values = head.by_name
        if HEADER in values:
            return []
        for name in SESSION_HEADERS:
            if name in values and (session := values[name][0]):
                # No part contains a line feed.
                text = f"{login.salt or self._salt}\n{key or ''}\n{session}"
                return [(HEADER, hashlib.sha256(text.encode("latin-1")).hexdigest()[:DIGITS])]
        return []
