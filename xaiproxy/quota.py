"""The account's quota as it was last asked for: tokens.json.quota, beside the token file.

Only `xai-login --status --quota` asks and writes; every process may read. The file belongs to an
account, so that a sign-in with another one does not show the former's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from xaiproxy import errors, folder_file, state_file, storage, tokens
from xaiproxy.token_store import TokenStore

SIZE_LIMIT = 4096  # bytes; a real file has about 300
PERCENT_LIMIT = 1000.0  # a pool can be overdrawn
CENTS_LIMIT = 1e12
WORD = re.compile(r"[a-z_]{0,40}")
TIER = re.compile(r"[A-Za-z0-9 +_-]{0,40}")


@dataclasses.dataclass(frozen=True)
class Quota:
    """Times are unix seconds.

    `used_percent`: used share of the pool, which may be more than 100.
    `period`: name of the pool's period, such as "weekly", or "".
    `resets_at`: end of the period, or None if unknown.
    `prepaid_cents`: prepaid balance in US cents, or None if unknown.
    `tier`: plan of the account, or "".
    """

    asked_at: float
    used_percent: float
    period: str = ""
    starts_at: float | None = None
    resets_at: float | None = None
    prepaid_cents: float | None = None
    tier: str = ""

    def is_valid(self) -> bool:
        """Whether every member is what it must be: it may come from a server or another program."""
        times = (self.starts_at, self.resets_at)
        return (
            tokens.number(self.asked_at) is not None
            and _is_number(self.used_percent)
            and 0 <= self.used_percent <= PERCENT_LIMIT
            and all(time is None or tokens.number(time) is not None for time in times)
            and (self.prepaid_cents is None or _is_number(self.prepaid_cents))
            and abs(self.prepaid_cents or 0) <= CENTS_LIMIT
            and isinstance(self.period, str)
            and WORD.fullmatch(self.period) is not None
            and isinstance(self.tier, str)
            and TIER.fullmatch(self.tier) is not None
        )


def write(store: TokenStore, login: tokens.Login, quota: Quota) -> None:
    """Remember what was asked with `login`. Raises StorageError."""
    storage.check_owner(store.path)
    content = {"account": _account(login), **dataclasses.asdict(quota)}
    with storage.translated(store.quota_path):
        folder_file.replace(store.quota_path, json.dumps(content).encode() + b"\n")


def read(store: TokenStore) -> Quota | None:
    """Return the quota if it is that of the account which is signed in."""
    try:
        content = folder_file.read(store.quota_path, SIZE_LIMIT)[0]
        quota = state_file.parsed(Quota, content)
        account = json.loads(content).get("account")
        valid = quota.is_valid() and account == _account(store.last_known())
    except (OSError, ValueError, TypeError, RecursionError):
        # Missing, or another program's.
        return None
    except errors.LoginUnusable:
        # No account is signed in.
        return None
    return quota if valid else None


def _account(login: tokens.Login) -> str:
    """Return a fingerprint of the account, by its e-mail address and the subject of its token.

    Without both it is that of the access token: the quota is then forgotten at the next renewal.
    """
    subject = tokens.jwt_claims(login.access_token).get("sub")
    if not (login.account or subject):
        subject = login.access_token
    return tokens.fingerprint(json.dumps([login.issuer, login.account, subject]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
