"""xai-restart: replaces the workers of `xai-serve --workers`, one after the other.

It uses the control socket of their supervisord. Meanwhile the other workers accept the connections
of the one that is replaced.
"""

import configparser
import contextlib
import fcntl
import functools
import os
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xaiproxy import command, config, errors, folder_file, run_folder
from xaiproxy.run_folder import REFRESHER, WORKERS

SERVING_TIMEOUT = 60.0  # seconds from the start of a worker until it serves
POLL_INTERVAL = 0.1  # seconds
RUNNING = "RUNNING"
EXAMPLES = """\
  xai-restart                replace the workers, one after the other
  xai-restart --refresher    and then the refresher, as after an upgrade
"""
NOTES = """\
The workers are those of `xai-serve --workers N`, started with the same options
and settings. A worker finishes its open responses before it stops, within
XAI_PROXY_DRAIN_TIMEOUT, and the next one is replaced when it serves again.
Workers that are not running are started first.

Exit status: 0 all were replaced; 64 wrong usage; 69 no such xai-serve is
running; 75 a worker does not serve, and those after it were left alone; 78
wrong settings; 130 interrupted.
"""


class Unavailable(errors.Error):
    exit_code = errors.EXIT_UNAVAILABLE


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-restart",
        description="Replace running workers without losing a connection.",
        epilog=NOTES,
    )
    options.add_argument("--refresher", action="store_true", help="restart the refresher, too")
    command.add_serving_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    settings = command.serving_settings(arguments)
    return command.run("xai-restart", lambda: restart(settings, with_refresher=arguments.refresher))


def restart(options: Mapping[str, str | None], *, with_refresher: bool) -> None:
    """`options`: settings of the command line. Raises an Error if a worker does not serve."""
    settings = config.from_environ(os.environ, options)
    with alone(run_folder.configuration(settings)):
        replace_all(settings, connect(settings), with_refresher=with_refresher)


@contextlib.contextmanager
def alone(conf: Path) -> Iterator[None]:
    """Wait for other xai-restarts: two could stop all workers at the same time.

    Where the file system has no locks, they do not wait.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(folder_file.opened(conf, os.O_RDWR), "rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another xai-restart", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_all(settings: config.Config, supervisor: Any, *, with_refresher: bool) -> None:
    try:
        workers = [one for one in supervisor.getAllProcessInfo() if one["group"] == WORKERS]
        # Those that do not run come first: their siblings must not stop while they cannot start.
        workers.sort(key=lambda one: one["statename"] == RUNNING)
        for worker in workers:
            name, folder = worker["name"], run_folder.path_of(settings)
            serves = functools.partial(is_serving, folder, name.rpartition("-")[2])
            replace(supervisor, f"{WORKERS}:{name}", name, serves)
        if with_refresher:
            replace(supervisor, REFRESHER, REFRESHER)
    except (OSError, xmlrpc.client.ProtocolError) as error:
        raise errors.Error(f"the supervisord of xai-serve does not answer: {error}") from error
    print(f"{len(workers)} workers were replaced" + (", and the refresher" * with_refresher))


def connect(settings: config.Config) -> Any:
    """The interface `supervisor` of supervisord's XML-RPC. Raises Unavailable."""
    # It is slow to import.
    from supervisor.xmlrpc import SupervisorTransport

    control, conf = run_folder.control_socket(settings), configparser.RawConfigParser()
    try:
        conf.read_string(folder_file.read(run_folder.configuration(settings), 1 << 20)[0].decode())
        access = conf["supervisorctl"]
        transport = SupervisorTransport(access["username"], access["password"], f"unix://{control}")
        # The host is not used.
        server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport)
        server.supervisor.getState()
    except (OSError, KeyError, ValueError, configparser.Error) as error:
        raise Unavailable(
            f"no `xai-serve --workers N` with these settings is running ({control}); one process "
            "alone cannot be replaced without losing connections: stop it, and start it again"
        ) from error
    return server.supervisor


def replace(
    supervisor: Any, program: str, name: str, serves: Callable[[int], bool] = lambda pid: True
) -> None:
    """Replace the program, or start it; return once supervisord counts it as started and it serves.

    The signal suffices: supervisord starts the program again when it has ended (supervision.py).

    `serves`: called with the process ID of the new one.
    """
    print(f"{name}: restarting", file=sys.stderr, flush=True)
    try:
        supervisor.signalProcess(program, "TERM")
    except xmlrpc.client.Fault as fault:
        if "NOT_RUNNING" not in fault.faultString:
            raise errors.Error(f"{name} cannot be stopped: {fault.faultString}") from fault
        start(supervisor, program, name)
    deadline = time.monotonic() + SERVING_TIMEOUT
    while True:
        process = supervisor.getProcessInfo(program)
        state = process["statename"]
        if state == RUNNING and serves(process["pid"]):
            return
        if state == "FATAL":
            raise does_not_serve(name, process["spawnerr"] or state)
        now = time.monotonic()
        if state == "STOPPING":
            deadline = now + SERVING_TIMEOUT
        elif now > deadline:
            raise does_not_serve(name, f"not within {SERVING_TIMEOUT:g} s")
        time.sleep(POLL_INTERVAL)


def start(supervisor: Any, program: str, name: str) -> None:
    try:
        supervisor.startProcess(program, False)
    except xmlrpc.client.Fault as fault:
        # supervisord itself is about to start it again.
        if "ALREADY_STARTED" not in fault.faultString:
            raise does_not_serve(name, fault.faultString) from fault


def does_not_serve(name: str, reason: str) -> errors.Error:
    return errors.Error(
        f"{name} does not serve ({reason}); the log of xai-serve has the cause. Workers that were "
        "not replaced yet were left alone; correct the cause, and run the same again"
    )


def is_serving(folder: Path, slot: str, pid: int) -> bool:
    """Whether the process has announced that it serves as the worker of this slot."""
    links = folder.glob(run_folder.serving(Path(f"*-{slot}.json")).name)
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == str(pid) for link in links)
    return False
