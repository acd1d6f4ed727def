"""xai-refresher: its options and signals."""

import argparse
import logging
import os
import signal

from xaiproxy import command, config, log
from xaiproxy.refresher.process import Refresher

logger = logging.getLogger(__name__)

EXAMPLES = """\
  xai-refresher         keep the login alive until SIGTERM; SIGHUP: try again now
  xai-refresher --once  check the login once, refresh it if that is due, and exit; for cron

Exit status of --once: 0 the login is good; 69 the issuer cannot be reached; 75 the token file
cannot be written or is locked; 77 signed out, or refused; 78 wrong settings; 130 interrupted.
"""


def main(argv: list[str] | None = None) -> int:
    parser = command.ArgumentParser(prog="xai-refresher", description=EXAMPLES)
    parser.add_argument("--once", action="store_true", help="check the login once and exit")
    parser.add_argument(
        "--token-path", metavar="FILE", help="the token file (default: XAI_PROXY_TOKEN_PATH)"
    )
    return command.run("xai-refresher", lambda: _main(parser.parse_args(argv)))


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
