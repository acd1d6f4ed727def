"""Images and videos: only their JSON responses."""

from __future__ import annotations

from flask import Blueprint, g

from xaiproxy.sandbox import credentials
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.models import known
from xaiproxy.sandbox.replies import Answer, reply


def create(grants: Grants) -> Blueprint:
    media = Blueprint("media", __name__)
    # By request_id: whether the next response about the video still is "pending".
    pending: dict[str, bool] = {}

    @media.post("/v1/images/generations")
    @media.post("/v1/images/edits")
    def image() -> Answer:
        body = json_body(model=str, prompt=str)
        known(body["model"])
        return reply(
            {
                "data": [
                    {
                        "url": f"https://imgen.invalid/{g.request_id}.jpg",
                        "mime_type": "image/jpeg",
                        "revised_prompt": "",
                    }
                ]
                * (body.get("n") or 1)
            }
        )

    @media.post("/v1/videos/generations")
    def generate_video() -> Answer:
        body = json_body(model=str, prompt=str)
        credentials.check(grants)
        known(body["model"])
        return begin()

    @media.post("/v1/videos/edits")
    @media.post("/v1/videos/extensions")
    def change_video() -> Answer:
        json_body(model=str, prompt=str, video=dict)
        return begin()

    @media.get("/v1/videos/<request_id>")
    def video(request_id: str) -> Answer:
        if request_id not in pending:
            return reply({"code": "not-found", "error": "No such video."}, 404)
        if pending[request_id]:
            pending[request_id] = False
            return reply({"status": "pending", "progress": 0})
        return reply(
            {
                "status": "done",
                "progress": 100,
                "model": "grok-imagine-video",
                "video": {"url": f"https://vidgen.invalid/{request_id}.mp4", "duration": 6},
            }
        )

    def begin() -> Answer:
        pending[g.request_id] = True
        return reply({"request_id": g.request_id})

    return media
