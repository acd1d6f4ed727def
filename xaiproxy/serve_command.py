"""xai-serve: both processes under the supervisord of this environment, started from any folder.

It is `supervisord -c conf/supervisord.conf`, with these differences:

- It writes no file: no pid file, and nothing in a temporary folder.
- A wrong setting, or a program that already listens at the address, is one sentence and status 78
  before anything is started.
- On a terminal, supervisord logs only warnings, so the start ends with the proxy's line "ready".
"""

import configparser
import contextlib
import io
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from xaiproxy import command, config, errors, folder_file, inherited_socket, run_folder, storage
from xaiproxy.addresses import UnixSocket

# In a checkout it is a link to conf/supervisord.conf, and in an installation a copy.
CONF = Path(__file__).with_name("supervisord.conf")
PROBE_TIMEOUT = 1.0  # seconds to connect to an address of this machine
END_TIMEOUT = 2.0  # seconds for a program that listens there to end
POLL_INTERVAL = 0.1  # seconds
EXAMPLES = """\
  xai-serve                serve http://127.0.0.1:9090/v1 until Ctrl-C
  xai-serve --port 8080    the same on another port
  nohup xai-serve &        until SIGTERM, also after the terminal is closed
  xai-serve --workers 2    two processes serve; xai-restart replaces each
"""
NOTES = """\
Sign in before or meanwhile, with xai-login. All settings are environment
variables XAI_PROXY_*, or lines of a .env in the working directory.

At Ctrl-C or SIGTERM, open responses have XAI_PROXY_DRAIN_TIMEOUT to finish; a
second Ctrl-C aborts them. Exit status: 0 after either signal, or after the
terminal was closed; 64 wrong usage; 70 one of the processes cannot be kept
running; 78 wrong settings, or another program at the address; 130
interrupted before the start.
"""


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-serve",
        description="Serve an OpenAI-compatible endpoint, and keep the login alive.",
        epilog=NOTES,
    )
    options.add_argument(
        "--workers",
        type=command.whole(1, command.MOST_WORKERS),
        default=1,
        metavar="N",
        help="number of processes that serve (default: 1)",
    )
    command.add_serving_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    settings = command.serving_settings(arguments)
    return command.run("xai-serve", lambda: serve(settings, arguments.workers))


def serve(options: Mapping[str, str | None], workers: int) -> None:
    """Run supervisord until it ends. `options`: settings of the command line.

    When a process cannot be kept running, supervision.py ends this one: with status 70, or with 78
    if a setting is wrong.
    """
    settings = config.from_environ(os.environ, options)
    check_address(settings)
    # The processes read their settings themselves, and the environment comes before a .env.
    os.environ.update({name: value for name, value in options.items() if value is not None})
    if workers == 1:
        supervise(CONF)
    else:
        with shared(settings, workers) as conf:
            supervise(conf)


def supervise(conf: Path) -> None:
    # supervisord requires a temporary folder, although it writes nothing there. To find one,
    # tempfile would write a file.
    tempfile.tempdir = os.sep
    # Slow to import, and not needed to parse arguments.
    from supervisor import options as supervisor_options
    from supervisor import supervisord

    # supervisord must have been imported before.
    from xaiproxy import supervision

    supervision.exit_configuration = errors.EXIT_CONFIGURATION
    supervisor_options.ServerOptions.write_pidfile = write_pidfile
    supervisor_options.ServerOptions.usage = usage
    # The name of the pid file, which write_pidfile does not write, must be absolute: a relative one
    # needs the working directory, which may have been deleted.
    arguments = ["-c", str(conf), "-j", os.devnull]
    if os.isatty(1):
        arguments += ["-e", "warn"]
    supervisord.main(arguments)


@contextlib.contextmanager
def shared(settings: config.Config, workers: int) -> Iterator[Path]:
    """Listen, and yield a configuration of supervisord by which `workers` processes accept.

    Raises ConfigurationError.
    """
    # It imports gevent.
    from xaiproxy.proxy import socket_file
    from xaiproxy.proxy.listener import check_distinct, listen, listen_for_admin

    conf, control = run_folder.configuration(settings), run_folder.control_socket(settings)
    check_control(control, settings)
    check_distinct(settings)
    never = threading.Event()
    listener = listen(settings, never)
    assert listener is not None
    address = listener.getsockname()
    # Not close(), which would remove the file of a Unix socket.
    inherited_socket.handed_down.append(listener.detach())
    remove(run_folder.left_over(settings, address))
    try:
        if settings.admin_bind is not None:
            admin = listen_for_admin(settings.admin_bind, never)
            assert admin is not None
            inherited_socket.handed_down.append(admin.detach())
        try:
            run_folder.make(settings)
            with storage.translated(conf):
                folder_file.replace(conf, configuration(workers, control.name).encode())
        except errors.StorageError as error:
            command.say(
                "xai-serve: xai-restart cannot replace these workers, and each shows its own "
                f"numbers: {error}"
            )
            yield in_pipe(configuration(workers))
        else:
            yield conf
    finally:
        remove([control, *run_folder.left_over(settings, address)])
        inherited_socket.close_handed_down()
        if isinstance(settings.bind, UnixSocket):
            socket_file.remove_dead(settings.bind.path)


