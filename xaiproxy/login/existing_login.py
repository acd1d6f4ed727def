"""The login that signing in replaces, or signing out removes."""

import os

from xaiproxy import errors, token_store, tokens

LOCK_TIMEOUT = 45.0  # seconds; a refresh in progress holds the lock for 30 at most


def existing_login(store: token_store.TokenStore) -> tokens.Login | None:
    """The login in the file, or None if there is no file or no valid login in it.

    Raises ConfigurationError for a login of another issuer or client, StorageError if the file
    cannot be read or belongs to another user.
    """
    settings = store.settings
    try:
        text, file = store.read()
        login = token_store.parse(text, store.path)
    except errors.LoginUnusable as error:
        if error.state in ("missing", "corrupt"):
            return None
        raise errors.StorageError(str(error)) from error
    if (login.issuer, login.client_id) != (settings.issuer, settings.client_id):
        raise errors.ConfigurationError(
            f"{store.path} holds a login of {login.issuer} for client {login.client_id} and was "
            f"not changed, since the settings are {settings.issuer} and {settings.client_id}; "
            "name another file with --token-path, or set XAI_PROXY_ISSUER and "
            "XAI_PROXY_CLIENT_ID to match"
        )
    # A file of ours in its place would be unreadable for the refresher of that user.
    if login.refresh_token is not None and file.st_uid != os.geteuid():
        raise errors.StorageError(
            f"{store.path} belongs to user {file.st_uid}, but this is user {os.geteuid()}; "
            "run the same command as that user"
        )
    return login
