"""The models, and the paths that list them."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, abort

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.xai_errors import error

# Models by the path that lists them.
KINDS = {
    "language-models": ("grok-4.6", "grok-4.5", "grok-4.3", "grok-build-0.1"),
    "embedding-models": ("v1",),
    "image-generation-models": ("grok-imagine-image",),
    "video-generation-models": ("grok-imagine-video",),
}
MODELS = [name for kind, names in KINDS.items() for name in names if kind != "embedding-models"]


def create(_grants: Grants) -> Blueprint:
    models = Blueprint("models", __name__)

    @models.get("/v1/models")
    def list_models() -> Answer:
        return reply({"object": "list", "data": [about(name) for name in MODELS]})

    @models.get("/v1/models/<path:name>")
    def one_model(name: str) -> Answer:
        return reply(about(known(name)))

    @models.get(f"/v1/<any({','.join(map(repr, KINDS))}):kind>")
    def list_kind(kind: str) -> Answer:
        return reply({"models": [priced(name) for name in KINDS[kind]]})

    @models.get(f"/v1/<any({','.join(map(repr, KINDS))}):kind>/<name>")
    def one_of_kind(kind: str, name: str) -> Answer:
        return reply(priced(known(name, KINDS[kind])))

    return models


def about(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1750000000, "owned_by": "xai"}


def priced(name: str) -> dict[str, Any]:
    return {
        **about(name),
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "prompt_text_token_price": 20000,
    }


def known(name: str, names: Any = tuple(MODELS)) -> str:
    """Return the name if there is such a model, else abort with xAI's 404."""
    if name not in names:
        answer = error("no_model")
        answer.set_data(answer.get_data().replace(b"grok-beta", name.encode()))
        abort(answer)
    return name