def in_pipe(text: str) -> Path:
    """The path of a pipe with the text, which can be read once, as by supervisord at its start."""
    read_end, write_end = os.pipe()
    with open(write_end, "w") as pipe:
        pipe.write(text)
    return Path(f"/dev/fd/{read_end}")


def remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def check_control(path: Path, settings: config.Config) -> None:
    """Raise ConfigurationError if a supervisord listens on `path`, or none could."""
    # supervisord binds a longer name first.
    for name in (f"{path}.{os.getpid()}", str(path)):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(name)
            except OSError as error:
                # Python's own error, for a path that is too long.
                if error.errno is None:
                    shorter = "XAI_PROXY_TOKEN_PATH to a file in a folder with a shorter path"
                    if isinstance(settings.bind, UnixSocket):
                        shorter = f"XAI_PROXY_BIND to a shorter path, or {shorter}"
                    raise errors.ConfigurationError(
                        f"{name} is too long for a socket; set {shorter}"
                    ) from error
                continue
        raise errors.ConfigurationError(
            f"an xai-serve --workers already runs with {path}; use that one, or stop it, or "
            "choose another port with --port"
        )


def configuration(workers: int, control: str = "") -> str:
    """The text of a configuration: CONF with several proxies.

    `control`: the name of a control socket beside it, or "" for none.
    """
    conf = configparser.RawConfigParser()
    conf.read(CONF)
    conf["program:proxy"].update(
        command=f"xai-proxy --slot %(process_num)d --workers {workers}",
        numprocs=str(workers),
        process_name="proxy-%(process_num)d",
    )
    if control:
        add_control(conf, control)
    text = io.StringIO()
    conf.write(text)
    return text.getvalue()


def add_control(conf: configparser.RawConfigParser, control: str) -> None:
    # supervisord logs a critical error without a password. The socket's mode protects it.
    password = secrets.token_hex(16)
    conf["unix_http_server"] = {
        # Inside of a value, % and ; have a meaning.
        "file": "%(here)s/" + control.replace("%", "%%"),
        "chmod": "0600",
        "username": "xaiproxy",
        "password": password,
    }
    conf["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    # For xai-restart and supervisorctl(1).
    conf["supervisorctl"] = {
        "serverurl": "unix://%(here)s/" + control.replace("%", "%%"),
        "username": "xaiproxy",
        "password": password,
    }


def check_address(settings: config.Config) -> None:
    """Raise ConfigurationError if an xaiproxy serves at the address, or another program listens.

    A former proxy may be gone within END_TIMEOUT. Another program at a Unix socket is the proxy's
    concern.
    """
    bind, port = settings.bind, settings.port
    if not isinstance(bind, UnixSocket) and not is_listening(bind, port):
        return
    from xaiproxy.login import local_proxy

    proxy = local_proxy.find(settings)
    if proxy.kind is local_proxy.Listener.PROXY:
        raise errors.ConfigurationError(
            f"an xaiproxy already serves {proxy.api}; use that one, or stop it, or choose another "
            + ("path with --bind" if isinstance(bind, UnixSocket) else "port with --port")
        )
    deadline = time.monotonic() + END_TIMEOUT
    while not isinstance(bind, UnixSocket) and is_listening(bind, port):
        if time.monotonic() > deadline:
            reason = f" ({proxy.reason})" if proxy.reason else ""
            raise errors.ConfigurationError(
                f"another program listens on {proxy.url}{reason}; stop that, or choose another "
                "port with --port or XAI_PROXY_PORT"
            )
        time.sleep(POLL_INTERVAL)


def is_listening(host: str, port: int) -> bool:
    # 0.0.0.0 and :: lead to this machine, too.
    try:
        socket.create_connection((host, port), PROBE_TIMEOUT).close()
    except OSError:
        return False
    return True


def write_pidfile(self: Any) -> None:
    """ServerOptions.write_pidfile, without a file: no program would read it."""
    self.logger.info(f"supervisord started with pid {os.getpid()}")


def usage(_self: Any, message: object) -> NoReturn:
    """ServerOptions.usage, called when supervisord refuses to start."""
    raise errors.ConfigurationError(" ".join(str(message).split()))
