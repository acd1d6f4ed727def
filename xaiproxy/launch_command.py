"""xai-launch: start a client with settings for this proxy, which precede the user's own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from xaiproxy import client_recipes, command, config, errors, judgement, launch_key, style
from xaiproxy.addresses import UnixSocket
from xaiproxy.client_recipes import Recipe
from xaiproxy.token_store import TokenStore

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
NO_PROXY = ("NO_PROXY", "no_proxy")
EGRESS = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
EXAMPLES = """\
  xai-launch claude             start Claude Code, with this proxy's models
  xai-launch codex exec hello   what follows the name is the client's own
  xai-launch --list             print the clients, and which are installed
  xai-launch --print codex      print what it would set, as a shell script
"""
NOTES = """\
The client's own files are left as they are: its settings for the proxy are in
its environment, or in a temporary folder. If the proxy requires a client key
and XAIPROXY_KEY is not set, the client gets a key that is removed when it ends.

Exit status: that of the client; 64 wrong usage, or an unknown client; 69 the
proxy does not answer; 75 the key file cannot be written; 77 sign in; 78 wrong
settings; 127 the client is not installed; 130 interrupted before the start.
"""


class NotInstalled(errors.Error):
    exit_code = 127


class ProxyUnavailable(errors.Error):
    exit_code = errors.EXIT_UNAVAILABLE


class SignInNeeded(errors.Error):
    exit_code = errors.EXIT_SIGN_IN


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-launch",
        usage="xai-launch {CLIENT [ARG ...], --list, --print CLIENT}",
        description="Start a client with settings for this proxy.",
        epilog=NOTES,
    )
    options.add_argument("client", nargs="?", metavar="CLIENT", help="a name that --list prints")
    modes = options.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print the names of the clients")
    modes.add_argument("--print", action="store_true", help="print what would be set")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser()
    given = sys.argv[1:] if argv is None else argv
    # All after the name of the client is the client's own.
    own = next((n for n, text in enumerate(given, 1) if not text.startswith("-")), len(given))
    arguments = options.parse_args(given[:own])
    if arguments.list == bool(arguments.client):
        options.error("give the name of a client, or --list")
    umask = os.umask(0o077)
    os.umask(umask)

    def body() -> int:
        recipes = client_recipes.load()
        if arguments.list:
            return _list(recipes)
        if arguments.client not in recipes:
            raise errors.UsageError(
                f"unknown client {arguments.client!r}; known: {', '.join(recipes)}"
            )
        settings = config.from_environ(os.environ)
        origin = origin_of(settings)
        if arguments.print:
            return _print(recipes[arguments.client], origin, settings)
        return launch(recipes[arguments.client], settings, given[own:], umask)

    return command.run(options.prog, body)


def _list(recipes: Mapping[str, Recipe]) -> int:
    """Print a line for each client, which only a terminal gets wrapped."""
    shown = style.style_of(sys.stdout, os.environ)
    rows = [("CLIENT", "STATE", "WHAT IS SET FOR IT")]
    for client, recipe in recipes.items():
        state = "installed" if recipe.is_installed else "not installed"
        rows.append((client, state, f"{recipe.name}: {recipe.sets}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for client, state, text in rows:
        label = f"{client:{widths[0]}}  {state:{widths[1]}}  "
        for line in shown.wrap(text, len(label), False):
            print(label + line)
            label = " " * len(label)
    return 0


def origin_of(settings: config.Config) -> str:
    """Return the proxy's origin. Raises ConfigurationError if the settings do not determine it."""
    # Slow to import, and not needed for --list.
    from xaiproxy.login import local_proxy

    if isinstance(settings.bind, UnixSocket):
        raise errors.ConfigurationError(
            f"XAI_PROXY_BIND is {settings.bind}, and these clients need a TCP address; start a "
            "proxy that has one, and set XAI_PROXY_BIND to it"
        )
    if settings.port == 0:
        raise errors.ConfigurationError(
            "XAI_PROXY_PORT is 0, so the proxy listens on any free port; set it to the port "
            "that the proxy's log names"
        )
    return local_proxy.url_of(settings.bind, settings.port)


