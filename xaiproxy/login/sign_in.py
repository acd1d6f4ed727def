"""Signing in, as a conversation: from the first look at the token file to the saved login.

All that can fail for reasons on this machine is tried before anybody approves anything, since an approved
login exists nowhere but in this process until it is saved.
"""

import os
import signal
import subprocess
import sys
import threading
import time

from xaiproxy import config, errors, token_store, token_writer, tokens
from xaiproxy.login.conversation import Conversation, local_time, outlook, who
from xaiproxy.oauth import authorization_code, device_authorization, discovery, loopback
from xaiproxy.oauth.session import Session

APPROVAL_TIME = 600.0  # seconds that a person gets in the browser; a device code brings its own
LOCK_WAIT = 45.0  # seconds; a refresh in progress holds the lock for 30 at most
SAVE_TIME = 600.0  # seconds of trying to save an approved login
SAVE_PAUSE = 2.0  # seconds between two of these tries


def open_browser(url: str) -> None:
    # In a process of its own, waited for in a thread: some browsers block their caller, many write to stdout. -I, or
    # it would run a webbrowser.py that lies in the working directory.
    nothing = subprocess.DEVNULL
    options = {"stdin": nothing, "stdout": nothing, "stderr": nothing, "start_new_session": True}
    command = [sys.executable, "-I", "-m", "webbrowser", url]
    threading.Thread(target=subprocess.run, args=(command,), kwargs=options, daemon=True).start()


def sign_in(store: token_store.TokenStore, talk: Conversation, way: str) -> None:
    """`way`: device or browser. Raises Error."""
    settings = store.settings
    former = _prepare(store)
    if former:
        talk.event("replaces", account=former.account, token_path=str(store.path))
        talk.say(f"Once approved, the new login replaces the one of {who(former)} in {store.path}.")
    session = Session(settings)
    metadata = discovery.discover(session, settings.issuer)
    if settings.client_id == config.DEFAULT_CLIENT_ID:
        talk.say(
            "The page will name Grok Build, whose OAuth client this is: xAI registers no others."
        )
    login = (_by_device if way == "device" else _by_browser)(session, metadata, settings, talk)
    _save(store, login, talk)
    now = time.time()
    alive = store.refresher_alive(now)
    talk.event(
        "done",
        f"Signed in as {who(login)} at {login.issuer}; the login is in {store.path}.",
        account=login.account,
        issuer=login.issuer,
        expires_at=login.expires_at,
        token_path=str(store.path),
        refresher_alive=alive,
    )
    if missing := _not_granted(settings.scope, login.scope):
        message = (
            f"the login was granted without the scope {missing}; what needs that will be refused"
        )
        talk.event("trouble", message=message)
        talk.say(f"Note: {message}.")
    if alive or login.refresh_token is None:
        talk.say(outlook(login, alive, now))
    else:  # as after every first sign-in: what comes next, and no fault
        talk.say(
            f"Next: serve it and keep it alive with {errors.SERVE}. Without that it lapses at "
            f"{local_time(login.expires_at)}."
        )
    if (
        former
        and former.refresh_token
        and not (former.refresh_error and former.refresh_error.terminal)
    ):
        # If the issuer keeps one grant for each user and client, revoking the former one ends the new one, too.
        talk.say(
            "The login that was replaced stays valid at the issuer. To have one revoked, run "
            f"{errors.typed('xai-login --logout')} before you sign in again."
        )


def _not_granted(asked: str, granted: str | None) -> str:
    """The names in `asked` that are not in `granted` (RFC 6749 section 5.1), with a space between two."""
    given = (asked if granted is None else granted).split()
    return " ".join(name for name in asked.split() if name not in given)


