"""Every path of xAI's API passes the proxy unchanged, and so does its response."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from proxy_process import ProxyProcess
from sandbox import Sandbox

Call = Callable[..., "tuple[int, Any]"]
MODEL, VIDEO = {"model": "grok-4.5"}, {"model": "grok-imagine-video", "prompt": "x"}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\0\1\r\n--b--\r\n'
)


@pytest.fixture
def call(endpoint: ProxyProcess, sandbox: Sandbox) -> Call:
    """Send one request through the proxy. Return its status, and its body, parsed if it is JSON.

    Its path must arrive unchanged.
    """

    def call(method: str, path: str, body: dict[str, Any] | bytes | None = None) -> tuple[int, Any]:
        fields = []
        if body is not None:
            kind = (
                "multipart/form-data; boundary=b" if isinstance(body, bytes) else "application/json"
            )
            fields.append(f"Content-Type: {kind}")
        answer = endpoint.ask(
            method,
            path,
            *fields,
            body=body
            if isinstance(body, bytes)
            else json.dumps(body).encode()
            if body is not None
            else b"",
        )
        seen = sandbox.requests()[-1]
        assert (seen["method"], seen["target"], seen["status"]) == (method, path, answer.status)
        is_json = answer.value("Content-Type") == "application/json"
        return answer.status, json.loads(answer.body) if is_json else answer.body

    return call


@pytest.mark.parametrize(
    "method, path, body, member",
    [
        ("GET", "/v1/models", None, "data"),
        ("GET", "/v1/models/grok-4.5", None, "owned_by"),
        ("GET", "/v1/language-models", None, "models"),
        ("GET", "/v1/language-models/grok-4.5", None, "input_modalities"),
        ("GET", "/v1/embedding-models", None, "models"),
        ("GET", "/v1/embedding-models/v1", None, "id"),
        ("GET", "/v1/image-generation-models", None, "models"),
        ("GET", "/v1/image-generation-models/grok-imagine-image", None, "id"),
        ("GET", "/v1/video-generation-models", None, "models"),
        ("GET", "/v1/video-generation-models/grok-imagine-video", None, "id"),
        ("GET", "/v1/me", None, "user_id"),
        ("GET", "/v1/api-key", None, "acls"),
        ("POST", "/v1/completions", {**MODEL, "prompt": "x"}, "choices"),
        ("POST", "/v1/complete", {**MODEL, "prompt": "x"}, "completion"),
        ("POST", "/v1/responses/compact", {**MODEL, "input": []}, "output"),
        ("POST", "/v1/embeddings", {"model": "v1", "input": "x"}, "data"),
        ("POST", "/v1/tokenize-text", {**MODEL, "text": "a b"}, "token_ids"),
        ("POST", "/v1/images/generations", {"model": "grok-imagine-image", "prompt": "x"}, "data"),
        (
            "POST",
            "/v1/images/edits",
            {"model": "grok-imagine-image", "prompt": "x", "image": {}},
            "data",
        ),
        ("POST", "/v1/videos/edits", {**VIDEO, "video": {}}, "request_id"),
        ("POST", "/v1/videos/extensions", {**VIDEO, "video": {}}, "request_id"),
        ("GET", "/v1/tts/voices", None, "voices"),
        ("GET", "/v1/tts/voices/eve", None, "voice_id"),
        ("POST", "/v1/stt", FORM, "text"),
        ("GET", "/v1/custom-voices", None, "voices"),
        ("POST", "/v1/custom-voices", FORM, "voice_id"),
        ("POST", "/v1/realtime/client_secrets", {"expires_after": {"seconds": 9}}, "expires_at"),
        ("POST", "/v1/documents/search", {"query": "x"}, "matches"),
        ("POST", "/v1/collections", {"collection_name": "x"}, "collection_id"),
        ("GET", "/v2/phone-numbers", None, "phone_numbers"),
        ("POST", "/v2/phone-numbers", {}, "phone_numbers"),
    ],
)
def test_each_endpoint_is_forwarded(
    call: Call, method: str, path: str, body: Any, member: str
) -> None:
    status, answer = call(method, path, body)
    assert status == 200 and member in answer


@pytest.mark.parametrize("what", ["refer", "hangup"])
def test_each_kind_of_call_is_forwarded(call: Call, what: str) -> None:
    assert call("POST", f"/v1/realtime/calls/rtc_1/{what}", {}) == (200, {})


def test_speech_passes_as_binary(call: Call) -> None:
    assert call("POST", "/v1/tts", {"text": "x"}) == (200, bytes(range(256)) * 64)


def test_a_deferred_completion_can_be_fetched(call: Call) -> None:
    """It is an empty 202 until it is ready, then the response, once."""
    _, answer = call("POST", "/v1/chat/completions", {**MODEL, "messages": [], "deferred": True})
    path = f"/v1/chat/deferred-completion/{answer['request_id']}"
    assert call("GET", path) == (202, b"")
    assert call("GET", path)[1]["object"] == "chat.completion"
    assert call("GET", path)[0] == 404
    assert call(
        "POST", "/v1/chat/completions", {**MODEL, "messages": [], "deferred": True, "stream": True}
    ) == (400, "A request may either be streaming or deferred, but not both.")


def test_a_video_can_be_generated(call: Call) -> None:
    path = f"/v1/videos/{call('POST', '/v1/videos/generations', VIDEO)[1]['request_id']}"
    assert [call("GET", path)[1]["status"] for _ in range(3)] == ["pending", "done", "done"]
    assert call("GET", "/v1/videos/none")[0] == 404


def test_a_stored_response_can_be_read_and_deleted(call: Call) -> None:
    _, stored = call(
        "POST", "/v1/responses", {**MODEL, "input": [{"role": "user", "content": "x"}]}
    )
    path = f"/v1/responses/{stored['id']}"
    assert call("GET", path) == (200, stored)
    assert call("GET", f"{path}/input_items")[1]["data"] == [{"role": "user", "content": "x"}]
    # Some clients send a body with it.
    assert call("DELETE", path, {})[1]["deleted"]
    assert (
        call("GET", path)[0]
        == call(
            "POST", "/v1/responses", {**MODEL, "input": "x", "previous_response_id": stored["id"]}
        )[0]
        == 404
    )
    unstored = call("POST", "/v1/responses", {**MODEL, "input": "x", "store": False})[1]["id"]
    assert call("GET", f"/v1/responses/{unstored}")[0] == 404


def test_a_file_can_be_uploaded_in_chunks(call: Call) -> None:
    """Colons in the path pass."""
    name = call("POST", "/v1/files:initialize", {"filename": "a"})[1]["id"]
    for chunk in (b"\0\1", b"\2"):
        sent = {"file_id": name, "chunk": base64.b64encode(chunk).decode()}
        assert call("POST", "/v1/files:uploadChunks", sent)[0] == 200
    assert call("GET", f"/v1/files/{name}/content") == (200, b"\0\1\2")
    assert "public_url" in call("POST", f"/v1/files/{name}/public-url", {})[1]
    assert call("POST", f"/v1/files/{name}/public-url/revoke", {})[0] == 200
    assert call("POST", "/v1/files/none/public-url", {}) == (
        500,
        {"code": "Internal error", "error": "Internal error"},
    )


@pytest.mark.parametrize(
    "before, seconds, status",
    [(True, "3600", 200), (True, "3599", 400), (True, "2592001", 400), (False, "3600", 400)],
)
def test_a_file_may_expire(call: Call, before: bool, seconds: str, status: int) -> None:
    field = (
        b'--b\r\nContent-Disposition: form-data; name="expires_after"\r\n\r\n%b\r\n'
        % seconds.encode()
    )
    form = field + FORM if before else FORM.replace(b"--b--", field + b"--b--")
    answered, file = call("POST", "/v1/files", form)
    assert answered == status and ("expires_at" in file) == (status == 200)


def test_a_batch_can_be_run(call: Call) -> None:
    name = call("POST", "/v1/batches", {"name": "x"})[1]["batch_id"]
    assert name in [batch["batch_id"] for batch in call("GET", "/v1/batches")[1]["batches"]]
    assert (
        call(
            "POST", f"/v1/batches/{name}/requests", {"batch_requests": [{"batch_request_id": "a"}]}
        )[0]
        == 200
    )
    assert call("GET", f"/v1/batches/{name}/requests")[1]["batch_request_metadata"] == [
        {"batch_request_id": "a"}
    ]
    assert call("GET", f"/v1/batches/{name}")[1]["state"]["num_pending"] == 1
    assert call("GET", f"/v1/batches/{name}/results")[1]["results"] == []
    assert call("POST", f"/v1/batches/{name}:cancel", {})[1]["cancel_time"]
    assert call("GET", "/v1/batches/none")[0] == 404


@pytest.mark.parametrize(
    "method, path, status, sentence",
    [
        ("POST", "/v1/audio/transcriptions", 404, "No handler found on route"),
        ("GET", "/v1/usage", 404, "No handler"),
        ("GET", "/v1/nonsense%2Fhere", 404, "No handler found on route"),
        ("POST", "/v1/audio/speech", 403, "Team is not authorized"),
        ("POST", "/v1/realtime/sessions", 403, "Team is not authorized"),
        ("POST", "/v1/messages/count_tokens", 404, "No handler found on route"),
    ],
)
def test_unknown_resources_are_404(
    call: Call, method: str, path: str, status: int, sentence: str
) -> None:
    answered, body = call(method, path, {} if method == "POST" else None)
    assert answered == status and sentence in body["error"]


def test_errors_of_the_api_pass(call: Call) -> None:
    assert call("PATCH", "/v1/models") == (405, b"Method Not Allowed")
    assert call("POST", "/v1/stt", {})[0] == 415
    assert "missing field `input`" in call("POST", "/v1/responses", MODEL)[1]["error"]
