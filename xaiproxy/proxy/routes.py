"""The kinds of requests, by their path: a label of the metrics."""

from __future__ import annotations

PREFIXES = ("/v1/", "/v2/")  # of what is forwarded
# By the first segment after /v1/; xAI's voice endpoints are stt and tts.
SEGMENTS = {
    "chat": "chat",
    "completions": "chat",
    "responses": "responses",
    "messages": "messages",
    "models": "models",
    "language-models": "models",
    "image-generation-models": "models",
    "embedding-models": "models",
    "embeddings": "embeddings",
    "images": "images",
    "videos": "videos",
    "audio": "audio",
    "stt": "audio",
    "tts": "audio",
    "files": "files",
    "batches": "batches",
    "realtime": "realtime",
    "tokenize-text": "tokenize",
    "tokenize": "tokenize",
}
ROUTES = (*dict.fromkeys(SEGMENTS.values()), "other", "own")


def of(path: str) -> str:
    """One of ROUTES."""
    if not path.startswith(PREFIXES):
        return "own"
    return SEGMENTS.get(path.split("/", 3)[2], "other")
