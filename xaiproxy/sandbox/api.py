"""api.x.ai: models, chat completions, responses and the shapes of body that a proxy has to carry."""
from __future__ import annotations

import time
import uuid
from typing import Any, Iterator

from flask import Blueprint, abort, g, request

from xaiproxy.sandbox import stream
from xaiproxy.sandbox.bodies import json_body, one_content_type, unprocessable
from xaiproxy.sandbox.grants import CLIENT_ID, USER, Grants
from xaiproxy.sandbox.replies import Answer, compact, reply
from xaiproxy.sandbox.xai_errors import TEAM, error

MODELS = ("grok-4.6", "grok-4.5", "grok-4.3", "grok-build-0.1", "grok-imagine-image")
AUDIO = bytes(range(256)) * 64  # what /v1/tts says, whatever it is asked to
BODY_FIRST = {"api.responses"}  # xAI looks at the body of these before it looks at the token


def create(grants: Grants) -> Blueprint:
    api = Blueprint("api", __name__, url_prefix="/v1")
    knobs, witness = grants.knobs, grants.witness
    files: dict[str, dict[str, Any]] = {}
    deferred: dict[str, list[Answer]] = {}  # the answers still to be given

    @api.before_request
    def begin() -> None:
        g.request_id = str(uuid.uuid4())
        if request.endpoint not in BODY_FIRST and request.method != "OPTIONS":
            check_token()

    def check_token() -> None:
        values = request.headers.getlist("Authorization")
        kind, _, token = values[0].partition(" ") if values else ("", "", "")
        refusal = None
        if not values:
            refusal = "no_credentials"
        elif kind.lower() != "bearer" or not token or "," in token:
            refusal = "invalid_header"
        elif token.startswith("xai-"):
            refusal = "wrong_api_key"
        elif not grants.check(token):
            refusal = "bad_credentials"
        if refusal:
            witness.count("refused_tokens")
            old = "_old" * (knobs.old_shape and refusal.endswith("credentials"))
            answer = error(refusal + old)
            if refusal == "bad_credentials":
                answer.status_code = knobs.dead_token_status
            abort(answer)

    @api.after_request
    def xai_headers(answer: Answer) -> Answer:
        answer.headers.extend({
            "Strict-Transport-Security": "max-age=31536000", "Server-Timing": 'cfCacheStatus;desc="DYNAMIC"',
            "x-request-id": g.request_id, "x-zero-data-retention": "false", "x-data-retention": "general",
            "vary": "origin", "access-control-allow-origin": "*", "access-control-expose-headers": "*",
            "cf-cache-status": "DYNAMIC"})
        if answer.status_code == 200:
            answer.headers.extend({
                "x-ratelimit-limit-tokens": "50000000", "x-ratelimit-remaining-tokens": "49999488",
                "x-ratelimit-limit-requests": "7200", "x-ratelimit-remaining-requests": "7199",
                "x-metrics-ttft-ms": "264.4"})
        return answer

    def streamed(events: Iterator[bytes], failure: bytes) -> Answer:
        handler = request.environ["sandbox.handler"]
        handler.close_delimited = knobs.framing == "close"
        answer = Answer(content_type="text/event-stream")
        events = stream.troubled(events, failure, knobs)
        if knobs.framing == "length":
            events = list(events)
            answer.content_length = sum(map(len, events))
        answer.response = stream.paced(events, knobs, handler, witness.counters)
        return answer

    @api.get("/models")
    def models() -> Answer:
        return reply({"object": "list", "data": [model(name) for name in MODELS]})

    @api.get("/models/<path:name>")
    def one_model(name: str) -> Answer:
        return reply(model(known(name)))

    @api.get("/language-models")
    def language_models() -> Answer:
        return reply({"models": [{**model(name), "input_modalities": ["text"], "output_modalities": ["text"],
                                  "prompt_text_token_price": 20000} for name in MODELS[:4]]})

    @api.post("/chat/completions")
    def chat() -> Answer:
        body = json_body(model=str, messages=list)
        name, pieces = known(body["model"]), stream.deltas(knobs.events, knobs.event_size)
        if body.get("stream") and body.get("deferred"):
            sentence = "A request may either be streaming or deferred, but not both."
            return Answer(compact(sentence), 400, content_type="application/json")
        if body.get("stream"):
            return streamed(stream.chat_events(g.request_id, name, pieces), stream.CHAT_ERROR)
        message = {"role": "assistant", "content": "".join(pieces), "reasoning_content": "Hm.",
                   "refusal": None}
        answer = reply({
            "id": g.request_id, "object": "chat.completion", "created": int(time.time()), "model": name,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": stream.usage(len(pieces)), "system_fingerprint": "fp_0000000000",
            "service_tier": "default"})
        if body.get("deferred"):
            deferred[g.request_id] = [answer, Answer(status=202)]
            return reply({"request_id": g.request_id})
        return answer

    @api.get("/chat/deferred-completion/<request_id>")
    def deferred_completion(request_id: str) -> Answer:
        if not deferred.get(request_id):
            return reply({"code": "not-found", "error": "No such deferred completion."}, 404)
        return deferred[request_id].pop()  # 202 at first, then the answer, once

    @api.post("/responses")
    def responses() -> Answer:
        body = json_body(model=str, input=(str, list))
        check_token()
        pieces = stream.deltas(knobs.events, knobs.event_size)
        part = {"type": "output_text", "text": "".join(pieces), "logprobs": [], "annotations": []}
        response = {
            "created_at": int(time.time()), "id": g.request_id, "max_output_tokens": None,
            "model": known(body["model"]), "object": "response",
            "output": [{"id": f"msg_{g.request_id}", "type": "message", "role": "assistant",
                        "content": [part], "status": "completed"}],
            "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "temperature": None,
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
            "user": None, "incomplete_details": None, "status": "completed", "store": True, "metadata": {},
            "usage": stream.response_usage(len(pieces))}
        if body.get("stream"):
            return streamed(stream.response_events(response, pieces), stream.RESPONSE_ERROR)
        return reply(response)

    @api.post("/messages")
    def messages() -> Answer:
        body = json_body(model=str, messages=list, max_tokens=int)
        text = "".join(stream.deltas(knobs.events, knobs.event_size))
        return reply({"id": f"msg_{g.request_id}", "type": "message", "role": "assistant",
                      "content": [{"type": "text", "text": text}],
                      "model": known(body["model"]), "stop_reason": "end_turn", "stop_sequence": None,
                      "usage": {"input_tokens": 12, "output_tokens": knobs.events}})

    @api.post("/embeddings")
    def embeddings() -> Answer:
        body = json_body(model=str, input=(str, list))
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        vectors = [{"object": "embedding", "index": index, "embedding": [0.25, -0.5, 0.125]}
                   for index in range(len(texts))]
        return reply({"object": "list", "model": body["model"], "data": vectors,
                      "usage": {"prompt_tokens": 12, "total_tokens": 12}})

    @api.post("/tokenize-text")
    def tokenize() -> Answer:
        words = enumerate(json_body(model=str, text=str)["text"].split())
        return reply({"token_ids": [{"token_id": number, "string_token": word,
                                     "token_bytes": list(word.encode())} for number, word in words]})

    @api.post("/tts")
    def tts() -> Answer:
        json_body(text=str)
        return Answer(AUDIO, content_type="audio/mpeg")

    @api.get("/me")
    def me() -> Answer:
        return reply({"user_id": USER["sub"], "team_id": TEAM, "zdr_status": "disabled",
                      "team_blocked": False, "oauth": {"client_id": CLIENT_ID}, "api_key": None})

    @api.post("/files")
    def upload() -> Answer:
        one_content_type("multipart/form-data")
        if "file" not in request.files:
            unprocessable("missing field `file`")
        sent = request.files["file"]
        content = sent.read()
        name = f"file_{uuid.uuid4()}"
        files[name] = {"content": content, "about": {
            "id": name, "object": "file", "bytes": len(content), "created_at": int(time.time()),
            "filename": sent.filename, "purpose": request.form.get("purpose", "")}}
        return reply(files[name]["about"])

    @api.get("/files")
    def file_list() -> Answer:
        return reply({"object": "list", "data": [file["about"] for file in files.values()]})

    @api.post("/files:initialize")
    def initialize() -> Answer:
        body = json_body(filename=str)
        return reply({"id": f"file_{uuid.uuid4()}", "object": "file", "filename": body["filename"]})

    @api.route("/files/<name>", methods=["GET", "DELETE"])
    def one_file(name: str) -> Answer:
        about = existing(name)["about"]
        if request.method == "GET":
            return reply(about)
        del files[name]
        return reply({"id": name, "object": "file", "deleted": True})

    @api.get("/files/<name>/content")
    def file_content(name: str) -> Answer:
        return reply(existing(name)["content"])

    def existing(name: str) -> dict[str, Any]:
        if name not in files:
            abort(reply({"code": "not-found", "error": f"File {name} does not exist."}, 404))
        return files[name]

    return api


def model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1750000000, "owned_by": "xai"}


def known(name: str) -> str:
    if name not in MODELS:
        answer = error("no_model")
        answer.set_data(answer.get_data().replace(b"grok-beta", name.encode()))
        abort(answer)
    return name
