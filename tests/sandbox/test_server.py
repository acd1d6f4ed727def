"""The sandbox refuses what xAI refuses, records the requests, and shuts down gracefully."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from checkout import ROOT
from sandbox import CHAT, DEVICE_CODE, FORM, Sandbox, body, status, until

from xaiproxy.sandbox.knobs import KNOBS

# Before both servers


@pytest.mark.parametrize(
    "host", [None, "localhost:{port}", "127.0.0.1", "api.x.ai", "127.0.0.1:{port}\r\nHost: b"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/.well-known/openid-configuration"])
def test_another_host_is_refused(sandbox: Sandbox, token: str, path: str, host: str | None) -> None:
    host = host and host.format(port=sandbox.port)
    answer = sandbox.raw(sandbox.head(f"GET {path}", Host=host, Authorization=f"Bearer {token}"))
    assert status(answer) == 403 and b"Attention Required!" in answer and b"not xAI" in answer


@pytest.mark.parametrize("agent", [None, ""])
@pytest.mark.parametrize("path", ["/v1/models", "/.well-known/openid-configuration"])
def test_a_request_without_user_agent_is_refused(
    sandbox: Sandbox, token: str, path: str, agent: str | None
) -> None:
    answer = sandbox.raw(
        sandbox.head(f"GET {path}", User_Agent=agent, Authorization=f"Bearer {token}")
    )
    assert status(answer) == 403 and answer.endswith(b"\r\n\r\nerror code: 1010")


@pytest.mark.parametrize(
    "broken",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / x HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
    ],
)
def test_an_ambiguous_message_is_refused(sandbox: Sandbox, broken: bytes) -> None:
    assert status(sandbox.raw(broken)) == 400
    assert sandbox.counters()["malformed"] == 1 and sandbox.counters()["requests"] == 0


def test_every_response_has_the_header_not_xai(sandbox: Sandbox, token: str) -> None:
    for path in (
        "/v1/models",
        "/v1/no",
        "/oauth2/device",
        "/oauth2/authorize",
        "/oauth/token",
        "/_sandbox",
    ):
        answer = sandbox.raw(sandbox.head(f"GET {path}", Authorization=f"Bearer {token}"))
        assert b"\r\nX-Sandbox: not xAI\r\n" in answer
        assert (b"text/html" in answer) == (b"<b>not xAI</b>" in answer) == ("oauth" in path)


# The API's refusals


@pytest.mark.parametrize(
    "authorization, refused, code",
    [
        (None, 401, "unauthenticated:no-credentials"),
        ("Basic eDp5", 401, "unauthenticated:no-credentials"),
        ("Bearer", 401, "unauthenticated:no-credentials"),
        ("Bearer unknown", 403, "unauthenticated:bad-credentials"),
        ("Bearer a\r\nAuthorization: Bearer b", 401, "unauthenticated:no-credentials"),
        ("Bearer xai-abc", 400, "invalid-argument"),
    ],
)
def test_bad_credentials_are_refused(
    sandbox: Sandbox, authorization: str, refused: int, code: str
) -> None:
    answer = sandbox.raw(sandbox.head("GET /v1/models", Authorization=authorization))
    assert status(answer) == refused and body(answer)["code"] == code
    assert sandbox.counters()["refused_tokens"] == 1


def test_a_dead_token_is_refused_compressed_only_if_the_client_allows_it(sandbox: Sandbox) -> None:
    sentence = {
        "code": "unauthenticated:bad-credentials",
        "error": "The OAuth2 access token could not be validated.",
    }
    for allowed, compressed in (
        (None, False),
        ("br, zstd", False),
        ("gzip;q=0", False),
        ("br, gzip", True),
    ):
        answer = sandbox.raw(
            sandbox.head("GET /v1/me", Authorization="Bearer x", Accept_Encoding=allowed)
        )
        assert status(answer) == 403 and (b"Content-Encoding: gzip" in answer) == compressed
        content = answer.partition(b"\r\n\r\n")[2]
        assert json.loads(gzip.decompress(content) if compressed else content) == sentence


def test_an_access_token_is_refused_from_its_expiry_on(sandbox: Sandbox) -> None:
    sandbox.set(access_token_lifetime=2)
    begun = time.time()
    login = sandbox.mint()
    assert login["expires_in"] == 2
    assert sandbox.get("/v1/models", login["access_token"])[0] == 200
    until(lambda: sandbox.get("/v1/models", login["access_token"])[0] == 403)
    assert time.time() > begun + 2


@pytest.mark.parametrize(
    "kind", [None, "text/plain", FORM, "application/json\r\nContent-Type: application/json"]
)
def test_a_body_without_one_right_content_type_is_refused(
    sandbox: Sandbox, token: str, kind: str
) -> None:
    answer = sandbox.raw(
        sandbox.head(
            "POST /v1/embeddings",
            Authorization=f"Bearer {token}",
            Content_Type=kind,
            Content_Length="2",
        ),
        b"{}",
    )
    assert (
        status(answer) == 415
        and b"Expected request with `Content-Type: application/json`" in answer
    )


def test_an_empty_body_is_refused(sandbox: Sandbox, token: str) -> None:
    assert (
        status(
            sandbox.raw(
                sandbox.head(
                    "POST /v1/embeddings",
                    Authorization=f"Bearer {token}",
                    Content_Type="application/json",
                    Content_Length="0",
                )
            )
        )
        == 415
    )


@pytest.mark.parametrize(
    "path, sent, problem",
    [
        ("/v1/chat/completions", {"model": "grok-4.5"}, "missing field `messages`"),
        ("/v1/chat/completions", {"model": 3, "messages": []}, "model: invalid type"),
        ("/v1/responses", {"model": "grok-4.5"}, "missing field `input`"),
        ("/v1/embeddings", "[]", "expected a map"),
        ("/v1/tts", "{", "expected value"),
    ],
)
def test_an_invalid_body_is_refused(
    sandbox: Sandbox, token: str, path: str, sent: Any, problem: str
) -> None:
    refused, answer = sandbox.post(path, sent, token, Content_Type="application/json")
    assert refused == 422 and problem in answer["error"]


def test_responses_checks_the_body_before_the_token(sandbox: Sandbox) -> None:
    assert sandbox.post("/v1/responses", {"model": "grok-4.5"})[0] == 422
    assert sandbox.post("/v1/responses", {"model": "grok-4.5", "input": "x"})[0] == 401


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/v1/models", "/models", "/v1//models", "/v1/audio/transcriptions"]
)
def test_an_unknown_route_is_not_found(sandbox: Sandbox, path: str) -> None:
    refused, answer = sandbox.get(path)
    assert refused == 404 and answer["error"].startswith("No handler found on route.")


def test_an_unknown_model_is_not_found(sandbox: Sandbox, token: str) -> None:
    refused, answer = sandbox.post("/v1/chat/completions", {**CHAT, "model": "grok-0"}, token)
    assert refused == 404 and answer["error"].startswith("The model grok-0 does not exist")


def test_another_method_is_not_allowed(sandbox: Sandbox, token: str) -> None:
    answer = sandbox.raw(sandbox.head("GET /oauth2/token"))
    assert status(answer) == 405 and b"\r\nAllow: " in answer


# The rest of the API


def test_a_chat_completion_has_content_and_usage(sandbox: Sandbox, token: str) -> None:
    sandbox.set(events=3)
    answer = sandbox.raw(sandbox.chat(token).replace(b"true", b"   0"))
    completion = body(answer)
    assert (
        completion["choices"][0]["message"]["content"] == "This is the."
        and completion["usage"]["total_tokens"] == 18
    )
    for field in (
        f"x-request-id: {completion['id']}",
        "x-ratelimit-limit-requests: 7200",
        "Server: cloudflare",
        "Set-Cookie: __cf_bm=sandbox; Path=/; HttpOnly",
        "Content-Type: application/json",
    ):
        assert f"\r\n{field}\r\n".encode() in answer


def test_an_answer_is_one_whole_sentence(sandbox: Sandbox, token: str) -> None:
    answer = body(sandbox.raw(sandbox.chat(token).replace(b"true", b"   0")))
    sentence = answer["choices"][0]["message"]["content"]
    assert sentence.startswith("This is the sandbox, not xAI: ") and sentence.endswith(" read.")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "messages, choice, called",
    [
        ([user("weather?")], None, True),
        ([user("Hello")], None, False),
        ([user("weathered")], None, False),
        (
            [user([{"type": "text", "text": "Hello"}, {"type": "text", "text": "weather"}])],
            "auto",
            True,
        ),
        (
            [user([{"type": "text", "text": "weather"}, {"type": "text", "text": "Hello"}])],
            "auto",
            False,
        ),
        ([user("weather"), {"role": "system", "content": "Be brief."}], None, True),
        ([user("weather"), {"role": "assistant", "content": "weather"}], None, False),
        ([], None, False),
        ([user("weather"), {"role": "tool", "content": "weather: fog"}], None, False),
        ([user("weather")], "none", False),
        ([user("Hello")], "required", True),
        ([user("Hello")], {"type": "function", "function": {"name": "weather"}}, True),
    ],
)
def test_a_tool_is_called_only_if_the_user_names_it_or_it_is_required(
    sandbox: Sandbox, token: str, messages: list[Any], choice: Any, called: bool
) -> None:
    """Agents bring tools that run commands: no other prompt may call one."""
    properties = {
        "where": {"type": "string"},
        "unit": {"enum": ["K", "C"]},
        "days": {"type": "integer"},
    }
    tools = [
        {"type": "web_search"},
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": ["where", "unit"],
                },
            },
        },
    ]
    body = {
        "model": "grok-4.5",
        "messages": messages,
        "tools": tools,
        **({"tool_choice": choice} if choice else {}),
    }
    [choice] = sandbox.post("/v1/chat/completions", body, token)[1]["choices"]
    assert (
        (choice["finish_reason"] == "tool_calls") == ("tool_calls" in choice["message"]) == called
    )
    for call in choice["message"].get("tool_calls", []):
        assert call["function"] == {
            "name": "weather",
            "arguments": '{"where":"sandbox","unit":"K"}',
        }


def test_a_deferred_completion_is_fetched_once(sandbox: Sandbox, token: str) -> None:
    refused = sandbox.post("/v1/chat/completions", {**CHAT, "deferred": True}, token)
    assert refused == (400, "A request may either be streaming or deferred, but not both.")
    deferred = {**CHAT, "stream": False, "deferred": True}
    path = sandbox.post("/v1/chat/completions", deferred, token)[1]["request_id"]
    answers = [sandbox.get(f"/v1/chat/deferred-completion/{path}", token) for _ in range(3)]
    assert (
        answers[0] == (202, b"")
        and answers[1][1]["object"] == "chat.completion"
        and answers[2][0] == 404
    )


def test_an_uploaded_file_is_downloaded_unchanged(sandbox: Sandbox, token: str) -> None:
    content = bytes(range(256)) * 5000
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nx\r\n--b\r\n'
        b'Content-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    kind = "multipart/form-data; boundary=b"
    about = sandbox.post("/v1/files", form, token, Content_Type=kind)[1]
    assert (about["bytes"], about["filename"], about["purpose"]) == (len(content), "a.bin", "x")
    path = f"/v1/files/{about['id']}"
    assert sandbox.get(path, token) == (200, about)
    assert about in sandbox.get("/v1/files", token)[1]["data"]
    assert sandbox.get(f"{path}/content", token) == (200, content)
    assert sandbox.request("DELETE", path, token=token)[1]["deleted"]
    assert sandbox.get(f"{path}/content", token)[0] == 404
    assert sandbox.post("/v1/files", b"--b--\r\n", token, Content_Type=kind)[0] == 422


@pytest.mark.parametrize(
    "method, path, sent, expected",
    [
        ("GET", "/v1/models/grok-4.5", None, '"id": "grok-4.5"'),
        ("GET", "/v1/language-models", None, "input_modalities"),
        ("POST", "/v1/responses", {"model": "grok-4.5", "input": "x"}, '"status": "completed"'),
        ("POST", "/v1/embeddings", {"model": "e", "input": ["x", "y"]}, '"index": 1'),
        (
            "POST",
            "/v1/messages",
            {"model": "grok-4.5", "messages": [], "max_tokens": 1},
            "end_turn",
        ),
        ("POST", "/v1/tokenize-text", {"model": "grok-4.5", "text": "a b"}, '"string_token": "b"'),
        ("POST", "/v1/files:initialize", {"filename": "a"}, '"filename": "a"'),
    ],
)
def test_other_paths_respond_with_a_token_only(
    sandbox: Sandbox, token: str, method: str, path: str, sent: Any, expected: str
) -> None:
    accepted, answer = sandbox.request(method, path, sent, token)
    assert accepted == 200 and expected in json.dumps(answer)
    assert sandbox.request(method, path, sent)[0] == 401


def test_speech_is_binary(sandbox: Sandbox, token: str) -> None:
    assert sandbox.post("/v1/tts", {"text": "x"}, token) == (200, bytes(range(256)) * 64)


# The records


def test_requests_are_recorded_as_received(sandbox: Sandbox, token: str) -> None:
    target, sent = "/v1/models/a%2Fb:c%20d?x=%C3%A9&y=+&z", b"5\r\nhello\r\n0\r\n\r\n"
    sandbox.raw(
        sandbox.head(
            f"PATCH {target}",
            x_ODD="a  b",
            Authorization=f"Bearer {token}",
            Cookie="c=secret",
            X_Api_Key="secret",
            X_odd="\t2 ",
            Transfer_Encoding="chunked",
        )
        + sent
    )
    [seen] = sandbox.requests("/v1")
    assert (seen["method"], seen["target"], seen["status"]) == ("PATCH", target, 405)
    secret = hashlib.sha256(b"secret").hexdigest()
    assert seen["headers"] == [
        ["Host", f"127.0.0.1:{sandbox.port}"],
        ["User-Agent", "raw"],
        ["Connection", "close"],
        ["x-ODD", "a  b"],
        ["Authorization", "Bearer " + hashlib.sha256(token.encode()).hexdigest()],
        ["Cookie", hashlib.sha256(b"c=secret").hexdigest()],
        ["X-Api-Key", secret],
        ["X-odd", "2"],
        ["Transfer-Encoding", "chunked"],
    ]
    assert (seen["body_length"], seen["body_sha256"]) == (5, hashlib.sha256(b"hello").hexdigest())


def test_a_body_is_recorded_while_it_arrives(sandbox: Sandbox) -> None:
    with socket.create_connection(("127.0.0.1", sandbox.port)) as connection:
        connection.sendall(sandbox.head("POST /v1/files", Content_Length="100000") + b"x" * 50000)
        until(lambda: [seen for seen in sandbox.requests() if seen["body_length"] > 32767])
        [seen] = sandbox.requests()
        assert seen["body_sha256"] is None and seen["status"] is None
    sandbox.wait(lambda seen: seen["cancelled_requests"] == 1)


def test_connections_are_counted_and_numbered(sandbox: Sandbox) -> None:
    again = sandbox.head("GET /oauth2/device", Connection="keep-alive")
    sandbox.raw(again, again, sandbox.head("GET /oauth2/device"))
    sandbox.get("/oauth2/device")
    seen = sandbox.counters()
    assert (seen["requests"], seen["connections"]) == (4, 2)
    assert len({request["connection"] for request in sandbox.requests()[:3]}) == 1


def test_no_response_waits_for_an_acknowledgement(sandbox: Sandbox) -> None:
    """Without TCP_NODELAY every response on a connection in use takes 40 ms."""
    connection = http.client.HTTPConnection(sandbox.host, sandbox.port)
    with contextlib.closing(connection):
        times = []
        for _ in range(11):
            begun = time.monotonic()
            connection.request("GET", "/oauth2/device", headers={"User-Agent": "x"})
            connection.getresponse().read()
            times.append(time.monotonic() - begun)
    assert sorted(times)[5] < 0.03


def test_no_token_is_in_the_records(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    sandbox.refresh(login["refresh_token"])
    sandbox.get("/v1/me", login["access_token"])
    shown = json.dumps([sandbox.get(f"/_sandbox{path}")[1] for path in ("", "/requests", "/knobs")])
    assert login["refresh_token"] not in shown and login["access_token"] not in shown
    granted = [seen["grant_type"] for seen in sandbox.requests("/oauth2/token")]
    assert granted == [DEVICE_CODE, "refresh_token"]


def test_every_token_can_be_revoked_at_once(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    sandbox.kill()
    assert sandbox.get("/v1/me", login["access_token"])[0] == 403
    accepted, login = sandbox.refresh(login["refresh_token"])
    assert accepted == 200 and sandbox.get("/v1/me", login["access_token"])[0] == 200
    assert sandbox.post("/_sandbox/revoke", {"what": "all"})[0] == 400


def test_every_login_can_be_ended_at_once() -> None:
    with Sandbox("--events", "3", gzip="none") as sandbox:
        login = sandbox.mint()
        sandbox.kill("logins")
        assert sandbox.refresh(login["refresh_token"])[0] == 400
        sandbox.set(events=4)
        # To the knobs of the command line.
        sandbox.reset()
        assert sandbox.get("/_sandbox/knobs")[1]["events"] == 3


# The command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "xaiproxy.sandbox", *arguments],
        timeout=20,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--events", "-1"], "events must be a whole number from 0"),
        (["--bind", "0.0.0.0"], "--bind must be a loopback address, not 0.0.0.0"),
        (["--bind", "x"], "not x"),
        (["--port", "65536"], "--port must be 0 to 65535, not 65536"),
        (["--port", "x"], "--port: invalid int value: 'x'"),
    ],
)
def test_bad_usage_is_one_sentence(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert complaint in done.stderr and done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_sentence(sandbox: Sandbox) -> None:
    done = run("--port", str(sandbox.port))
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == (
        f"xai-sandbox: cannot listen on 127.0.0.1 port {sandbox.port}: Address already in "
        "use; stop the program that uses it, or choose another --port\n"
    )


def test_the_help_names_every_knob() -> None:
    shown = run("--help").stdout
    assert [name for name in KNOBS if f"--{name.replace('_', '-')} VALUE" not in shown] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_sandbox_with_a_stream_open(number: int) -> None:
    with Sandbox(silence_after=1) as sandbox:
        folder = pathlib.Path(sandbox.env["XAI_PROXY_TOKEN_PATH"]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        with sandbox.streaming(sandbox.chat(sandbox.mint()["access_token"])):
            sandbox.process.send_signal(number)
            assert sandbox.process.wait(5) == 0
        assert not folder.exists()


def test_a_given_folder_is_kept_and_a_request_is_logged(tmp_path: pathlib.Path) -> None:
    with Sandbox("--state", str(tmp_path), "--verbose") as sandbox:
        assert sandbox.env["XAI_PROXY_TOKEN_PATH"] == f"{tmp_path}/tokens.json"
        assert sandbox.env["XAI_PROXY_UPSTREAM"] == sandbox.url
        sandbox.write_login(tmp_path / "tokens.json")
        # A line is written after its response is sent.
        until(lambda: sandbox.stderr().count("\n") == 3)
        assert '"POST /oauth2/token HTTP/1.1" 200' in sandbox.stderr()
    assert (tmp_path / "tokens.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_the_sandbox_listens_on_ipv6_loopback_too() -> None:
    with Sandbox("--bind", "::1") as sandbox:
        assert sandbox.url.startswith("http://[::1]:") and sandbox.mint()["token_type"] == "Bearer"
