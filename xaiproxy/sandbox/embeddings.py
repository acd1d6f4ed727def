"""Embeddings, and tokenization of text."""

from __future__ import annotations

from flask import Blueprint

from xaiproxy.sandbox.bodies import json_body
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply


def create(_grants: Grants) -> Blueprint:
    embeddings = Blueprint("embeddings", __name__)

    @embeddings.post("/v1/embeddings")
    def embed() -> Answer:
        body = json_body(model=str, input=(str, list))
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        vectors = [
            {"object": "embedding", "index": index, "embedding": [0.25, -0.5, 0.125]}
            for index in range(len(texts))
        ]
        return reply(
            {
                "object": "list",
                "model": body["model"],
                "data": vectors,
                "usage": {"prompt_tokens": 12, "total_tokens": 12},
            }
        )

    @embeddings.post("/v1/tokenize-text")
    def tokenize() -> Answer:
        words = enumerate(json_body(model=str, text=str)["text"].split())
        return reply(
            {
                "token_ids": [
                    {"token_id": number, "string_token": word, "token_bytes": list(word.encode())}
                    for number, word in words
                ]
            }
        )

    return embeddings
