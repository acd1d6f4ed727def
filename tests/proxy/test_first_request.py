"""The request that the log suggests: a real shell and a real curl run it as it is printed."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from proxy_process import ISSUER, ProxyProcess
from scripted_upstream import ScriptedUpstream
from token_files import make_store, save

from xaiproxy import tokens

KEY = "xaip_the-client-key"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def write_keys(folder: Path) -> None:
    (folder / "client-keys").write_text(f"me {hashlib.sha256(KEY.encode()).hexdigest()}\n")


def sign_in(folder: Path, expires_in: float = 3600, **members: Any) -> None:
    """Write a login before the proxy starts."""
    expires_at = time.time() + expires_in
    login = tokens.Login("the-token", expires_at, "the-refresh-token", issuer=ISSUER, **members)
    save(make_store(folder), login)


def suggestion(proxy: ProxyProcess) -> str:
    """The message of the line after that of the address."""
    line = proxy.wait_for_log(lambda line: "try: curl " in line["message"])
    lines = proxy.log_lines()
    assert lines[lines.index(line) - 1]["message"].startswith("listening on ")
    assert line["level"] == "info"
    return line["message"]


@needs_curl
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "0.0.0.0", "::", "127.1.2.3"])
def test_the_suggested_request_is_answered(
    tmp_path: Path, upstream: ScriptedUpstream, bind: str, keyed: bool
) -> None:
    if keyed:
        write_keys(tmp_path)
    sign_in(tmp_path)
    with ProxyProcess(tmp_path, bind=bind, allow_anonymous=1, upstream=upstream.origin) as proxy:
        text = suggestion(proxy)
        ready, line = text.split("; try: ")
        url = re.fullmatch(r"ready: (http://\S+/v1)", ready)[1]
        assert line.startswith("curl ") and f"{url}/models" in line
        assert ("$XAIPROXY_KEY" in line) == keyed
        with subprocess.Popen(
            ["sh", "-c", line],
            env={"XAIPROXY_KEY": KEY, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
        ) as curl:
            upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
            assert curl.communicate(timeout=20)[0] == b"done"


def test_without_a_login_signing_in_is_named_first(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path) as proxy:
        assert re.fullmatch(
            r"run `\S*xai-login --device` to sign in, then try: "
            rf"curl http://127\.0\.0\.1:{proxy.port}/v1/models",
            suggestion(proxy),
        )


def test_with_a_login_that_has_ended_signing_in_is_named_first(tmp_path: Path) -> None:
    error = tokens.RefreshError("invalid_grant", "", 1, terminal=True)
    sign_in(tmp_path, expires_in=-1, refresh_error=error)
    with ProxyProcess(tmp_path) as proxy:
        assert suggestion(proxy).startswith("run `")


def test_a_login_that_is_being_renewed_needs_no_step_and_is_not_ready(tmp_path: Path) -> None:
    sign_in(tmp_path, expires_in=-1)
    with ProxyProcess(tmp_path) as proxy:
        assert suggestion(proxy).startswith("try: curl ")


def test_without_a_key_that_is_valid_making_one_is_named_first(tmp_path: Path) -> None:
    sign_in(tmp_path)
    with ProxyProcess(tmp_path, client_keys_file=tmp_path / "missing") as proxy:
        assert re.fullmatch(
            r"make a client key with `\S*xai-client-key add NAME`, then try: curl -H "
            r'"Authorization: Bearer \$XAIPROXY_KEY" http://\S+/v1/models',
            suggestion(proxy),
        )
