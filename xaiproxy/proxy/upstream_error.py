"""The code of an error of the API, which has many shapes (protocol.md 5.5 and 5.9)."""

from __future__ import annotations

import json
import re
from typing import Any

SLUG = re.compile(r"\[WKE=([\w:.-]{1,80})\]")  # in the text of older errors
CODE_LIMIT = 80  # characters
# As the value of `type`, or as a member that is an object or a string: response.completed has
# "error": null. With one literal before the choice the search takes half the time.
IN_STREAM = re.compile(rb'"error"\s*(?:[,}]|:\s*["{])')
LAST_EVENTS = 4096  # bytes at the end of a stream in which an error is looked for
REASONS = (
    ("unauthenticated", "upstream refused the access token"),
    ("spending-limit", "the account has no credits, or no subscription that covers this"),
    ("free-usage-exhausted", "the included usage is used up"),
    ("resource-exhausted", "a rate limit or the capacity of upstream is exceeded"),
    ("resource has been exhausted", "a rate limit or the capacity of upstream is exceeded"),
    ("permission-denied", "the account may not do this"),
)


def of(text: str, status: int) -> tuple[str, str]:
    """The code and a reason in our words; `text`: the content of a response of `status`."""
    code = code_in(_parsed(text)) or f"upstream_{status}"
    return code, reason_for(code) or f"upstream responded {status}"


def in_stream(end: bytes) -> tuple[str, str] | None:
    """The same for an error that ended a stream; None if none did. `end`: its last bytes."""
    if not IN_STREAM.search(end):
        return None
    for line in reversed(end.decode("utf-8", "replace").splitlines()):
        event = _parsed(line.removeprefix("data:")) if line.startswith("data:") else None
        if not isinstance(event, dict):
            continue
        response = event.get("response")
        failed = response if isinstance(response, dict) else event
        if failed.get("error") or event.get("type") == "error":
            code = code_in(failed) or "upstream_error_event"
            return code, reason_for(code) or "upstream ended the stream with an error event"
    return None


def code_in(answer: Any) -> str:
    """The code in a parsed error, or ""."""
    if not isinstance(answer, dict):
        return ""
    inner = answer.get("error")
    for text in (inner, answer.get("message")):
        if isinstance(text, str) and (match := SLUG.search(text)):
            return match[1]
    inside = inner if isinstance(inner, dict) else {}
    for value in (answer.get("code"), inside.get("code"), inside.get("type")):
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)[:CODE_LIMIT]
    return ""


def reason_for(code: str) -> str:
    lower = code.lower()
    return next((reason for part, reason in REASONS if part in lower), "")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
