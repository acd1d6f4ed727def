"""The kinds of requests, by their path."""

import pytest

from xaiproxy.proxy import routes


@pytest.mark.parametrize(
    "path, route",
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/chat/deferred-completion/1", "chat"),
        ("/v1/completions", "chat"),
        ("/v2/responses", "responses"),
        ("/v1/responses/resp_1/input_items", "responses"),
        ("/v1/messages", "messages"),
        ("/v1/messages/count_tokens", "messages"),
        ("/v1/models", "models"),
        ("/v1/models/grok-4.5", "models"),
        ("/v1/language-models", "models"),
        ("/v1/image-generation-models/x", "models"),
        ("/v1/embedding-models", "models"),
        ("/v1/embeddings", "embeddings"),
        ("/v1/images/generations", "images"),
        ("/v1/videos/generations", "videos"),
        ("/v1/audio/speech", "audio"),
        ("/v1/stt", "audio"),
        ("/v1/tts", "audio"),
        ("/v1/files", "files"),
        ("/v1/batches/1", "batches"),
        ("/v1/realtime", "realtime"),
        ("/v1/realtime/client_secrets", "realtime"),
        ("/v1/tokenize-text", "tokenize"),
        ("/v1/tokenize", "tokenize"),
        ("/v1/", "other"),
        ("/v1/chats", "other"),
        ("/v1/CHAT", "other"),
        ("/v1//chat", "other"),
        ("/v1/%63hat", "other"),
        ("/v1/anything/else", "other"),
        ("/v1", "own"),
        ("/v10/chat", "own"),
        ("/", "own"),
        ("/metrics", "own"),
        # No valid head came.
        ("-", "own"),
    ],
)
def test_the_route_of_a_path(path: str, route: str) -> None:
    assert routes.of(path) == route
    assert route in routes.ROUTES


def test_every_route_is_listed_once() -> None:
    assert (
        *("chat", "responses", "messages", "models", "embeddings", "images", "videos", "audio"),
        *("files", "batches", "realtime", "tokenize", "other", "own"),
    ) == routes.ROUTES
