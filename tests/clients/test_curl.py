"""curl through the proxy, with the commands that users try first."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from proxy_process import ProxyProcess
from sandbox import Sandbox

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
CHAT = '{"model":"grok-4.5","stream":true,"messages":[{"role":"user","content":"Hello"}]}'
JSON = ["-H", "Content-Type: application/json"]


def command(*arguments: str | Path) -> list[str | Path]:
    return ["curl", "-sS", "--max-time", "20", "--noproxy", "*", *arguments]


def curl(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), capture_output=True, check=True, **more)


def test_models_are_listed(endpoint: ProxyProcess) -> None:
    assert json.loads(curl(f"{endpoint.url}/v1/models").stdout)["data"][0]["id"] == "grok-4.6"


def test_a_head_request_has_the_same_length(endpoint: ProxyProcess) -> None:
    whole, head = (
        curl("-i", f"{endpoint.url}/v1/models").stdout,
        curl("-I", f"{endpoint.url}/v1/models").stdout,
    )
    length = len(whole.partition(b"\r\n\r\n")[2])
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    assert f"\r\nContent-Length: {length}\r\n".encode() in head


def test_a_stream_is_shown_at_once_and_cancelled_when_curl_ends(
    endpoint: ProxyProcess, sandbox: Sandbox
) -> None:
    sandbox.set(silence_after=3)
    with subprocess.Popen(
        command("-N", *JSON, "-d", CHAT, f"{endpoint.url}/v1/chat/completions"),
        stdout=subprocess.PIPE,
    ) as process:
        lines = [process.stdout.readline() for _ in range(6)]
        assert [line[:5] for line in lines[::2]] == [b"data:"] * 3
        process.terminate()
        sandbox.wait(
            lambda seen: (seen["cancelled_streams"], seen["open_streams"]) == (1, 0), seconds=1
        )


def test_a_stream_is_complete_by_http_1_0_too(endpoint: ProxyProcess) -> None:
    url = f"{endpoint.url}/v1/chat/completions"
    for version in ("--http1.1", "--http1.0"):
        assert curl("-N", version, *JSON, "-d", CHAT, url).stdout.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "how",
    [
        ["-H", "Expect: 100-continue"],
        ["-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked"],
        ["-H", "Expect:"],
    ],
    ids=["expect", "chunked", "at once"],
)
def test_an_uploaded_file_comes_back_unchanged(
    endpoint: ProxyProcess, sandbox: Sandbox, tmp_path: Path, how: list[str]
) -> None:
    content = bytes(range(256)) * 8000
    (tmp_path / "a.bin").write_bytes(content)
    done = curl(
        "-v", *how, "-F", "purpose=x", "-F", f"file=@{tmp_path}/a.bin", f"{endpoint.url}/v1/files"
    )
    assert (b"< HTTP/1.1 100 Continue" in done.stderr) == ("Expect: 100-continue" in how)
    file = json.loads(done.stdout)
    assert file["bytes"] == len(content)
    assert curl(f"{endpoint.url}/v1/files/{file['id']}/content").stdout == content


def test_a_request_arrives_unchanged(endpoint: ProxyProcess, sandbox: Sandbox) -> None:
    body = json.dumps({"model": "v1", "input": "é" * 100_000}).encode()
    curl(
        "--compressed",
        *JSON,
        "--data-binary",
        "@-",
        f"{endpoint.url}/v1/embeddings?a=%20b&c",
        input=body,
    )
    [seen] = sandbox.requests()
    assert (seen["method"], seen["target"]) == ("POST", "/v1/embeddings?a=%20b&c")
    assert (seen["body_length"], seen["body_sha256"]) == (
        len(body),
        hashlib.sha256(body).hexdigest(),
    )


def test_a_compressed_response_is_readable(endpoint: ProxyProcess, sandbox: Sandbox) -> None:
    sandbox.set(gzip="all")
    assert b"grok-4.5" in curl("--compressed", f"{endpoint.url}/v1/models").stdout
    assert curl(
        "--compressed", "-N", *JSON, "-d", CHAT, f"{endpoint.url}/v1/chat/completions"
    ).stdout.endswith(b"data: [DONE]\n\n")


def test_a_request_of_a_web_page_is_refused(endpoint: ProxyProcess, sandbox: Sandbox) -> None:
    for field in (
        "Origin: https://evil.example",
        "Host: evil.example",
        "Sec-Fetch-Site: cross-site",
    ):
        answer = json.loads(curl("-H", field, f"{endpoint.url}/v1/models").stdout)
        assert answer["error"]["code"] in ("origin_not_allowed", "host_not_allowed")
    assert sandbox.requests() == []
