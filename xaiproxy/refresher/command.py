"""xai-refresher: its options and signals."""

import argparse
import logging
import os
import signal

from xaiproxy import command, config, log
from xaiproxy.refresher.process import Refresher

logger = logging.getLogger(__name__)

EXAMPLES = """\
  xai-refresher           keep the login alive until SIGTERM or Ctrl-C
  xai-refresher --once    refresh the login if that is due, for cron
"""
NOTES = """\
SIGHUP makes it retry at once.

Exit status of --once: 0 the login is good; 69 the issuer cannot be reached; 75
the token file cannot be written or is locked; 77 signed out, or refused; 78
wrong settings; 130 interrupted.
"""


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-refresher",
        description="Keep the login alive.",
        epilog=NOTES,
    )
    options.add_argument("--once", action="store_true", help="check the login once and exit")
    command.add_token_path(options)
    return options


def main(argv: list[str] | None = None) -> int:
    return command.run("xai-refresher", lambda: _main(parser().parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    settings = config.from_environ(os.environ, {"XAI_PROXY_TOKEN_PATH": arguments.token_path})
    log.setup("refresher", settings.log_level, settings.log_format)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    refresher = Refresher(settings)
    hangup = command.hangup()
    signal.signal(signal.SIGHUP, lambda *_: refresher.on_signal(hangup))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, refresher.on_signal)
    return refresher.once() if arguments.once else refresher.run()
