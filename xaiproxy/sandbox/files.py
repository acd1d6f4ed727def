"""Files: uploaded whole or in chunks, listed, read and deleted."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

from flask import Blueprint, abort, request

from xaiproxy.sandbox.bodies import json_body, one_content_type, unprocessable
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.xai_errors import error

EXPIRES_AFTER = range(3600, 2592001)  # seconds


def create(_grants: Grants) -> Blueprint:
    blueprint = Blueprint("files", __name__)
    files: dict[str, dict[str, Any]] = {}

    def add(filename: str, content: bytes, **more: Any) -> Answer:
        name = f"file_{uuid.uuid4()}"
        files[name] = {
            "content": content,
            "about": {
                "id": name,
                "object": "file",
                "bytes": len(content),
                "created_at": int(time.time()),
                "filename": filename,
                **more,
            },
        }
        return reply(files[name]["about"])

    def existing(name: str) -> dict[str, Any]:
        if name not in files:
            abort(reply({"code": "not-found", "error": f"File {name} does not exist."}, 404))
        return files[name]

    @blueprint.post("/v1/files")
    def upload() -> Answer:
        one_content_type("multipart/form-data")
        if "file" not in request.files:
            unprocessable("missing field `file`")
        sent = request.files["file"]
        return add(
            sent.filename or "", sent.read(), purpose=request.form.get("purpose", ""), **expiry()
        )

    @blueprint.get("/v1/files")
    def list_files() -> Answer:
        return reply({"object": "list", "data": [file["about"] for file in files.values()]})

    @blueprint.get("/v1/files/<name>")
    def one_file(name: str) -> Answer:
        return reply(existing(name)["about"])

    @blueprint.delete("/v1/files/<name>")
    def delete(name: str) -> Answer:
        existing(name)
        del files[name]
        return reply({"id": name, "object": "file", "deleted": True})

    @blueprint.get("/v1/files/<name>/content")
    def content(name: str) -> Answer:
        return reply(existing(name)["content"])

    @blueprint.post("/v1/files:initialize")
    def initialize() -> Answer:
        return add(json_body(filename=str)["filename"], b"")

    @blueprint.post("/v1/files:uploadChunks")
    def upload_chunk() -> Answer:
        body = json_body(file_id=str, chunk=str)
        file = existing(body["file_id"])
        file["content"] += base64.b64decode(body["chunk"])
        file["about"]["bytes"] = len(file["content"])
        return reply(file["about"])

    @blueprint.post("/v1/files/<name>/public-url")
    @blueprint.post("/v1/files/<name>/public-url/revoke")
    def public_url(name: str) -> Answer:
        if name not in files:
            # This is what xAI returns for a wrong id.
            return error("internal")
        return reply({"public_url": f"https://files.invalid/{name}"})

    return blueprint


def expiry() -> dict[str, int]:
    """expires_at from an upload's expires_after, plain or in OpenAI's two fields.

    Its field must precede the file.
    """
    form, sent = request.form, request.get_data()
    seconds = form.get("expires_after", form.get("expires_after[seconds]"))
    if seconds is None:
        return {}
    if sent.index(b'name="expires_after') > sent.index(b'name="file"'):
        invalid("expires_after must precede file.")
    if not seconds.isdigit() or int(seconds) not in EXPIRES_AFTER:
        invalid(
            f"expires_after must be between {EXPIRES_AFTER[0]} and {EXPIRES_AFTER[-1]} seconds."
        )
    return {"expires_at": int(time.time()) + int(seconds)}


def invalid(sentence: str) -> None:
    abort(reply({"code": "invalid-argument", "error": sentence}, 400))
