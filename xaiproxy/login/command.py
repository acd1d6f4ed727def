"""xai-login: sign in, look at the login and all it needs, sign out.

Importing this module is cheap on purpose: what only one way of calling it needs is imported there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xaiproxy import command, errors

if TYPE_CHECKING:
    from xaiproxy.login.conversation import Conversation
    from xaiproxy.token_store import TokenStore

EXAMPLES = """\
  xai-login             sign in with this machine's browser; without one, as --device
  xai-login --device    sign in with the browser of any other device: shows an address and a code
  xai-login --status    say who is signed in and until when
  xai-login --doctor    find out what keeps the login or the proxy from working, and what to do

Exit status of --status: 0 the login can be used; 75 its access token has expired or is refused, and is still to be
renewed; 77 sign in. Of the others: 0 done; 64 wrong usage; 69 the issuer cannot be reached (after --logout: the login was removed
here but not revoked there); 75 the token file cannot be written; 77 denied, expired or signed out;
78 wrong settings, or another issuer's login is in the way; 130 interrupted. --doctor ends with that of the
first failure that it finds, and with 0 when there are only warnings: 69 also for the API and a proxy that does
not answer, 75 also for what passes by itself, 77 also for an account whose plan does not allow it.
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from xaiproxy.login import conversation

    talk = conversation.Conversation(arguments.json)
    return command.run("xai-login", lambda: _run(arguments, talk))


def _parser() -> argparse.ArgumentParser:
    parser = command.ArgumentParser(prog="xai-login", description=EXAMPLES)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--device",
        action="store_const",
        dest="what",
        const="device",
        help="approve the login on any device",
    )
    what.add_argument(
        "--browser",
        action="store_const",
        dest="what",
        const="browser",
        help="approve it in a browser on this machine, or paste the code that the page shows",
    )
    what.add_argument(
        "--status",
        action="store_const",
        dest="what",
        const="status",
        help="look only: nothing is refreshed or changed",
    )
    what.add_argument(
        "--doctor",
        action="store_const",
        dest="what",
        const="doctor",
        help="look at settings, login, network, account and proxy; changes nothing",
    )
    what.add_argument(
        "--logout",
        action="store_const",
        dest="what",
        const="logout",
        help="revoke the login at the issuer and remove its files",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line, for programs"
    )
    parser.add_argument(
        "--token-path", metavar="FILE", help="the token file (default: XAI_PROXY_TOKEN_PATH)"
    )
    return parser


def _run(arguments: argparse.Namespace, talk: Conversation) -> int:
    from xaiproxy import config, token_store

    options = {"XAI_PROXY_TOKEN_PATH": arguments.token_path}
    try:
        if arguments.what == "doctor":
            from xaiproxy.login import doctor

            return doctor.examine(os.environ, options, talk)
        settings = config.from_environ(os.environ, options)
        for warning in settings.warnings:
            talk.say(f"Note: {warning}.")
        store = token_store.TokenStore(settings)
        if arguments.what == "status":
            return status(store, talk)
        if arguments.what == "logout":
            return log_out(store, talk)
        from xaiproxy.login import sign_in

        sign_in.sign_in(
            store, talk, arguments.what or ("browser" if browser_here(os.environ) else "device")
        )
        return 0
    except errors.Error as error:
        talk.event("error", message=str(error), exit_code=error.exit_code)
        raise
    except KeyboardInterrupt:
        talk.event("error", message="interrupted", exit_code=errors.EXIT_INTERRUPTED)
        raise


def browser_here(environ: Mapping[str, str]) -> bool:
    """Whether a browser opened by us would show on the screen that the person looks at."""
    if environ.get("SSH_CONNECTION") or environ.get("SSH_TTY"):
        return False
    if not (environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY") or environ.get("BROWSER")):
        return (
            False  # what webbrowser finds then is a text browser, in which xAI's page does not work
        )
    import webbrowser

    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def status(store: TokenStore, talk: Conversation, now: Callable[[], float] = time.time) -> int:
    """What the files say; nothing is refreshed, written or locked."""
    import dataclasses

    from xaiproxy import judgement
    from xaiproxy.login.conversation import last_failure, outlook, validity, who

    at = now()
    try:
        login = store.load()
    except errors.LoginUnusable as error:
        verdict = judgement.of(store, at, store.load)
        talk.event(
            "status",
            str(error),
            usable=False,
            verdict=verdict.verdict.value,
            reason=verdict.reason,
            state=error.state,
            message=str(error),
            token_path=str(store.path),
        )
        return error.exit_code
    failure, alive, verdict = (
        login.refresh_error,
        store.refresher_alive(at),
        judgement.of(store, at, lambda: login),
    )
    whose = f"{who(login)} at {login.issuer}; the login is in {store.path}."
    lines = (
        [f"Signed in as {whose}", validity(login, at)]
        if verdict.exit_code == 0
        else [verdict.sentence, f"Account: {whose}"]
    )
    if not (failure and failure.terminal):
        lines.append(outlook(login, alive, at))
    lines += last_failure(login) or judgement.reported_failure(store, login, at)
    talk.event(
        "status",
        "\n".join(lines),
        usable=verdict.exit_code == 0,
        verdict=verdict.verdict.value,
        reason=verdict.reason,
        state=login.state(at, store.settings.refresh_skew).value,
        account=login.account,
        issuer=login.issuer,
        expires_at=login.expires_at,
        token_path=str(store.path),
        refresher_alive=alive,
        refresh_error=dataclasses.asdict(failure) if failure else None,
    )
    return verdict.exit_code


def log_out(store: TokenStore, talk: Conversation) -> int:
    """Revoke at the issuer, then remove every file of the login, whatever the issuer said."""
    from xaiproxy import token_writer
    from xaiproxy.login import sign_in
    from xaiproxy.login.conversation import who
    from xaiproxy.oauth import discovery, revocation, session

    if not os.path.lexists(store.path) and not os.path.lexists(store.new_path):
        talk.event(
            "signed_out",
            f"Nothing to sign out of: {store.path} does not exist.",
            revoked=False,
            account=None,
        )
        return 0
    failure = None
    with token_writer.locked(store, sign_in.LOCK_WAIT) as writer:
        login = sign_in.login_in(store)
        if login:
            web = session.Session(store.settings)
            try:
                revocation.revoke(web, discovery.discover(web, login.issuer, deadline=15), login)
            except (errors.IssuerUnavailable, errors.OAuthError) as error:
                failure = error
        writer.remove()
    text = (
        f"Signed out: the login of {who(login)} is gone from {store.path}."
        if login
        else f"Removed {store.path}, which could not be read as a login and so could not be revoked."
    )
    talk.event(
        "signed_out", text, revoked=bool(login and not failure), account=login and login.account
    )
    if failure:
        raise errors.IssuerUnavailable(
            f"the login was removed here but not revoked, because {failure}"
        ) from failure
    return 0
