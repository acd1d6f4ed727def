"""The remembered quota: the account that it belongs to, and files that are not one."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from xaiproxy import config, errors, quota
from xaiproxy.quota import Quota
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import Login

NOW = 1_800_000_000.0
QUOTA = Quota(NOW, 42.5, "weekly", NOW - 86400, NOW + 86400, 2500, "SuperGrok Heavy")
MEMBERS = {
    "refresh_token": "rt",
    "expires_at": NOW,
    "issuer": config.DEFAULT_ISSUER,
    "client_id": config.DEFAULT_CLIENT_ID,
}


def jwt(subject: str, number: int = 1) -> str:
    payload = base64.urlsafe_b64encode(json.dumps({"sub": subject, "jti": number}).encode())
    return f"e30.{payload.decode().rstrip('=')}.signature"


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    environ = {"XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json")}
    return TokenStore(config.from_environ(environ, dotenv_path=os.devnull))


def sign_in(store: TokenStore, token: str, **members: Any) -> Login:
    """Write a login as the token file."""
    store.path.write_text(json.dumps({**MEMBERS, "access_token": token, **members}))
    return store.load()


def test_a_quota_is_read_as_it_was_written(store: TokenStore):
    assert quota.read(store) is None
    login = sign_in(store, "opaque", account="you@example.org")
    for written in (QUOTA, Quota(NOW, 0), dataclasses.replace(QUOTA, used_percent=100.0)):
        quota.write(store, login, written)
        assert quota.read(store) == written
    assert store.quota_path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in store.path.parent.iterdir()) == [
        "tokens.json",
        "tokens.json.quota",
    ]


def test_the_file_has_neither_a_token_nor_the_name_of_the_account(store: TokenStore):
    login = sign_in(store, "opaque-token", account="you@example.org")
    quota.write(store, login, QUOTA)
    content = store.quota_path.read_text()
    assert "opaque-token" not in content and "you@" not in content


@pytest.mark.parametrize(
    "former, renewed, another",
    [
        (
            {"token": "one", "account": "you@example.org"},
            {"token": "two", "account": "you@example.org"},
            {"token": "two", "account": "me@example.org"},
        ),
        ({"token": jwt("you")}, {"token": jwt("you", 2)}, {"token": jwt("me")}),
        ({"token": "one"}, {"token": "one", "expires_at": NOW + 1}, {"token": "two"}),
    ],
    ids=["by address", "by subject", "by token"],
)
def test_a_quota_belongs_to_its_account(
    store: TokenStore, former: dict[str, Any], renewed: dict[str, Any], another: dict[str, Any]
):
    quota.write(store, sign_in(store, **former), QUOTA)
    sign_in(store, **renewed)
    assert quota.read(store) == QUOTA
    sign_in(store, **another)
    assert quota.read(store) is None
    sign_in(store, **former)
    assert quota.read(store) == QUOTA
    store.path.unlink()
    assert quota.read(store) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"used_percent": "42"},
        {"used_percent": -1},
        {"used_percent": 1001},
        {"used_percent": float("nan")},
        {"used_percent": True},
        {"used_percent": None},
        {"asked_at": "now"},
        {"resets_at": 1e12},
        {"prepaid_cents": float("inf")},
        {"prepaid_cents": []},
        {"period": "week\x1b[2J"},
        {"period": None},
        {"tier": "<script>"},
        {"tier": 7},
        {"account": "another"},
    ],
    ids=str,
)
def test_a_file_with_a_wrong_member_is_none(store: TokenStore, changes: dict[str, Any]):
    quota.write(store, sign_in(store, "one"), QUOTA)
    content = json.loads(store.quota_path.read_text())
    store.quota_path.write_text(json.dumps({**content, **changes}))
    assert quota.read(store) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{half", b"[]", b"7", b"\xff", b"[" * 4096, b'{"account": 1}', b"{}" + b" " * 9999],
)
def test_another_programs_file_is_none_and_is_replaced(store: TokenStore, content: bytes):
    login = sign_in(store, "one")
    store.quota_path.write_bytes(content)
    assert quota.read(store) is None
    quota.write(store, login, QUOTA)
    assert quota.read(store) == QUOTA


def test_a_planted_fifo_or_link_is_not_followed(store: TokenStore, tmp_path: Path):
    login = sign_in(store, "one")
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        store.quota_path.unlink(missing_ok=True)
        make(store.quota_path)
        assert quota.read(store) is None
        quota.write(store, login, QUOTA)
        assert quota.read(store) == QUOTA and store.quota_path.is_file()
        assert not (tmp_path / "elsewhere").exists()


def test_a_quota_that_cannot_be_written_names_the_file(store: TokenStore):
    login = sign_in(store, "one")
    store.quota_path.mkdir()
    with pytest.raises(errors.StorageError, match=r"tokens.json.quota cannot be written: .*move"):
        quota.write(store, login, QUOTA)
    store.quota_path.rmdir()
    assert [path.name for path in store.path.parent.iterdir()] == ["tokens.json"]