def login_in(store: token_store.TokenStore) -> tokens.Tokens | None:
    """The file's login of the settings' issuer and client; None when nothing there can be read as a login.

    Raises ConfigurationError when it is of another issuer or client, StorageError when there is no telling or
    it is another user's.
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
            f"{store.path} holds a login of {login.issuer} for client {login.client_id} and is left alone, "
            f"since the settings say {settings.issuer} and {settings.client_id}; name another file with "
            "--token-path, or set XAI_PROXY_ISSUER and XAI_PROXY_CLIENT_ID to match"
        )
    if login.refresh_token is not None and file.st_uid != os.geteuid():
        # What we put in its place would be ours, and closed to the refresher of that user.
        raise errors.StorageError(
            f"{store.path} belongs to user {file.st_uid}, and this is user "
            f"{os.geteuid()}; run the same as that user"
        )
    return login


def _prepare(store: token_store.TokenStore) -> tokens.Tokens | None:
    """Find out whether a login can be saved; return the one that is there."""
    token_writer.prepare_folder(store)
    with token_writer.locked(store, LOCK_WAIT) as writer:
        former = login_in(store)
        # A link is replaced, but not before the approval.
        whole = former is not None and not store.path.is_symlink()
        (writer.rehearse(former) if whole else writer.reserve()).discard()
    return former


def _by_device(
    session: Session, metadata: discovery.Metadata, settings: config.Config, talk: Conversation
) -> tokens.Tokens:
    device = device_authorization.request(session, metadata, settings)
    url = device.verification_uri_complete
    talk.event(
        "user_code",
        verification_uri=device.verification_uri,
        verification_uri_complete=url,
        user_code=device.user_code,
        expires_in=device.expires_in,
        interval=device.interval,
    )
    pictured = url is not None and talk.show_qr_code(
        url
    )  # first, since on a small screen it would push off the rest
    talk.say(
        f"To sign in, open this page on any device:\n\n    {device.verification_uri}\n\n"
        f"and enter the code\n\n    {device.user_code}\n"
    )
    if url:
        talk.say(
            f"This address{', which is also in the picture above,' if pictured else ''} has the code in it:\n\n"
            f"    {url}\n"
        )
    minutes = max(1, round(device.expires_in / 60))
    talk.say(f"Approve only on a page that shows this code. It is good for {minutes} min.")
    said = set()

    def trouble(error: errors.IssuerUnavailable) -> None:
        if str(error) not in said:  # once each, not every five seconds
            said.add(str(error))
            talk.event("trouble", message=str(error))
            talk.say(f"Still waiting, although {error}.")

    return device_authorization.poll(
        session,
        metadata,
        settings,
        device,
        on_error=trouble,
        sleep=talk.countdown(f"to approve {device.user_code}", device.expires_in),
    )


def _by_browser(
    session: Session, metadata: discovery.Metadata, settings: config.Config, talk: Conversation
) -> tokens.Tokens:
    with loopback.Listener(settings.redirect_port, metadata.issuer) as listener:
        attempt = authorization_code.Attempt.begin(listener.redirect_uri)
        url = authorization_code.authorization_url(metadata, settings, attempt)
        talk.event("authorization_url", url=url, redirect_uri=listener.redirect_uri)
        talk.say(
            f"To sign in, approve on the page that your browser opens now. If it opens none, open\n\n"
            f"    {url}\n\n"
            "If the browser asks whether that page may reach apps on this device, allow it: that is\n"
            "how the answer gets here."
        )
        open_browser(url)
        paste_from = None
        if not talk.as_json and sys.stdin and sys.stdin.isatty():
            paste_from = sys.stdin.fileno()
            talk.say(
                "If the page shows a code, or its address cannot be opened in the end, paste that here:"
            )
        end = time.monotonic() + APPROVAL_TIME
        while True:
            code = listener.wait(
                attempt.state,
                seconds=end - time.monotonic(),
                paste_from=paste_from,
                report=talk.say,
            )
            try:
                return authorization_code.exchange(session, metadata, settings, attempt, code)
            except errors.GrantRefused as error:  # what was pasted was no code, or an old one
                said = f"{error.error}: {error.description}" if error.description else error.error
                message = f"that code was refused ({said})"
                talk.event("trouble", message=message)
                talk.say(
                    f"Still waiting, although {message}: paste the code once more, or open the address above again."
                )


def _save(store: token_store.TokenStore, login: tokens.Tokens, talk: Conversation) -> None:
    """Save an approved login, and do not give up soon: nobody else has it."""
    end = time.monotonic() + SAVE_TIME
    said = False
    while True:
        try:
            with token_writer.locked(store, LOCK_WAIT) as writer:
                login_in(store)  # raises if another issuer's came there meanwhile
                former = signal.signal(
                    signal.SIGINT, signal.SIG_IGN
                )  # for milliseconds; then all is done
                try:
                    return writer.save(login)
                finally:
                    signal.signal(signal.SIGINT, former)
        except (errors.StorageError, errors.LockBusy) as error:
            if time.monotonic() > end:
                raise type(error)(
                    f"the approved login could not be saved and is lost: {error}; then sign in "
                    "again"
                ) from error
            if not said:
                said = True
                talk.event("trouble", message=str(error))
                talk.say(
                    f"The login is approved but cannot be saved: {error}. Trying on for "
                    f"{SAVE_TIME / 60:g} min; Ctrl-C gives the login up."
                )
            time.sleep(SAVE_PAUSE)
