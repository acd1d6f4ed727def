"""Speech from text and text from speech, over HTTP and over WebSockets, and the voices for it; no sound is made."""

from __future__ import annotations

import base64

from flask import Blueprint, g, request

from xaiproxy.sandbox.bodies import json_body, one_content_type, unprocessable
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.websocket import WebSocket, upgrade

AUDIO = bytes(range(256)) * 64  # what is said, whatever the text
VOICES = {
    name.lower(): {"voice_id": name.lower(), "name": name}
    for name in ("Ara", "Eve", "Leo", "Rex", "Sal")
}
HEARD = "This is the sandbox"  # whatever the audio


def create(grants: Grants) -> Blueprint:
    speech = Blueprint("speech", __name__)

    @speech.post("/v1/tts")
    def speak() -> Answer:
        json_body(text=str)
        return Answer(AUDIO, content_type="audio/mpeg")

    @speech.get("/v1/tts")
    def speak_on() -> Answer:
        return upgrade(grants, speak_what_is_written)

    @speech.post("/v1/stt")
    def transcribe() -> Answer:
        one_content_type("multipart/form-data")
        if "file" not in request.files:
            unprocessable("missing field `file`")
        return reply({"text": HEARD, "language": "en", "duration": 1.0, "words": []})

    @speech.get("/v1/stt")
    def transcribe_on() -> Answer:
        return upgrade(grants, write_what_is_said)

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


def speak_what_is_written(client: WebSocket) -> None:
    for said in client.messages():
        if said.get("type") == "text.delta":
            client.tell({"type": "audio.delta", "delta": base64.b64encode(AUDIO).decode()})
        elif said.get("type") == "text.done":
            client.tell({"type": "audio.done"})


def write_what_is_said(client: WebSocket) -> None:
    """Binary messages are audio; text ones are events."""
    client.tell({"type": "transcript.created"})
    for said in client.messages(binary=True):
        if isinstance(said, bytes):
            client.tell(partial(final=False))
        elif said.get("type") == "finalize":
            client.tell(partial(final=True))
        elif said.get("type") == "audio.done":
            client.tell({"type": "transcript.done", "text": HEARD, "duration": 1.0})
            client.close(1000)


def partial(final: bool) -> dict[str, object]:
    return {"type": "transcript.partial", "text": HEARD, "is_final": final, "speech_final": final}
