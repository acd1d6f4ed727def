"""xai-login --import: take over a login from the token file of OpenAB's proxy, a Rust program.

That of its xai-proxy, and of openab-auth-proxy after it, has access_token, refresh_token,
expires_at and token_endpoint. A token file of this program is accepted as well. The file is left as
it is, and no token is sent: the refresher is the first to spend the refresh token. The fingerprint
of that token is kept in tokens.json, so that a second import, as by a container that starts again,
does not put back a spent one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from pathlib import Path

from xaiproxy import (
    config,
    errors,
    folder_file,
    token_folder,
    token_json,
    token_store,
    token_writer,
    tokens,
)
from xaiproxy.login.existing_login import LOCK_TIMEOUT, existing_login
from xaiproxy.login.output import Output
from xaiproxy.login.wording import account_name, outlook, validity
from xaiproxy.oauth import discovery
from xaiproxy.oauth.session import Session

# Member of tokens.json: fingerprint of the refresh token that was imported.
IMPORTED = "imported"


def import_login(store: token_store.TokenStore, out: Output, file: Path) -> None:
    """Raises Error. `file`: token file of the other program."""
    login = _of_this_issuer(_parsed(_content(file), file), file, store.settings)
    mark = tokens.fingerprint(login.refresh_token or "")
    token_folder.prepare(store)
    with token_writer.locked(store, LOCK_TIMEOUT) as writer:
        former = existing_login(store)
        is_new = former is None or mark not in _marks(former)
        if former is not None and is_new:
            _check_replaceable(former, store.path)
        if is_new:
            out.message(
                f"Stop the program that wrote {file} before anything renews this login: its "
                "refresh token works once, so two programs that renew it end each other's login."
            )
            writer.save(login)
    _report(store, login if is_new or former is None else former, file, is_new, out)


def _content(file: Path) -> bytes:
    """Raises UsageError."""
    try:
        content, status = folder_file.read(file, token_store.SIZE_LIMIT + 1)
    except folder_file.NotAFile as error:
        raise errors.UsageError(
            f"{file} cannot be imported: {error.strerror}; name the token file itself"
        ) from error
    except OSError as error:
        raise errors.UsageError(
            f"{file} cannot be read ({error.strerror}); name the token file of the other program, "
            f"and make it readable for user {os.geteuid()}"
        ) from error
    if status.st_mode & 0o077:
        raise errors.UsageError(
            f"{file} is open to other users (mode {status.st_mode & 0o7777:04o}), who may have "
            f"copied the login; either chmod 600 it and import it, or {errors.SIGN_IN}"
        )
    if len(content) > token_store.SIZE_LIMIT:
        raise errors.UsageError(
            f"{file} is longer than {token_store.SIZE_LIMIT} bytes, and so no token file"
        )
    return content


def _parsed(content: bytes, file: Path) -> tokens.Login:
    """The login in the file, which can be renewed. Raises UsageError, LoginUnusable."""
    if _is_of_grok_cli(content):
        raise errors.LoginUnusable(
            "foreign",
            f"{file} is the Grok CLI's own login, which cannot be imported: that program goes on "
            "renewing it, and two programs that renew a login end it. Both can be signed in "
            f"beside each other; {errors.SIGN_IN}",
        )
    try:
        login = token_json.from_json(content)
    except ValueError as error:
        raise errors.UsageError(
            f"{file} {error}; name the tokens.json of OpenAB's xai-proxy or openab-auth-proxy"
        ) from None
    if login.refresh_token is None:
        raise errors.LoginUnusable(
            "corrupt", f"{file} holds no refresh token and could not be renewed; {errors.SIGN_IN}"
        )
    if login.refresh_error is not None and login.refresh_error.terminal:
        raise errors.LoginUnusable(
            "corrupt", f"{file} holds a login that has ended; {errors.SIGN_IN}"
        )
    return dataclasses.replace(
        login,
        salt=login.salt or secrets.token_hex(16),
        extra={**login.extra, IMPORTED: tokens.fingerprint(login.refresh_token)},
    )


def _is_of_grok_cli(content: bytes) -> bool:
    """Whether it is ~/.grok/auth.json: {"ISSUER::CLIENT_ID": {"key": ..., ...}, ...}."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and any(
        "::" in name and isinstance(value, dict) and "key" in value
        for name, value in values.items()
    )


def _of_this_issuer(login: tokens.Login, file: Path, settings: config.Config) -> tokens.Login:
    """The login as one of the issuer and client of the settings. Raises ConfigurationError.

    The other programs write neither issuer nor client. A login of auth.x.ai is known by its
    token_endpoint, and that of another issuer by the discovery document of that issuer. Raises
    IssuerUnavailable if that cannot be read.
    """
    endpoint = login.token_endpoint
    of_issuer = (login.issuer, login.client_id)
    known = of_issuer != (config.DEFAULT_ISSUER, config.DEFAULT_CLIENT_ID)
    if known or endpoint is None or _is_of_xai(endpoint):
        if of_issuer == (settings.issuer, settings.client_id):
            return login
        whose = f"of {login.issuer} for client {login.client_id}"
    else:
        whose = "of another issuer, as its token_endpoint shows"
        if settings.issuer != config.DEFAULT_ISSUER:
            metadata = discovery.discover(Session(settings), settings.issuer)
            if endpoint == metadata.token_endpoint:
                return dataclasses.replace(
                    login, issuer=settings.issuer, client_id=settings.client_id
                )
    raise errors.ConfigurationError(
        f"{file} holds a login {whose}, but the settings are {settings.issuer} and "
        f"{settings.client_id}; set XAI_PROXY_ISSUER and XAI_PROXY_CLIENT_ID to match it"
    )


def _is_of_xai(endpoint: str) -> bool:
    try:
        discovery.check_endpoint(config.DEFAULT_ISSUER, endpoint)
    except errors.IssuerUnavailable:
        return False
    return True


def _marks(login: tokens.Login) -> tuple[object, ...]:
    """Fingerprints of the refresh token that it has, and of the one that was imported."""
    own = tokens.fingerprint(login.refresh_token) if login.refresh_token else None
    return own, login.extra.get(IMPORTED)


def _check_replaceable(former: tokens.Login, path: Path) -> None:
    """Raise ConfigurationError if `former` can still be renewed.

    A sign-in replaces such a login, because its own has just been approved. The one in a file may
    be spent.
    """
    ended = former.refresh_error is not None and former.refresh_error.terminal
    if former.refresh_token is not None and not ended:
        raise errors.ConfigurationError(
            f"{path} holds a login of {account_name(former)} that can be renewed, and was not "
            "changed; move it away first, or name another file with --token-path"
        )


def _report(
    store: token_store.TokenStore, login: tokens.Login, file: Path, is_new: bool, out: Output
) -> None:
    """`is_new`: whether the login was saved now."""
    text = (
        f"Imported the login of {account_name(login)} at {login.issuer} into {store.path}."
        if is_new
        else f"Nothing to import: {store.path} has this login already, or its successor."
    )
    now = time.time()
    alive = store.refresher_alive(now)
    out.event(
        "imported",
        text,
        changed=is_new,
        account=login.account,
        issuer=login.issuer,
        expires_at=login.expires_at,
        token_path=str(store.path),
        refresher_alive=alive,
    )
    out.message(f"{validity(login, now)} {outlook(login, alive, now)}")
    if is_new:
        out.message(f"Remove {file}: the first renewal makes it worthless.")
