"""The published copy of a login in a Secret of Kubernetes, by which refreshers also exclude others.

A flock holds on one machine. Refreshers on several machines, each with a copy of the login, claim
the refresh token in the Secret before they send it: by an annotation, written only if the Secret is
still the one that was read. A change must keep these rules:

1. A refresh token whose login is older than the published one is spent, so it is never claimed. The
   claim alone would not show that: a later claim replaces an earlier one.
2. A claim of another instance on the same refresh token means that the token may be spent, as after
   a lost response. That instance may be gone, so the claim does not hold for ever.
"""

import base64
import re
import time
from collections.abc import Callable
from typing import Any

from xaiproxy import errors
from xaiproxy.refresher.kubernetes_api import Api
from xaiproxy.refresher.target import check_replaceable, issued_at_of
from xaiproxy.setting_types import SecretName
from xaiproxy.tokens import Login, fingerprint

KEY = "tokens.json"
SPENDS = "xaiproxy/spends"
# Seconds for all requests of one change. With the deadlines of a refresh (renewal.py) and the
# heartbeat's interval it must be less than token_store.ALIVE.
DEADLINE = 5.0
ATTEMPTS = 3  # changes that another writer may precede
INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,253}")

Values = dict[str, Any]


class PublishedSecret:
    """`instance`: a name of this pod or machine that no other has."""

    def __init__(self, api: Api, name: SecretName, instance: str):
        self._api = api
        self._name = name
        self._instance = instance

    def __str__(self) -> str:
        return f"the Secret {self._name}"

    def publish(self, content: str, issued_at: float) -> bool:
        def change(secret: Values) -> Values | None:
            held = _content(secret)
            if held == content.encode():
                return None
            check_replaceable(held, issued_at, self)
            return {"data": {KEY: base64.b64encode(content.encode()).decode()}}

        return self._change(change)

    def claim(self, login: Login, late: bool) -> None:
        """Claim the login's refresh token, just before it is sent. Raises NotClaimed.

        `late`: whether a token that another refresher has claimed is claimed all the same.
        """
        # Only a login with a refresh token is refreshed.
        assert login.refresh_token is not None
        mark = fingerprint(login.refresh_token)

        def change(secret: Values) -> Values:
            if issued_at_of(_content(secret)) > (login.issued_at() or 0.0):
                raise errors.NotClaimed(
                    f"{self} holds a newer login than the token file, whose refresh token is "
                    "therefore spent; stop this refresher if another one publishes there, or "
                    "sign in again"
                )
            claimed, _, instance = _annotation(secret).partition("/")
            if claimed == mark and instance != self._instance and not late:
                shown = instance if INSTANCE.fullmatch(instance) else "without a name"
                raise errors.NotClaimed(
                    f"another refresher ({shown}) has claimed the refresh token in {self}",
                    sent=True,
                )
            return {"metadata": {"annotations": {SPENDS: f"{mark}/{self._instance}"}}}

        try:
            self._change(change)
        except errors.PublishError as error:
            raise errors.NotClaimed(
                f"the refresh token cannot be claimed: {error}", retry_after=error.retry_after
            ) from error

    def _change(self, change: Callable[[Values], Values | None]) -> bool:
        """Merge what `change` returns for the Secret into it; return whether that was anything.

        `change`: called again if another writer comes first. Raises PublishError.
        """
        end = time.monotonic() + DEADLINE
        for _ in range(ATTEMPTS):
            secret = self._api.get(max(0.1, end - time.monotonic()))
            changes = change(secret)
            if changes is None:
                return False
            changes.setdefault("metadata", {})["resourceVersion"] = _version(secret)
            if self._api.patch(changes, max(0.1, end - time.monotonic())):
                return True
        raise errors.PublishError(f"{self} was changed by other writers {ATTEMPTS} times in a row")


def _version(secret: Values) -> str:
    """Return the resourceVersion, without which a change would overwrite any other."""
    version = (secret.get("metadata") or {}).get("resourceVersion")
    if not isinstance(version, str) or not version:
        raise errors.PublishError("the API server returned a Secret without a resourceVersion")
    return version


def _content(secret: Values) -> bytes:
    try:
        return base64.b64decode((secret.get("data") or {}).get(KEY) or "")
    except (ValueError, TypeError):
        return b""


def _annotation(secret: Values) -> str:
    annotations = (secret.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(SPENDS) or "")
