"""api.x.ai: what all paths have in common. The paths are in the modules of PARTS."""

from __future__ import annotations

import uuid

from flask import Blueprint, g, request

from xaiproxy.sandbox import (
    account,
    batches,
    billing,
    chat,
    credentials,
    documents,
    embeddings,
    files,
    media,
    messages,
    models,
    realtime,
    responses,
    speech,
)
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer

PARTS = (
    account,
    batches,
    billing,
    chat,
    documents,
    embeddings,
    files,
    media,
    messages,
    models,
    realtime,
    responses,
    speech,
)
# For these xAI checks the body before the token, so they check the token themselves.
BODY_FIRST = {"api.responses.create_response", "api.media.generate_video", "api.documents.search"}


def create(grants: Grants) -> Blueprint:
    api = Blueprint("api", __name__)
    for part in PARTS:
        api.register_blueprint(part.create(grants))

    @api.before_request
    def begin() -> None:
        g.request_id = str(uuid.uuid4())
        if request.endpoint not in BODY_FIRST and request.method != "OPTIONS":
            credentials.check(grants)

    @api.after_request
    def xai_headers(answer: Answer) -> Answer:
        answer.headers.extend(
            {
                "Strict-Transport-Security": "max-age=31536000",
                "Server-Timing": 'cfCacheStatus;desc="DYNAMIC"',
                "x-request-id": g.request_id,
                "x-zero-data-retention": "false",
                "x-data-retention": "general",
                "vary": "origin",
                "access-control-allow-origin": "*",
                "access-control-expose-headers": "*",
                "cf-cache-status": "DYNAMIC",
            }
        )
        if answer.status_code == 200:
            answer.headers.extend(
                {
                    "x-ratelimit-limit-tokens": "50000000",
                    "x-ratelimit-remaining-tokens": "49999488",
                    "x-ratelimit-limit-requests": "7200",
                    "x-ratelimit-remaining-requests": "7199",
                    "x-metrics-ttft-ms": "264.4",
                }
            )
        return answer

    return api
