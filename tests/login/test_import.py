"""xai-login --import: a login comes from OpenAB's proxy, and from no file of another kind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from login_command import Login
from refresher_process import Process
from sandbox import Sandbox

from xaiproxy import token_store

GROK_CLI = {
    "https://auth.x.ai::b1a00492-073a-47ea-816f-4c329264a828": {
        "key": "secret-access",
        "refresh_token": "secret-refresh",
        "auth_mode": "oidc",
        "expires_at": "2026-11-23T12:00:00Z",
        "email": "user@example.com",
        "oidc_issuer": "https://auth.x.ai",
    }
}
DEFAULTS = {"XAI_PROXY_ISSUER": "https://auth.x.ai", "XAI_PROXY_UPSTREAM": "https://api.x.ai"}
PROGROK = {"accessToken": "secret-access", "refreshToken": "secret-refresh", "expiresAt": 1}


@pytest.fixture
def file(tmp_path: Path, sandbox: Sandbox) -> Path:
    """tokens.json of openab-auth-proxy, with a login of the sandbox."""
    granted = sandbox.mint()
    sandbox.reset()
    path = tmp_path / "theirs" / "tokens.json"
    path.parent.mkdir()
    write(
        path,
        {
            "access_token": granted["access_token"],
            "refresh_token": granted["refresh_token"],
            "expires_at": 4_000_000_000,
            "token_endpoint": f"{sandbox.url}/oauth2/token",
        },
    )
    return path


def write(path: Path, content: dict[str, Any] | str) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    path.chmod(0o600)


def edit(path: Path, **members: Any) -> None:
    write(path, json.loads(path.read_text()) | members)


def members(path: Path, *names: str) -> list[Any]:
    saved = json.loads(path.read_text())
    return [saved[name] for name in names]


TOKENS = ("access_token", "refresh_token")


def test_a_login_is_imported_and_then_renewed(login: Login, sandbox: Sandbox, file: Path) -> None:
    theirs = file.read_bytes()
    done = login.run("--import", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"Imported the login of an unnamed account at {sandbox.url} into {login.path}.\n"
    )
    warning, _, advice = done.stderr.splitlines()
    assert warning.startswith(f"Stop the program that wrote {file} ")
    assert advice == f"Remove {file}: the first renewal makes it worthless."
    assert login.path.stat().st_mode & 0o777 == 0o600 and file.read_bytes() == theirs
    assert members(login.path, *TOKENS) == members(file, *TOKENS)
    assert members(login.path, "issuer", "client_id") == [
        sandbox.url,
        "b1a00492-073a-47ea-816f-4c329264a828",
    ]
    login.holds_no_secret(done.stdout, done.stderr)
    assert sandbox.requests("/oauth2/token") == []
    edit(login.path, expires_at=1)
    assert Process(sandbox, login.path, "--once").wait() == 0
    # The second import has the spent token, as in a container that starts again.
    renewed = login.path.read_bytes()
    assert members(login.path, "refresh_token") != members(file, "refresh_token")
    again = login.run("--json", "--import", str(file))
    assert again.returncode == 0 and json.loads(again.stdout)["changed"] is False
    assert login.path.read_bytes() == renewed


def test_an_expired_access_token_is_imported_since_it_can_be_renewed(
    login: Login, file: Path
) -> None:
    edit(file, expires_at=1_700_000_000)
    done = login.run("--import", str(file))
    assert done.returncode == 0 and "expired at 2023-11-14" in done.stderr
    assert members(login.path, *TOKENS) == members(file, *TOKENS)


def test_a_login_of_xai_is_imported_without_a_network(login: Login, file: Path) -> None:
    edit(file, token_endpoint="https://auth.x.ai/oauth2/token")
    done = login.run("--import", str(file), HTTPS_PROXY="http://127.0.0.1:1", **DEFAULTS)
    assert done.returncode == 0 and " at https://auth.x.ai into " in done.stdout
    assert members(login.path, *TOKENS) == members(file, *TOKENS)


def test_the_default_path_of_their_proxy_needs_no_import(login: Login, file: Path) -> None:
    """Its file loads as it is; with the default settings both programs use the same path."""
    edit(file, token_endpoint="https://auth.x.ai/oauth2/token")
    environ = DEFAULTS | {"XAI_PROXY_TOKEN_PATH": str(file)}
    theirs = file.read_bytes()
    done = login.run("--import", str(file), **environ)
    assert done.returncode == 0 and done.stdout.startswith("Nothing to import: ")
    assert file.read_bytes() == theirs
    # The name of the setting in its successor.
    environ["AUTH_PROXY_TOKEN_PATH"] = environ.pop("XAI_PROXY_TOKEN_PATH")
    login.env.pop("XAI_PROXY_TOKEN_PATH")
    shown = login.run("--status", **environ)
    assert shown.returncode == 0 and str(file) in shown.stdout


def test_a_login_that_can_be_renewed_is_not_replaced(
    login: Login, sandbox: Sandbox, file: Path
) -> None:
    login.path.parent.mkdir(mode=0o700)
    sandbox.write_login(login.path)
    kept = login.path.read_bytes()
    done = login.run("--import", str(file))
    assert done.returncode == 78 and "can be renewed, and was not changed" in done.stderr
    assert login.path.read_bytes() == kept
    ended = {"code": "invalid_grant", "description": "", "at": 1, "terminal": True}
    edit(login.path, refresh_error=ended)
    assert login.run("--import", str(file)).returncode == 0
    assert members(login.path, *TOKENS) == members(file, *TOKENS)


def test_a_file_that_is_no_login_is_kept_aside(login: Login, file: Path) -> None:
    login.path.parent.mkdir(mode=0o700)
    write(login.path, "{")
    assert login.run("--import", str(file)).returncode == 0
    assert any(".corrupt-" in name for name in login.files())
    assert members(login.path, *TOKENS) == members(file, *TOKENS)


def linked(file: Path) -> None:
    file.rename(file.with_name("real.json"))
    file.symlink_to("real.json")


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (Path.unlink, 64, "cannot be read (No such file or directory)"),
        (linked, 64, "it is a symbolic link; name the token file itself"),
        (fifo, 64, "it is not a file; name the token file itself"),
        (folder, 64, "it is not a file; name the token file itself"),
        (lambda file: file.chmod(0o644), 64, "is open to other users (mode 0644)"),
        (
            lambda file: write(file, " " * token_store.SIZE_LIMIT + file.read_text()),
            64,
            "is longer than 1048576 bytes",
        ),
        (lambda file: write(file, ""), 64, "is not JSON"),
        (lambda file: write(file, "[1]"), 64, "is not a JSON object"),
        (lambda file: write(file, "[" * 100_000), 64, "is nested too deeply"),
        (lambda file: write(file, PROGROK), 64, "holds no access_token"),
        (lambda file: write(file, GROK_CLI), 77, "is the Grok CLI's own login"),
        (lambda file: edit(file, refresh_token=""), 77, "holds no refresh token"),
        (
            lambda file: edit(file, refresh_error={"code": "x", "at": 1, "terminal": True}),
            77,
            "holds a login that has ended",
        ),
        (lambda file: edit(file, issuer="https://id.example"), 78, "a login of https://id.example"),
        (
            lambda file: edit(file, token_endpoint="https://auth.x.ai/oauth2/token"),
            78,
            "a login of https://auth.x.ai",
        ),
        (
            lambda file: edit(file, token_endpoint="https://[id.example/token"),
            78,
            "of another issuer, as its token_endpoint shows",
        ),
    ],
)
def test_each_other_file_is_refused_and_nothing_changes(
    damage: Callable[[Path], Any], code: int, message: str, login: Login, file: Path
) -> None:
    secrets = [*members(file, *TOKENS), "secret-access", "secret-refresh"]
    damage(file)
    done = login.run("--import", str(file))
    *_, sentence = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert sentence.startswith(f"xai-login: {file} ") and message in sentence
    assert not any(secret in done.stderr for secret in secrets)
    assert not login.path.exists()


def test_a_login_of_another_issuer_is_refused_by_the_default_settings(
    login: Login, file: Path
) -> None:
    done = login.run("--import", str(file), **DEFAULTS)
    assert done.returncode == 78 and re.search("set XAI_PROXY_ISSUER and", done.stderr)
    assert not login.path.exists()
