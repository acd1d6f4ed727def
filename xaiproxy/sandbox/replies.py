"""Responses with JSON, text and pages."""

from __future__ import annotations

import json
from typing import Any

from werkzeug import Response


class Answer(Response):
    # An empty response has no Content-Type.
    default_mimetype = None


def compact(value: Any) -> str:
    """JSON in xAI's form: no spaces, no sorting, no escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """A response with `body`: an object as JSON, a string as plain text or HTML, or bytes."""
    kind = "application/json"
    if isinstance(body, bytes):
        kind = "application/octet-stream"
    elif isinstance(body, str):
        kind = "text/html; charset=UTF-8" if body.startswith("<") else "text/plain; charset=utf-8"
    else:
        body = compact(body)
    response = Answer(body, status, content_type=kind)
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response


def page(title: str, content: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title></head><body>{content}<hr><p>This page is from xai-sandbox, a "
        "simulation on your own machine. "
        "It is <b>not xAI</b>.</p></body></html>"
    )
