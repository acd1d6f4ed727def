"""How JSON, text and pages are sent."""

from __future__ import annotations

import json
from typing import Any

from werkzeug import Response


class Answer(Response):
    default_mimetype = None  # an empty answer has no Content-Type


def compact(value: Any) -> str:
    """JSON as xAI writes it: no spaces, its own key order, no escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """JSON for an object, plain text or HTML for a string; bytes as they are."""
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
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        f"{content}<hr><p>This page is from xai-sandbox, a simulation on your own machine. "
        f"It is <b>not xAI</b>.</p></body></html>"
    )
