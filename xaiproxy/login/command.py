"""The command xai-login: its options, --status and --logout.

Importing this module is cheap: each function imports what only one option needs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xaiproxy import command, errors

if TYPE_CHECKING:
    from xaiproxy.login.output import Output
    from xaiproxy.token_store import TokenStore

EXAMPLES = """\
  xai-login             sign in with this machine's browser, if it has one
  xai-login --device    sign in on any device, with an address and a code
  xai-login --status    show whether the login is served and renewed
  xai-login --status --watch    the same, kept up to date until Ctrl-C
  xai-login --status --quota    and how much of the account's quota is used
  xai-login --doctor    find out what does not work, and what to do
  xai-login --import tokens.json    take over a login of OpenAB's proxy
"""
NOTES = """\
Exit status of --status: 0 the login can be used; 75 its access token has
expired or is refused and may still be renewed, or the token file cannot be read
at the moment; 77 sign in. Whether the proxy runs does not change it. With
--quota, 69 if the login can be used and the quota was not returned, 75 if it
cannot be remembered. With --watch, 0 after Ctrl-C.

Of --doctor: that of the first failure, or 0 if there are only warnings. 69 the
issuer, the API or the proxy does not answer; 75 a file or folder cannot be
written, or the problem is temporary; 77 sign in, or the account's plan does not
allow it; 78 wrong settings.

Of --import: 64 FILE is no token file, or others can read it; 77 its login
cannot be taken over; 78 it is of another issuer, or the token file has a login
that can be renewed.

Otherwise: 0 done; 64 wrong usage; 69 the issuer cannot be reached (after
--logout: the login was removed here but not revoked there); 75 the token file
cannot be written; 77 denied, expired or signed out; 78 wrong settings, or a
login of another issuer in the token file; 130 interrupted.
"""
MODES = {
    "device": "approve the login on any device",
    "browser": "approve it in a browser on this machine, or paste the code that the page shows",
    "status": "show the login, its refresher and the proxy; refreshes and changes nothing",
    "doctor": "check settings, login, network, account and proxy; changes nothing",
    "logout": "revoke the login at the issuer and remove its files",
}


def main(argv: list[str] | None = None) -> int:
    options = parser()
    arguments = options.parse_args(argv)
    if (arguments.watch or arguments.quota) and arguments.mode != "status":
        options.error("--watch and --quota go with --status")
    from xaiproxy.login import output

    out = output.Output(arguments.json)
    return command.run("xai-login", lambda: _run(arguments, out))


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-login",
        # argparse would write all modes in one line.
        usage="xai-login [--device | --browser | --import FILE] [option ...]\n"
        "       xai-login --status | --doctor | --logout [option ...]",
        description="Sign in, check the login, or sign out.",
        epilog=NOTES,
    )
    modes = options.add_mutually_exclusive_group()
    for mode, help_text in MODES.items():
        modes.add_argument(
            f"--{mode}", action="store_const", dest="mode", const=mode, help=help_text
        )
    modes.add_argument(
        "--import",
        metavar="FILE",
        dest="import_from",
        help="take over the login in a token file of OpenAB's xai-proxy or openab-auth-proxy",
    )
    options.add_argument(
        "--watch", action="store_true", help="with --status: show it anew every 2 s until Ctrl-C"
    )
    options.add_argument(
        "--quota",
        action="store_true",
        help="with --status: ask how much of the account's quota is used; with --watch, once",
    )
    options.add_argument(
        "--json", action="store_true", help="print one JSON object a line, for programs"
    )
    command.add_token_path(options)
    return options


def _run(arguments: argparse.Namespace, out: Output) -> int:
    from xaiproxy import config, token_store

    options = {"XAI_PROXY_TOKEN_PATH": arguments.token_path}
    try:
        if arguments.mode == "doctor":
            from xaiproxy.login import doctor

            return doctor.examine(os.environ, options, out)
        settings = config.from_environ(os.environ, options)
        for warning in settings.warnings:
            out.message(f"Note: {warning}.")
        store = token_store.TokenStore(settings)
        if arguments.mode == "status":
            return status(store, out, with_quota=arguments.quota, repeatedly=arguments.watch)
        if arguments.mode == "logout":
            return log_out(store, out)
        if arguments.import_from is not None:
            from xaiproxy.login import import_login

            import_login.import_login(store, out, Path(arguments.import_from))
            return 0
        from xaiproxy.login import sign_in

        default = "browser" if has_browser(os.environ) else "device"
        sign_in.sign_in(store, out, arguments.mode or default)
        return 0
    except errors.Error as error:
        out.event("error", message=str(error), exit_code=error.exit_code)
        raise
    except KeyboardInterrupt:
        out.event("error", message="interrupted", exit_code=errors.EXIT_INTERRUPTED)
        raise


def has_browser(environ: Mapping[str, str]) -> bool:
    """Whether there is a browser that would open on the user's own screen."""
    if environ.get("SSH_CONNECTION") or environ.get("SSH_TTY"):
        return False
    # Without these webbrowser finds text browsers, in which consent pages rarely work.
    if not (environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY") or environ.get("BROWSER")):
        return False
    import webbrowser

    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def status(
    store: TokenStore,
    out: Output,
    now: Callable[[], float] = time.time,
    *,
    with_quota: bool = False,
    repeatedly: bool = False,
) -> int:
    """Show the login; nothing is refreshed or locked, and nothing written except the quota.

    `with_quota`: whether to ask for the quota first. `repeatedly`: whether to go on until Ctrl-C.
    """
    from xaiproxy.login import billing, summary, summary_text, watch

    known, quota_error = billing.ask(store, now()) if with_quota else (None, None)
    if repeatedly:
        watch.watch(lambda: summary.of(store, now(), None, quota_error), out)
        return 0
    found = summary.of(store, now(), known, quota_error)
    out.event("status", "\n".join(summary_text.lines(found, out.style())), **found.members())
    return found.exit_code


def log_out(store: TokenStore, out: Output) -> int:
    """Revoke the login at the issuer, then remove all its files, even if the revocation failed."""
    from xaiproxy import token_writer
    from xaiproxy.login.existing_login import LOCK_TIMEOUT, existing_login
    from xaiproxy.login.wording import account_name
    from xaiproxy.oauth import discovery, revocation, session

    if not os.path.lexists(store.path) and not os.path.lexists(store.new_path):
        text = f"Nothing to sign out of: {store.path} does not exist."
        out.event("signed_out", text, revoked=False, account=None)
        return 0
    failure = None
    with token_writer.locked(store, LOCK_TIMEOUT) as writer:
        login = existing_login(store)
        if login:
            web = session.Session(store.settings)
            try:
                revocation.revoke(web, discovery.discover(web, login.issuer, deadline=15), login)
            except (errors.IssuerUnavailable, errors.OAuthError) as error:
                failure = error
        writer.remove()
    text = (
        f"Signed out: removed the login of {account_name(login)} from {store.path}."
        if login
        else f"Removed {store.path}, which held no valid login, so nothing was revoked."
    )
    revoked = bool(login and not failure)
    out.event("signed_out", text, revoked=revoked, account=login and login.account)
    if failure:
        raise errors.IssuerUnavailable(
            f"the login was removed here but not revoked, because {failure}"
        ) from failure
    return 0
