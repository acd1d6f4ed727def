"""The account of the login, and the paths that such a login may not use."""

from __future__ import annotations

from flask import Blueprint

from xaiproxy.sandbox.grants import CLIENT_ID, USER, Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.xai_errors import TEAM, error


def create(_grants: Grants) -> Blueprint:
    account = Blueprint("account", __name__)

    @account.get("/v1/me")
    def me() -> Answer:
        return reply(
            {
                "user_id": USER["sub"],
                "team_id": TEAM,
                "zdr_status": "disabled",
                "team_blocked": False,
                "oauth": {"client_id": CLIENT_ID},
                "api_key": None,
            }
        )

    @account.get("/v1/api-key")
    def api_key() -> Answer:
        moment = "2026-01-01T00:00:00Z"
        return reply(
            {
                "redacted_api_key": "xai-...beef",
                "user_id": USER["sub"],
                "name": "sandbox",
                "create_time": moment,
                "modify_time": moment,
                "modified_by": USER["sub"],
                "team_id": TEAM,
                "acls": ["api-key:endpoint:*", "api-key:model:*"],
                "api_key_id": TEAM,
                "team_blocked": False,
                "api_key_blocked": False,
                "api_key_disabled": False,
            }
        )

    @account.post("/v1/audio/speech")
    @account.post("/v1/realtime/sessions")
    def not_for_this_team() -> Answer:
        return error("team_not_authorized")

    return account
