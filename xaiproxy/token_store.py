"""tokens.json as its readers see it, and the files beside it through which processes communicate.

A reader takes no lock: tokens.json is only ever replaced by an atomic rename (token_writer.py).
Nothing here locks or syncs, so a greenlet may call all of it.

    tokens.json          the login
    tokens.json.new      its successor while that is written
    tokens.json.lock     held by the process that writes; its time is the refresher's heartbeat
    tokens.json.status   the refresher's status (refresher_status.py)
    tokens.json.notify   which calls for a person were delivered (refresher/call_record.py)
    tokens.json.refused  the proxy's request for a refresh: the fingerprint of an access token that
                         upstream refused
    tokens.json.quota    the account's quota as last asked for (quota.py)
"""

import errno
import math
import os
import time
import urllib.parse
from pathlib import Path

from xaiproxy import config, errors, folder_file, provider, storage, token_json, tokens
from xaiproxy.cached_file import CachedFile

SIZE_LIMIT = 1 << 20  # bytes; a real file has about 2,000
FINGERPRINT_LENGTH = 64  # characters
REFUSAL_TIME = 60  # seconds for which a refusal counts
NOTE_TIME = 10  # seconds after which the refresher must have read tokens.json.refused
# Errors of a read that are the machine's, not the file's or its permissions'.
PASSING = frozenset(
    (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EAGAIN,
    )
)
ALIVE = 60  # seconds without a heartbeat after which the refresher counts as gone
# Seconds for which a heartbeat may be overdue, as after a suspend, until the refresher runs.
OVERDUE = 1.0


