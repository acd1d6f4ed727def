"""Collections of documents, and searching them."""

from __future__ import annotations

import uuid

from flask import Blueprint

from xaiproxy.sandbox import credentials
from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply


def create(grants: Grants) -> Blueprint:
    documents = Blueprint("documents", __name__)

    @documents.post("/v1/documents/search")
    def search() -> Answer:
        json_body(query=str)
        credentials.check(grants)
        return reply({"matches": []})

    @documents.post("/v1/collections")
    def create_collection() -> Answer:
        return reply(
            {
                "collection_id": f"collection_{uuid.uuid4()}",
                "collection_name": json_body(collection_name=str)["collection_name"],
            }
        )

    return documents
