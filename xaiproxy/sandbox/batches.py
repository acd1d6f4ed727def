"""Batches of requests, which are never processed here. Their paths contain a colon."""

from __future__ import annotations

import uuid
from typing import Any

from flask import Blueprint, abort

from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply


def create(_grants: Grants) -> Blueprint:
    blueprint = Blueprint("batches", __name__)
    batches: dict[str, dict[str, Any]] = {}
    requests: dict[str, list[Any]] = {}

    def existing(name: str) -> dict[str, Any]:
        if name not in batches:
            abort(reply({"code": "not-found", "error": f"Batch {name} does not exist."}, 404))
        return batches[name]

    @blueprint.post("/v1/batches")
    def create_batch() -> Answer:
        name = f"batch_{uuid.uuid4()}"
        batches[name] = {
            "batch_id": name,
            "name": json_body(name=str)["name"],
            "cancel_time": None,
            "state": {"num_requests": 0, "num_pending": 0, "num_success": 0, "num_error": 0},
        }
        requests[name] = []
        return reply(batches[name])

    @blueprint.get("/v1/batches")
    def list_batches() -> Answer:
        return reply({"batches": list(batches.values()), "pagination_token": None})

    @blueprint.get("/v1/batches/<name>")
    def one_batch(name: str) -> Answer:
        return reply(existing(name))

    @blueprint.post("/v1/batches/<name>/requests")
    def add_requests(name: str) -> Answer:
        state = existing(name)["state"]
        requests[name] += json_body(batch_requests=list)["batch_requests"]
        state["num_requests"] = state["num_pending"] = len(requests[name])
        return reply({})

    @blueprint.get("/v1/batches/<name>/requests")
    def list_requests(name: str) -> Answer:
        existing(name)
        return reply({"batch_request_metadata": requests[name], "pagination_token": None})

    @blueprint.get("/v1/batches/<name>/results")
    def results(name: str) -> Answer:
        existing(name)
        return reply({"results": [], "pagination_token": None})

    @blueprint.post("/v1/batches/<name>:cancel")
    def cancel(name: str) -> Answer:
        existing(name)["cancel_time"] = "2026-01-01T00:00:00Z"
        return reply(batches[name])

    return blueprint
