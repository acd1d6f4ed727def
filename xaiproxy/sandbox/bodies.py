"""The API's checks of a request body, with its 415 and 422 responses."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from flask import abort, request

from xaiproxy.sandbox.replies import reply


def one_content_type(wanted: str) -> None:
    """Refuse an empty body, and one with no Content-Type, two, or another than `wanted`."""
    sent = request.environ["sandbox.handler"].values("content-type")
    if len(sent) != 1 or request.mimetype != wanted or not request.get_data(cache=True):
        abort(reply(f"Expected request with `Content-Type: {wanted}`", 415))


def unprocessable(problem: str) -> NoReturn:
    sentence = (
        f"Failed to deserialize the JSON body into the target type: {problem} at line 1 column 1"
    )
    abort(reply({"error": sentence}, 422))


def json_body(**fields: Any) -> dict[str, Any]:
    """The request's JSON object. `fields`: type of each required member."""
    one_content_type("application/json")
    try:
        body = json.loads(request.get_data())
    except ValueError:
        unprocessable("expected value")
    if not isinstance(body, dict):
        unprocessable("invalid type, expected a map")
    for name, kind in fields.items():
        if name not in body:
            unprocessable(f"missing field `{name}`")
        if not isinstance(body[name], kind):
            unprocessable(f"{name}: invalid type")
    return body
