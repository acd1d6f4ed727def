"""Text to speech and speech to text, over HTTP and WebSockets, and the voices; with fake audio."""

from __future__ import annotations

import base64

from flask import Blueprint, g, request

from xaiproxy.sandbox.bodies import json_body, one_content_type, unprocessable
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.websocket import WebSocket, upgrade

AUDIO = bytes(range(256)) * 64  # for any text
VOICES = {
    name.lower(): {"voice_id": name.lower(), "name": name}
    for name in ("Ara", "Eve", "Leo", "Rex", "Sal")
}
# Of any audio.
TRANSCRIPT = "This is the sandbox."


def create(grants: Grants) -> Blueprint:
    speech = Blueprint("speech", __name__)

    @speech.post("/v1/tts")
    def speak() -> Answer:
        json_body(text=str)
        return Answer(AUDIO, content_type="audio/mpeg")

    @speech.get("/v1/tts")
    def speak_over_websocket() -> Answer:
        return upgrade(grants, speak_messages)

    @speech.post("/v1/stt")
    def transcribe() -> Answer:
        one_content_type("multipart/form-data")
        if "file" not in request.files:
            unprocessable("missing field `file`")
        return reply({"text": TRANSCRIPT, "language": "en", "duration": 1.0, "words": []})

    @speech.get("/v1/stt")
    def transcribe_over_websocket() -> Answer:
        return upgrade(grants, transcribe_messages)

    @speech.get("/v1/tts/voices")
    def voices() -> Answer:
        return reply({"voices": list(VOICES.values())})

    @speech.get("/v1/tts/voices/<voice>")
    def one_voice(voice: str) -> Answer:
        if voice not in VOICES:
            return reply({"code": "not-found", "error": f"Voice {voice} does not exist."}, 404)
        return reply(VOICES[voice])

    @speech.get("/v1/custom-voices")
    def custom_voices() -> Answer:
        return reply({"voices": []})

    @speech.post("/v1/custom-voices")
    def create_voice() -> Answer:
        one_content_type("multipart/form-data")
        return reply({"voice_id": f"voice_{g.request_id}", "name": request.form.get("name", "")})

    return speech


def speak_messages(client: WebSocket) -> None:
    for message in client.messages():
        if message.get("type") == "text.delta":
            client.send_json({"type": "audio.delta", "delta": base64.b64encode(AUDIO).decode()})
        elif message.get("type") == "text.done":
            client.send_json({"type": "audio.done"})


def transcribe_messages(client: WebSocket) -> None:
    """Binary messages are audio; text messages are events."""
    client.send_json({"type": "transcript.created"})
    for message in client.messages(binary=True):
        if isinstance(message, bytes):
            client.send_json(partial(final=False))
        elif message.get("type") == "finalize":
            client.send_json(partial(final=True))
        elif message.get("type") == "audio.done":
            client.send_json({"type": "transcript.done", "text": TRANSCRIPT, "duration": 1.0})
            client.close(1000)


def partial(final: bool) -> dict[str, object]:
    return {
        "type": "transcript.partial",
        "text": TRANSCRIPT,
        "is_final": final,
        "speech_final": final,
    }
