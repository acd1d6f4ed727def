"""Who may call the API: whoever brings an access token, or, once, a client secret to a WebSocket's handshake."""

from __future__ import annotations

from flask import abort, request

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.websocket import offered_secret
from xaiproxy.sandbox.xai_errors import error


def check(grants: Grants) -> None:
    """Refuse the request in hand unless it brings what xAI takes."""
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
