"""Signing in, from the first check of the token file to the saved login.

Whatever may fail on this machine is tried before the user approves, because until it is saved, an
approved login exists only in this process.
"""

import signal
import subprocess
import sys
import threading
import time

from xaiproxy import config, errors, token_folder, token_store, token_writer, tokens
from xaiproxy.login.existing_login import LOCK_TIMEOUT, existing_login
from xaiproxy.login.output import Output
from xaiproxy.login.wording import account_name, count, local_time, outlook
from xaiproxy.oauth import (
    authorization_code,
    device_authorization,
    discovery,
    loopback,
    token_endpoint,
)
from xaiproxy.oauth.session import Session

APPROVAL_TIMEOUT = 600.0  # seconds for the approval in a browser; a device code has its own
SAVE_TIMEOUT = 600.0  # seconds of trying to save an approved login
SAVE_PAUSE = 2.0  # seconds between two of these tries


def sign_in(store: token_store.TokenStore, out: Output, way: str) -> None:
    """`way`: device or browser. Raises Error."""
    settings = store.settings
    former = _prepare(store)
    if former:
        out.event("replaces", account=former.account, token_path=str(store.path))
        out.message(
            "Once approved, the new login replaces the one of "
            f"{account_name(former)} in {store.path}."
        )
    session = Session(settings)
    metadata = discovery.discover(session, settings.issuer)
    if settings.client_id == config.DEFAULT_CLIENT_ID:
        out.message(
            'xAI\'s page will say "Grok Build": xaiproxy signs in as that client because xAI '
            "lets nobody register another."
        )
    login = (_by_device if way == "device" else _by_browser)(session, metadata, settings, out)
    _save(store, login, out)
    _report(store, login, former, out)


def _report(
    store: token_store.TokenStore, login: tokens.Login, former: tokens.Login | None, out: Output
) -> None:
    """Print the result, and what to do next."""
    now = time.time()
    alive = store.refresher_alive(now)
    out.event(
        "done",
        f"Signed in as {account_name(login)} at {login.issuer}; the login is in {store.path}.",
        account=login.account,
        issuer=login.issuer,
        expires_at=login.expires_at,
        token_path=str(store.path),
        refresher_alive=alive,
    )
    if missing := _not_granted(store.settings.scope, login.scope):
        message = f"the scope {missing} was not granted; requests that need it will be refused"
        out.event("trouble", message=message)
        out.message(f"Note: {message}.")
    if alive or login.refresh_token is None:
        out.message(outlook(login, alive, now))
    # No refresher runs, as after every first sign-in. That is no error.
    else:
        out.message(
            f"Next: serve it and keep it alive with {errors.SERVE}. Without that it lapses at "
            f"{local_time(login.expires_at)}."
        )
    ended = former and former.refresh_error and former.refresh_error.terminal
    if former and former.refresh_token and not ended:
        # It is not revoked here: an issuer may keep one grant for each user and client, and would
        # then end the new login as well.
        out.message(
            "The login that was replaced stays valid at the issuer. To have one revoked, run "
            f"{errors.typed('xai-login --logout')} before you sign in again."
        )


def _not_granted(requested: str, granted: str | None) -> str:
    """The scopes in `requested` that are not in `granted` (RFC 6749 section 5.1)."""
    given = (requested if granted is None else granted).split()
    return " ".join(name for name in requested.split() if name not in given)


def _prepare(store: token_store.TokenStore) -> tokens.Login | None:
    """Check that a login can be saved; return the existing one."""
    token_folder.prepare(store)
    with token_writer.locked(store, LOCK_TIMEOUT) as writer:
        former = existing_login(store)
        # A link is replaced, but not before the approval.
        if former is None or store.path.is_symlink():
            reserved = writer.reserve()
        else:
            reserved = writer.rehearse(former)
        reserved.discard()
    return former


