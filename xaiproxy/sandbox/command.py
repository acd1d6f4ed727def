"""xai-sandbox: serve the simulated xAI on loopback until SIGTERM or SIGINT.

As soon as it listens it prints the settings that point xaiproxy at it to stdout, for a shell or a
.env file. Everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import pathlib
import shlex
import signal
import sys
import tempfile
import textwrap
from typing import Any

import gevent
from gevent import pywsgi

from xaiproxy import command, errors
from xaiproxy.sandbox.app import create_app
from xaiproxy.sandbox.knobs import KNOBS, SCRIPT, BadKnob, Knobs
from xaiproxy.sandbox.replies import compact
from xaiproxy.sandbox.server import Handler, listen
from xaiproxy.sandbox.xai_errors import ERRORS

EXAMPLES = """\
  xai-sandbox                           serve, and print settings for it
  xai-sandbox --auto-approve 3          approve each login after 3 seconds
  xai-sandbox --events-per-second 20    stream as slowly as a model
"""
NOTES = """\
The sandbox is not xAI, and has no security.

The fields of a scripted response:
{fields}

{errors}

While it runs: GET /_sandbox returns counters, GET /_sandbox/requests the last
requests, POST /_sandbox sets knobs (JSON, with _ for -), DELETE /_sandbox
resets everything. The WebSocket /v1/realtime?model=echo echoes every message.
"""


def parser() -> command.ArgumentParser:
    fields = "\n".join(f"  {name:12} {field.help}" for name, field in SCRIPT.items())
    names = textwrap.fill(f"Its errors: {', '.join(sorted(ERRORS))}.", 79)
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-sandbox",
        usage="xai-sandbox [--port PORT] [--state DIR] [--verbose] [--KNOB VALUE ...]",
        description="Simulate xAI on loopback: its authorization server and its API.",
        epilog=NOTES.format(fields=fields, errors=names),
    )
    options.add_argument(
        "--port", type=int, default=9191, help="0: any free one (default: %(default)s)"
    )
    options.add_argument(
        "--bind", default="127.0.0.1", help="a loopback address (default: %(default)s)"
    )
    options.add_argument(
        "--state",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for the token file; default: a temporary one, removed at the end",
    )
    options.add_argument("--verbose", action="store_true", help="a line a request on stderr")
    knobs = options.add_argument_group("knobs, each a JSON value")
    for name, knob in KNOBS.items():
        knobs.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar="VALUE",
            type=json_value,
            default=argparse.SUPPRESS,
            help=f"{knob.help} (default: {compact(knob.default)})",
        )
    return options


def json_value(text: str) -> Any:
    try:
        return json.loads(text)
    # So that --gzip all needs no quotes inside quotes.
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    given = vars(options)
    try:
        if not ipaddress.ip_address(options.bind).is_loopback:
            raise ValueError
    except ValueError:
        parser().error(
            f"--bind must be a loopback address, not {options.bind}: the sandbox has no security"
        )
    if not 0 <= options.port <= 65535:
        parser().error(f"--port must be 0 to 65535, not {options.port}")
    try:
        knobs = Knobs(**{name: given[name] for name in KNOBS if name in given})
    except BadKnob as problem:
        parser().error(str(problem))
    try:
        listener = listen(options.bind, options.port)
    except OSError as problem:
        print(
            f"xai-sandbox: cannot listen on {options.bind} port {options.port}: "
            f"{problem.strerror}; stop the program that uses it, or choose another --port",
            file=sys.stderr,
        )
        return errors.EXIT_TRY_AGAIN
    with listener:
        return serve(listener, knobs, options)


def serve(listener: Any, knobs: Knobs, options: argparse.Namespace) -> int:
    address, port = listener.getsockname()[:2]
    origin = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    server = pywsgi.WSGIServer(
        listener,
        create_app(origin, knobs),
        handler_class=Handler,
        log=sys.stderr if options.verbose else None,
        error_log=sys.stderr,
    )
    server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, server.stop)
    with tempfile.TemporaryDirectory(prefix="xai-sandbox-") as temporary:
        folder = options.state.absolute() if options.state else pathlib.Path(temporary)
        settings = {"ISSUER": origin, "UPSTREAM": origin, "TOKEN_PATH": str(folder / "tokens.json")}
        for name, value in settings.items():
            print(f"export XAI_PROXY_{name}={shlex.quote(value)}")
        sys.stdout.flush()
        if sys.stderr.isatty():
            print(
                "Paste these lines into another shell and run `xai-login --device` there; "
                "Ctrl-C ends the sandbox.",
                file=sys.stderr,
            )
        server.serve_forever(stop_timeout=0)
    return 0
