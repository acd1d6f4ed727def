"""xai-serve: both processes under the supervisord of this environment, started from any folder.

It is `supervisord -c conf/supervisord.conf`, with these differences:

- It writes no file: no pid file, and nothing in a temporary folder.
- A wrong setting, or a proxy that already serves at the address, is one sentence and status 78
  before anything is started.
- On a terminal, supervisord logs only warnings, so the start ends with the proxy's line "ready".
"""

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from xaiproxy import command, config, errors
from xaiproxy.addresses import UnixSocket

# In a checkout it is a link to conf/supervisord.conf, and in an installation a copy.
CONF = Path(__file__).with_name("supervisord.conf")
PROBE_TIMEOUT = 1.0  # seconds to connect to an address of this machine
EXAMPLES = """\
  xai-serve                serve http://127.0.0.1:9090/v1 until Ctrl-C
  xai-serve --port 8080    the same on another port
  nohup xai-serve &        until SIGTERM, also after the terminal is closed
"""
NOTES = """\
Sign in before or meanwhile, with xai-login. All settings are environment
variables XAI_PROXY_*, or lines of a .env in the working directory.

At Ctrl-C or SIGTERM, open responses have XAI_PROXY_DRAIN_TIMEOUT to finish; a
second Ctrl-C aborts them. Exit status: 0 after either signal, or after the
terminal was closed; 64 wrong usage; 70 one of the two processes cannot be kept
running; 78 wrong settings, or another proxy at the address; 130 interrupted
before the start.
"""


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-serve",
        description="Serve an OpenAI-compatible endpoint, and keep the login alive.",
        epilog=NOTES,
    )
    command.add_serving_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = command.serving_settings(parser().parse_args(argv))
    return command.run("xai-serve", lambda: serve(options))


def serve(options: Mapping[str, str | None]) -> None:
    """Run supervisord until it ends. `options`: settings of the command line.

    When a process cannot be kept running, supervision.py ends this one with status 70.
    """
    check_address(config.from_environ(os.environ, options))
    # The processes read their settings themselves, and the environment comes before a .env.
    os.environ.update({name: value for name, value in options.items() if value is not None})
    # supervisord requires a temporary folder, although it writes nothing there. To find one,
    # tempfile would write a file.
    tempfile.tempdir = os.sep
    # Slow to import, and not needed to parse arguments.
    from supervisor import options as supervisor_options
    from supervisor import supervisord

    supervisor_options.ServerOptions.write_pidfile = write_pidfile
    supervisor_options.ServerOptions.usage = usage
    # The name of the pid file, which write_pidfile does not write, must be absolute: a relative one
    # needs the working directory, which may have been deleted.
    arguments = ["-c", str(CONF), "-j", os.devnull]
    if os.isatty(1):
        arguments += ["-e", "warn"]
    supervisord.main(arguments)


def check_address(settings: config.Config) -> None:
    """Raise ConfigurationError if an xaiproxy serves at the address.

    Any other program there is the proxy's concern, which retries for some seconds.
    """
    bind = settings.bind
    if not isinstance(bind, UnixSocket):
        # 0.0.0.0 and :: lead to this machine, too.
        try:
            socket.create_connection((bind, settings.port), PROBE_TIMEOUT).close()
        except OSError:
            return
    from xaiproxy.login import local_proxy

    proxy = local_proxy.find(settings)
    if proxy.kind is local_proxy.Listener.PROXY:
        raise errors.ConfigurationError(
            f"an xaiproxy already serves {proxy.api}; use that one, or stop it, or choose another "
            + ("path with --bind" if isinstance(bind, UnixSocket) else "port with --port")
        )


def write_pidfile(self: Any) -> None:
    """ServerOptions.write_pidfile, without a file: no program would read it."""
    self.logger.info(f"supervisord started with pid {os.getpid()}")


def usage(_self: Any, message: object) -> NoReturn:
    """ServerOptions.usage, called when supervisord refuses to start."""
    raise errors.ConfigurationError(" ".join(str(message).split()))