def _by_device(
    session: Session, metadata: discovery.Metadata, settings: config.Config, out: Output
) -> tokens.Login:
    device = device_authorization.request(session, metadata, settings)
    url = device.verification_uri_complete
    out.event(
        "user_code",
        verification_uri=device.verification_uri,
        verification_uri_complete=url,
        user_code=device.user_code,
        expires_in=device.expires_in,
        interval=device.interval,
    )
    # The QR code comes first: on a small screen it would push the rest off.
    has_qr_code = url is not None and out.show_qr_code(url)
    out.message(
        f"To sign in, open this page on any device:\n\n    {device.verification_uri}\n\n"
        f"and enter the code\n\n    {device.user_code}\n"
    )
    if url:
        note = ", which the QR code above shows as well," if has_qr_code else ""
        out.message(f"This address{note} contains the code:\n\n    {url}\n")
    minutes = count(max(1, round(device.expires_in / 60)), "minute")
    out.message(f"Approve only on a page that shows this code. The code expires in {minutes}.")
    reported = set()

    def report(error: errors.IssuerUnavailable) -> None:
        """Print each error once, not at every poll."""
        if str(error) not in reported:
            reported.add(str(error))
            out.event("trouble", message=str(error))
            out.message(f"Still waiting: {error}.")

    return device_authorization.poll(
        session,
        metadata,
        settings,
        device,
        on_error=report,
        sleep=out.countdown(f"to approve {device.user_code}", device.expires_in),
    )


def _by_browser(
    session: Session, metadata: discovery.Metadata, settings: config.Config, out: Output
) -> tokens.Login:
    with loopback.Listener(settings.redirect_port, metadata.issuer) as listener:
        attempt = authorization_code.Attempt.begin(listener.redirect_uri)
        url = authorization_code.authorization_url(metadata, settings, attempt)
        out.event("authorization_url", url=url, redirect_uri=listener.redirect_uri)
        out.message(
            "To sign in, approve on the page that your browser opens now. If it opens none, open\n"
            f"\n    {url}\n\n"
            "If the browser asks whether that page may reach apps on this device, allow it: the\n"
            "page sends its response to xai-login in that way."
        )
        _open_browser(url)
        paste_from = None
        if not out.as_json and sys.stdin and sys.stdin.isatty():
            paste_from = sys.stdin.fileno()
            out.message(
                "If the page shows a code, or the browser ends at an address that it cannot open, "
                "paste that here:"
            )
        end = time.monotonic() + APPROVAL_TIMEOUT
        while True:
            code = listener.wait(
                attempt.state,
                seconds=end - time.monotonic(),
                paste_from=paste_from,
                report=out.message,
            )
            try:
                return authorization_code.exchange(session, metadata, settings, attempt, code)
            # A pasted text may be no code, or an old one.
            except errors.GrantRefused as error:
                reason = token_endpoint.detail(error.error, error.description)
                message = f"that code was refused ({reason})"
                out.event("trouble", message=message)
                out.message(
                    f"Still waiting: {message}. Paste the code once more, or open the address "
                    "above again."
                )


def _open_browser(url: str) -> None:
    # In a process of its own, which a thread waits for: some browsers block their caller, and many
    # write to stdout. Without -I it would run a webbrowser.py in the working directory.
    command = [sys.executable, "-I", "-m", "webbrowser", url]
    nothing = subprocess.DEVNULL
    options = {"stdin": nothing, "stdout": nothing, "stderr": nothing, "start_new_session": True}
    threading.Thread(target=subprocess.run, args=(command,), kwargs=options, daemon=True).start()


def _save(store: token_store.TokenStore, login: tokens.Login, out: Output) -> None:
    """Save an approved login, with many retries: there is no other copy of it."""
    end = time.monotonic() + SAVE_TIMEOUT
    reported = False
    while True:
        try:
            with token_writer.locked(store, LOCK_TIMEOUT) as writer:
                # Raises if a login of another issuer was saved there meanwhile.
                existing_login(store)
                # The save takes milliseconds, and Ctrl-C must not interrupt it.
                former = signal.signal(signal.SIGINT, signal.SIG_IGN)
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
            if not reported:
                reported = True
                out.event("trouble", message=str(error))
                out.message(
                    f"The login is approved but cannot be saved: {error}. Retrying for "
                    f"{SAVE_TIMEOUT / 60:g} minutes; Ctrl-C discards the login."
                )
            time.sleep(SAVE_PAUSE)