class TokenStore:
    """`refused`: fingerprint of the last access token that upstream refused to this process."""

    def __init__(self, settings: config.Config):
        self.settings = settings
        self.path: Path = settings.token_path
        self.new_path = self.path.with_name(self.path.name + ".new")
        self.lock_path = self.path.with_name(self.path.name + ".lock")
        self.status_path = self.path.with_name(self.path.name + ".status")
        self.notify_path = self.path.with_name(self.path.name + ".notify")
        self.refused_path = self.path.with_name(self.path.name + ".refused")
        self.quota_path = self.path.with_name(self.path.name + ".quota")
        self._file = CachedFile(self.path, self._outcome)
        self._last_login: tokens.Login | None = None
        self.refused: str | None = None
        self._refused_at = 0.0

    def load(self) -> tokens.Login:
        """Read the login from the file, not from the cache. Raises LoginUnusable."""
        content, status = self.read()
        login = parse(content, self.path)
        # Without a refresh token it may be a mounted Secret: a link, and another user's.
        if login.refresh_token is not None:
            if os.path.islink(self.path):
                raise errors.LoginUnusable(
                    "symlink",
                    f"{self.path} is a symbolic link and holds a refresh token, which cannot be "
                    "kept up to date through a link; put the file itself there",
                )
            if status.st_uid != os.geteuid():
                raise errors.LoginUnusable(
                    "not_ours",
                    f"{self.path} belongs to user {status.st_uid}, and this process "
                    f"runs as user {os.geteuid()}; run as that user{storage.or_chown('the file')}",
                )
        self._check_fits(login)
        return login

    def current(self) -> tokens.Login:
        """Return the login in the file, read again only after the file has changed.

        Raises LoginUnusable.
        """
        found = self._file.get()
        if isinstance(found, errors.LoginUnusable):
            raise found.with_traceback(None)
        return found

    def last_known(self) -> tokens.Login:
        """As `current`, but if LoginUnread prevents a read, return the login of the last read.

        Its access token is probably still valid, and upstream checks it in any case.
        """
        try:
            return self.current()
        except errors.LoginUnread:
            if self._last_login is None:
                raise
            return self._last_login

    def _outcome(self) -> tokens.Login | errors.LoginUnusable:
        """Return what a read of the file found; raise LoginUnusable if the next one may differ."""
        try:
            self._last_login = self.load()
        except errors.LoginUnread:
            raise
        except errors.LoginUnusable as error:
            self._last_login = None
            # Permission for a read can come without a change of the file's own status.
            if error.state == "unreadable":
                raise
            return error
        return self._last_login

    def read(self) -> tuple[bytes, os.stat_result]:
        """Return the file's bytes and status. Raises LoginUnusable (missing, unreadable)."""
        try:
            return folder_file.read(self.path, SIZE_LIMIT + 1, follow=True)
        except FileNotFoundError:
            raise errors.LoginUnusable(
                "missing", f"not signed in: {self.path} does not exist; {errors.SIGN_IN}"
            ) from None
        except folder_file.NotAFile as error:
            raise errors.LoginUnusable(
                "unreadable", f"{self.path} is not a file; move it away and {errors.SIGN_IN}"
            ) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> errors.LoginUnusable:
        if error.errno in PASSING:
            return errors.LoginUnread(
                f"{self.path} cannot be read at the moment ({error.strerror}); if that lasts, "
                "check its file system and the limit of open files"
            )
        return errors.LoginUnusable(
            "unreadable",
            f"{self.path} cannot be read ({error.strerror}); make it readable "
            f"for user {os.geteuid()}",
        )

    def _check_fits(self, login: tokens.Login) -> None:
        settings = self.settings
        if (login.issuer, login.client_id) != (settings.issuer, settings.client_id):
            raise errors.LoginUnusable(
                "foreign",
                f"{self.path} holds a login of {login.issuer} for client {login.client_id}, but "
                f"the settings are {settings.issuer} and {settings.client_id}; set "
                "XAI_PROXY_ISSUER and XAI_PROXY_CLIENT_ID to match it, or XAI_PROXY_TOKEN_PATH to "
                "another file",
            )
        if login.issuer == config.DEFAULT_ISSUER and not is_xai(settings.upstream):
            raise errors.LoginUnusable(
                "foreign",
                f"{self.path} holds a login of {login.issuer}, whose tokens go to https on "
                f"*.x.ai only, but XAI_PROXY_UPSTREAM is {settings.upstream}; correct one of them",
            )
        if not provider.is_xai(login.client_id, login.issuer) and is_xai(settings.upstream):
            # XAI_PROXY_UPSTREAM was probably not set.
            raise errors.LoginUnusable(
                "foreign",
                f"{self.path} holds a login of {login.issuer}, whose tokens do not go to "
                f"{settings.upstream}; set XAI_PROXY_UPSTREAM to the API that takes them",
            )

    def ask_refresh(self, access_token: str) -> None:
        """Ask the refresher for another token, since upstream refused this one. Raises OSError."""
        folder_file.replace(self.refused_path, self.remember_refusal(access_token).encode())

    def asked_for(self) -> str | None:
        """Return the fingerprint in tokens.json.refused, or None if there is no request."""
        try:
            content, _ = folder_file.read(self.refused_path, FINGERPRINT_LENGTH + 1)
        except OSError:
            return None
        return content.decode("ascii", "replace")

    def is_asked(self, login: tokens.Login) -> bool:
        """Whether the proxy asks for a refresh of this login."""
        return self.asked_for() == tokens.fingerprint(login.access_token)

    def is_refused(self, login: tokens.Login, now: float) -> bool:
        """Whether upstream refused this access token to a proxy within the last REFUSAL_TIME.

        A refusal counts no longer than that: a proxy that is not ready may get no request, and so
        would not find out that upstream accepts the token again.
        """
        mark = tokens.fingerprint(login.access_token)
        if self.refused == mark and time.monotonic() - self._refused_at < REFUSAL_TIME:
            return True
        return self.asked_for() == mark and self._note_age(now) < REFUSAL_TIME

    def _note_age(self, now: float) -> float:
        """Return the distance in seconds to the last request, which a clock step can put ahead."""
        try:
            return abs(now - os.stat(self.refused_path).st_mtime)
        except OSError:
            return math.inf

    def remember_refusal(self, access_token: str) -> str:
        """Note that upstream refused this token; return the token's fingerprint."""
        self.refused, self._refused_at = tokens.fingerprint(access_token), time.monotonic()
        return self.refused

    def withdraw(self, now: float) -> None:
        """Forget the refusal of this process: upstream has accepted a token since.

        A request that the refresher may not have read yet is left for a later call. A request about
        another token is left alone.
        """
        try:
            if self.asked_for() == self.refused:
                if self._note_age(now) < NOTE_TIME:
                    return
                os.unlink(self.refused_path)
        except OSError:
            # Removed already, or in a read-only folder.
            pass
        self.refused = None

    def refresher_age(self, now: float) -> float | None:
        """Return the seconds since the refresher's last heartbeat; None if there has been none."""
        try:
            touched = os.stat(self.lock_path).st_mtime
        except OSError:
            return None
        return now - touched if touched > 0 else None

    def refresher_alive(self, now: float) -> bool:
        age = self.refresher_age(now)
        # A heartbeat far ahead is from before the clock was set back.
        return age is not None and abs(age) < ALIVE


def parse(content: bytes, path: Path) -> tokens.Login:
    """Return the login in the content of the file at `path`. Raises LoginUnusable (corrupt)."""
    try:
        if len(content) > SIZE_LIMIT:
            raise ValueError(f"is longer than {SIZE_LIMIT} bytes")
        return token_json.from_json(content)
    except ValueError as error:
        raise errors.LoginUnusable(
            "corrupt", f"{path} {error}; {errors.SIGN_IN} (the file is then kept aside)"
        ) from None


def is_xai(url: str) -> bool:
    """Whether `url` is https on x.ai or a name below it, on the standard port, without a user."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    return (
        parts.scheme == "https"
        and "@" not in parts.netloc
        and port in (None, 443)
        and (host == "x.ai" or host.endswith(".x.ai"))
    )
