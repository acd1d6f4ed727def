"""Files of the version before this one are read, and a version after it may add members.

tests/formats has a folder for each version whose files must be read: what it wrote, with the values
replaced. A release adds its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from token_files import make_store, save

from xaiproxy import (
    client_key_file,
    client_keys,
    config,
    key_uses,
    quota,
    refresher_status,
    tokens,
)
from xaiproxy.quota import Quota
from xaiproxy.refresher import call_record
from xaiproxy.refresher.calls import Record
from xaiproxy.refresher_status import Status
from xaiproxy.token_store import TokenStore

FORMATS = ROOT / "tests/formats"
AT = 1_790_000_000.0
MARK = tokens.fingerprint("example-refresh-token")
LOGIN = tokens.Login(
    "example-access-token",
    AT + 21600,
    "example-refresh-token",
    "https://auth.x.ai/oauth2/token",
    AT,
    scope="openid offline_access api:access",
    account="user@example.com",
    salt="0" * 32,
    refresh_error=tokens.RefreshError(
        "unreachable", "no connection", AT + 60, False, AT + 90, 2, 1, MARK
    ),
    refresh_try=tokens.RefreshTry(MARK, AT + 50, 1, AT + 90),
    asked=tokens.Asked(AT + 120, 120.0),
    extra={"of_another_program": 1},
)
STATUS = Status(
    AT,
    "unreachable",
    "no connection",
    AT + 90,
    "",
    tokens.fingerprint(LOGIN.access_token),
    dict.fromkeys(refresher_status.RESULTS, 3),
)
QUOTA = Quota(AT, 12.5, "weekly", AT, AT + 604800, 100.0, "SuperGrok")
RECORD = Record("renewal_failing x", AT, "renewal_failing x")

Change = Callable[[dict[str, Any]], dict[str, Any]]


def paths(store: TokenStore) -> dict[str, Path]:
    """The files of a token folder, by the name of what tests/formats has of each."""
    return {
        "login": store.path,
        "status": store.status_path,
        "quota": store.quota_path,
        "notify": store.notify_path,
    }


def as_written(values: dict[str, Any]) -> dict[str, Any]:
    return values


def with_more(values: dict[str, Any]) -> dict[str, Any]:
    """As a later version may write it: with members that this one does not know, at any depth."""
    more = {name: with_more(of) if isinstance(of, dict) else of for name, of in values.items()}
    return {**more, "of_a_later_version": {"any": [1, "value"]}}


@pytest.fixture(params=[as_written, with_more])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    store = make_store(tmp_path)
    for name, path in paths(store).items():
        values = json.loads((FORMATS / "0.1.0" / f"{name}.json").read_text())
        path.write_text(json.dumps(request.param(values)))
        path.chmod(0o600)
    return store


def test_each_file_is_read(store: TokenStore) -> None:
    login = store.load()
    known = {name: login.extra[name] for name in LOGIN.extra}
    assert dataclasses.replace(login, extra=known) == LOGIN
    status = refresher_status.read(store, login, AT)
    assert status is not None
    assert {name: status.refreshes[name] for name in STATUS.refreshes} == STATUS.refreshes
    assert dataclasses.replace(status, refreshes=STATUS.refreshes) == STATUS
    assert quota.read(store) == QUOTA
    with call_record.locked(store) as file:
        assert file.read() == RECORD


def test_members_of_a_later_version_survive_a_rewrite_of_the_login(store: TokenStore) -> None:
    before = json.loads(store.path.read_text())
    save(store, dataclasses.replace(store.load(), scope="changed"))
    after = json.loads(store.path.read_text())
    assert {"of_another_program": 1, "scope": "changed"}.items() <= after.items()
    assert after.get("of_a_later_version") == before.get("of_a_later_version")


def test_this_version_writes_what_the_former_reads(tmp_path: Path) -> None:
    """Members may be added; none that the former version needs may be missing or of another type."""
    store = make_store(tmp_path)
    save(store, LOGIN)
    assert refresher_status.write(store, STATUS)
    quota.write(store, LOGIN, QUOTA)
    with call_record.locked(store) as file:
        assert file.write(RECORD)
    for name, path in paths(store).items():
        former = json.loads((FORMATS / "0.1.0" / f"{name}.json").read_text())
        now = json.loads(path.read_text())
        assert now | former == now, name


def test_client_keys_are_accepted_and_kept(tmp_path: Path) -> None:
    for name, kept in (("client-keys", ".txt"), ("client-keys.used", ".json")):
        (tmp_path / name).write_bytes((FORMATS / "0.1.0" / (name + kept)).read_bytes())
    path = tmp_path / "client-keys"
    digest = client_keys.digest("example-client-key")
    assert client_keys.load(path) == {"laptop": digest}
    assert client_keys.made_at(client_keys.read(path)) == {"laptop": 1_700_000_000}
    assert key_uses.load(path) == {digest: 1_700_000_100.0}
    client_key_file.add(path, "phone", "another-key")
    assert client_keys.load(path)["laptop"] == digest


def test_each_setting_is_still_one() -> None:
    """A renamed setting would end the start, as every unknown XAI_PROXY_ name does."""
    path = FORMATS / "0.1.0" / "settings.env"
    before = dict(line.split("=", 1) for line in path.read_text().splitlines())
    assert not set(before) - set(config.SETTINGS)
    assert config.from_environ(before, dotenv_path=os.devnull).warnings == ()
