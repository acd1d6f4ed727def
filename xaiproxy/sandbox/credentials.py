"""Authentication of API requests: an access token, or a client secret for one WebSocket."""

from __future__ import annotations

from flask import abort, request

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.websocket import offered_secret
from xaiproxy.sandbox.xai_errors import error


def check(grants: Grants) -> None:
    """Refuse the current request unless its credentials are valid for xAI."""
    refusal = _refusal(grants)
    if refusal:
        grants.witness.count("refused_tokens")
        old = "_old" * (grants.knobs.old_shape and refusal.endswith("credentials"))
        answer = error(refusal + old)
        if refusal == "bad_credentials":
            answer.status_code = grants.knobs.dead_token_status
        abort(answer)


def _refusal(grants: Grants) -> str | None:
    values = request.headers.getlist("Authorization")
    kind, _, token = values[0].partition(" ") if values else ("", "", "")
    if not values:
        return None if grants.take_secret(offered_secret()) else "no_credentials"
    if kind.lower() != "bearer" or not token or "," in token:
        return "invalid_header"
    if token.startswith("xai-"):
        return "wrong_api_key"
    return None if grants.check(token) else "bad_credentials"
