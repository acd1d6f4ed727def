"""Starts Python programs by forking a process that has imported their modules.

That saves most of a start: importing Flask and gevent takes 0.4 s of CPU. Tests of the start
itself must not use it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkout import PYTHONPATH, SUPPORT

PYTHON = [sys.executable, "-W", "error"]
PRELOADED = str(SUPPORT / "preloaded.py")


@functools.cache
def folder() -> Path:
    """The folder of the sockets of fork servers, which the processes that are started share."""
    if "FORK_SERVERS" not in os.environ:
        # The path of a socket has at most 107 bytes, and TMPDIR may be long.
        os.environ["FORK_SERVERS"] = tempfile.mkdtemp(prefix="fork-servers-", dir="/tmp")
        atexit.register(shutil.rmtree, os.environ["FORK_SERVERS"])
    return Path(os.environ["FORK_SERVERS"])


@contextlib.contextmanager
def lock() -> Iterator[None]:
    with open(folder() / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class ForkServer:
    """A connection to the `preloaded.py MODULE fork` of all workers, started if none runs.

    `library`: for LD_PRELOAD, or "".
    """

    def __init__(self, module: str, library: str):
        self._mutex = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        atexit.register(self._socket.close)
        path = folder() / (module + Path(library).name)
        with lock():
            try:
                self._socket.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                self._start(module, library, path)
                self._socket.connect(str(path))

    def _start(self, module: str, library: str, path: Path) -> None:
        path.unlink(missing_ok=True)
        mine, theirs = socket.socketpair()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, theirs:
            listener.bind(str(path))
            listener.listen()
            process = subprocess.Popen(
                [*PYTHON, PRELOADED, module, "fork", str(listener.fileno()), str(theirs.fileno())],
                env={"PYTHONPATH": PYTHONPATH, "LD_PRELOAD": library},
                pass_fds=[listener.fileno(), theirs.fileno()],
            )

        def end() -> None:
            # The owner of the folder may have removed it.
            with contextlib.suppress(FileNotFoundError), lock():
                path.unlink()
            mine.close()
            process.wait()

        atexit.register(end)

    def ask(self, request: dict[str, Any], descriptors: list[int] | None = None) -> int:
        with self._mutex:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors or [])
            answer = self._socket.recv(100)
        assert answer, "the fork server has ended; its errors are in the stderr of the tests"
        return int(answer)


fork_server = functools.cache(ForkServer)


class ForkedProcess:
    """The part of subprocess.Popen that tests use.

    `descriptors`: its standard input, output and error, and namespaces that it enters.
    """

    def __init__(self, module: str, arguments: list[str], descriptors: list[int], **request: Any):
        self.args = arguments
        self.returncode: int | None = None
        self.stderr: Any = None
        self._mutex = threading.Lock()
        self._server = fork_server(module, request["environ"].get("LD_PRELOAD", ""))
        request["files"] = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.pid = self._server.ask({"arguments": arguments, **request}, descriptors)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        with self._mutex:
            if self.returncode is not None:
                return self.returncode
            descriptor = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = poll.poll(None if timeout is None else timeout * 1000)
        os.close(descriptor)
        if not ended:
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self._mutex:
            if self.returncode is None:
                status = self._server.ask({"ended": self.pid})
                self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def send_signal(self, number: int) -> None:
        with self._mutex:
            if self.returncode is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def namespaces(prefix: tuple[str, ...], cwd: Path | str) -> Iterator[list[int]]:
    """Yield the user and the mount namespace in which `prefix`, in `cwd`, executes a command.

    They are none without a prefix.
    """
    with contextlib.ExitStack() as stack:
        descriptors = []
        if prefix:
            holder = subprocess.Popen(
                [*prefix, "sh", "-c", "echo; read line"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=cwd,
            )
            # Its exit closes its pipes, and waits for its end.
            with holder:
                assert holder.stdout.readline(), f"{prefix} failed"
                for kind in ("user", "mnt"):
                    descriptors.append(os.open(f"/proc/{holder.pid}/ns/{kind}", os.O_RDONLY))
                    stack.callback(os.close, descriptors[-1])
        yield descriptors


def start_python(
    module: str,
    arguments: list[str],
    *,
    prefix: tuple[str, ...] = (),
    cwd: Path | str,
    environ: dict[str, str],
    new_session: bool = False,
    traced: bool = False,
    stdin: int = 0,
) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start `python -W error ARGUMENT...` by forking a process with the imports of `module`.

    `prefix`: a command that executes it instead, unless that is unshare(1): the forked process
    enters its namespaces. `environ`: variables that Python and gevent read during import have no
    effect. `traced`: whether the process waits for a tracer after its imports.
    """
    if not prefix or prefix[0] == "unshare":
        read, write = os.pipe()
        with namespaces(prefix, cwd) as entered:
            process = ForkedProcess(
                module,
                arguments,
                [stdin, 1, write, *entered],
                cwd=str(cwd),
                environ=environ,
                new_session=new_session,
                traced=traced,
            )
        os.close(write)
        process.stderr = os.fdopen(read, "rb")
        return process
    if traced:
        arguments = [PRELOADED, module, "traced", *arguments]
    return subprocess.Popen(
        [*prefix, *PYTHON, *arguments],
        cwd=cwd,
        env=environ,
        stdin=stdin,
        stderr=subprocess.PIPE,
        start_new_session=new_session,
    )


def run_python(
    module: str,
    arguments: list[str],
    *,
    cwd: Path | str,
    environ: dict[str, str],
    timeout: float,
    trace: Callable[[int], subprocess.Popen[bytes]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -W error ARGUMENT...`, started by start_python without input, to its end.

    `trace`: a function that attaches a tracer to a process ID.
    """
    with (
        open(os.devnull) as nothing,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        process = ForkedProcess(
            module,
            arguments,
            [nothing.fileno(), out.fileno(), err.fileno()],
            cwd=str(cwd),
            environ=environ,
            new_session=False,
            traced=trace is not None,
        )
        tracer = trace(process.pid) if trace is not None else None
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if tracer is not None:
                tracer.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, process.wait(), out.read(), err.read())