def _print(recipe: Recipe, origin: str, settings: config.Config) -> int:
    otherwise = f"-{launch_key.NO_KEY}"
    if launch_key.is_needed(settings.client_keys_file):
        otherwise = "?the proxy requires a client key: xai-client-key add NAME"
    name = launch_key.VARIABLE
    key = f'export {name}="${{{name}:{otherwise}}}"\n'
    print(recipe.printed(origin, key), end="")
    return 0


def launch(recipe: Recipe, settings: config.Config, arguments: list[str], umask: int) -> int:
    """Run the client and return its exit status. `umask`: the client's."""
    if not recipe.is_installed:
        raise NotInstalled(
            f"{recipe.command or recipe.client} is not on PATH; to install {recipe.name}: "
            f"{recipe.install}"
        )
    origin = check(settings)
    for number in SIGNALS[1:]:
        _replace_handler(number, _exit)
    keys = launch_key.key_for(recipe.client, settings.client_keys_file, os.environ)
    with tempfile.TemporaryDirectory(prefix="xai-launch-") as place, keys as key:
        folder = Path(place)
        for file, text in recipe.texts(origin).items():
            (folder / file).write_text(text)
        environ = {**os.environ, **without_proxy(os.environ), launch_key.VARIABLE: key}
        script = ["sh", "-c", recipe.script(folder), "xai-launch", *arguments]
        return run(script, environ, umask)


def check(settings: config.Config) -> str:
    """Return the proxy's origin. Raises ProxyUnavailable, SignInNeeded."""
    # Slow to import, and not needed for --list.
    from xaiproxy.login import local_proxy
    from xaiproxy.login.local_proxy import Listener

    found = local_proxy.find(settings)
    start = f"start the proxy with {errors.SERVE}"
    if found.kind is Listener.NOTHING:
        raise ProxyUnavailable(f"nothing is listening on {found.url}; {start}")
    if found.kind is Listener.OTHER:
        raise ProxyUnavailable(
            f"another program listens on {found.url}; set XAI_PROXY_PORT to the proxy's port"
        )
    if found.kind is Listener.SILENT:
        raise ProxyUnavailable(f"the proxy does not answer at {found.url}: {found.reason}")
    if not found.ready:
        verdict = judgement.of(TokenStore(settings), time.time())
        if verdict.exit_code == errors.EXIT_SIGN_IN:
            raise SignInNeeded(f"the proxy has no login that it can use; {errors.SIGN_IN}")
        command.say(f"xai-launch: the proxy is not ready: {found.reason}.")
    return found.url


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which the client reaches loopback directly."""
    if not EGRESS & {name.upper() for name in environ}:
        return {}
    hosts = [environ[name] for name in NO_PROXY if environ.get(name)][:1]
    return dict.fromkeys(NO_PROXY, ",".join([*hosts, "127.0.0.1", "localhost", "::1"]))


def run(words: list[str], environ: Mapping[str, str], umask: int) -> int:
    """Run a program to its end, and return its exit status as a shell does.

    Signals are passed on to it; afterwards they are ignored, so that what it needed is removed.
    """
    client: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on() -> None:
        while client and received:
            client.send_signal(received.pop())

    def receive(number: int, _frame: object) -> None:
        # The terminal sends Ctrl-C and Ctrl-\ to the client as well.
        if number not in (signal.SIGINT, signal.SIGQUIT) or not _is_in_foreground():
            received.append(number)
            pass_on()

    for number in SIGNALS:
        _replace_handler(number, receive)
    client = subprocess.Popen(words, env=environ, umask=umask)
    pass_on()
    code = client.wait()
    for number in SIGNALS:
        _replace_handler(number, lambda *_: None)
    return code if code >= 0 else 128 - code


def _is_in_foreground() -> bool:
    """Whether the terminal sends the signals of its keys to this process."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _replace_handler(number: int, handler: Callable[[int, object], object]) -> None:
    # nohup(1), and a shell's background jobs
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
