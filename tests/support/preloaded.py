"""Runs Python programs in a process that has imported their modules; forked_process.py uses it.

`preloaded.py MODULE fork FD OWNER` accepts connections on the listening SEQPACKET socket FD, until the other end of the
socket OWNER is closed, and forks a child for each request on them.
`preloaded.py MODULE traced ARGUMENT...` becomes `python -W error ARGUMENT...` once it is traced.

It imports the modules of MODULE, also those that MODULE imports late, and then waits. It starts no thread and no event loop, so a child
is in the state of `python -W error -m MODULE` after its imports. A child takes the directory, the
environment, the arguments, the standard streams and the namespaces from the request. It stays a zombie until the
client asks for its status, as a child of the client would, so its process ID is not reused.
"""

from __future__ import annotations

import _socket
import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import sys
import termios
import time

# These are imported before MODULE, which may let gevent patch them.
from os import fork, waitpid
from pathlib import Path
from select import POLLIN, poll
from typing import Any

# The number of file descriptors in a request for a child: its standard streams, and up to two
# namespaces.
STREAMS, NAMESPACES = 3, 2
# Modules that the programs import while they run.
LATE = {
    "sandbox_program": ["encodings.idna", "gevent.resolver.thread", "gevent.threadpool"],
    "xaiproxy": ["xaiproxy.proxy.metrics"],
    "xaiproxy.launch_command": ["xaiproxy.login.local_proxy"],
    "xaiproxy.login.sign_in": ["xaiproxy.login.command", "xaiproxy.login.watch"],
    "xaiproxy.refresher.process": ["xaiproxy.refresher.command"],
}
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


def accept(listener: _socket.socket, owner: int) -> dict[str, Any] | None:
    """Serve each connection in a process of its own. Return None at the end; in a child, its request."""
    both = poll()
    both.register(listener.fileno(), POLLIN)
    both.register(owner, POLLIN)
    while True:
        # Connections that wait are served first.
        if listener.fileno() not in dict(both.poll()):
            return None
        connection, _address = listener._accept()
        if fork() == 0:
            listener.close()
            os.close(owner)
            return serve(_socket.socket(fileno=connection))
        os.close(connection)


def serve(connection: _socket.socket) -> dict[str, Any] | None:
    """Answer requests. Return None after the last one; in a child, return its request."""
    while True:
        message, ancillary, _flags, _address = connection.recvmsg(
            1 << 20, _socket.CMSG_SPACE((STREAMS + NAMESPACES) * 4)
        )
        if not message:
            connection.close()
            return None
        request = json.loads(message)
        if "ended" in request:
            answer = waitpid(request["ended"], 0)[1]
        else:
            descriptors = array.array("i", ancillary[0][2])
            answer = fork()
            if answer == 0:
                connection.close()
                for number, stream in enumerate(descriptors[:STREAMS]):
                    os.dup2(stream, number)
                for namespace in descriptors[STREAMS:]:
                    enter(namespace)
            for descriptor in descriptors:
                os.close(descriptor)
            if answer == 0:
                return request
        connection.send(b"%d" % answer)


def enter(namespace: int) -> None:
    # os.setns needs Python 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become(request: dict[str, Any]) -> None:
    if request["new_session"]:
        os.setsid()
    if request.get("terminal"):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        sys.stdout.reconfigure(line_buffering=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    if request["traced"]:
        wait_for_tracer()
    run(request["arguments"])


def wait_for_tracer() -> None:
    # Yama (ptrace_scope 1) lets only a parent trace, which the tracer is not.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    status = Path("/proc/self/status")
    while "TracerPid:\t0\n" in status.read_text():
        time.sleep(0.005)


def run(arguments: list[str]) -> None:
    """Run `-m MODULE ARGUMENT...` or `SCRIPT ARGUMENT...`."""
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(arguments[0])
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def end(ended: SystemExit) -> None:
    """End this process as Python does, but do not deallocate its modules.

    That would copy most of the memory that it shares with its parent.
    """
    if ended.code is not None and not isinstance(ended.code, int):
        raise ended
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        raise ended from None
    os._exit((ended.code or 0) & 0xFF)


if __name__ == "__main__":
    _, module, how, *rest = sys.argv
    runpy.run_module(module, run_name="preloaded")
    for late in LATE.get(module, []):
        importlib.import_module(late)
    # Imported by MODULE, which may let gevent patch it.
    import threading

    # Garbage collection in a child would write to most of the memory that it shares with this
    # process, which copies it.
    gc.freeze()
    if how == "traced":
        wait_for_tracer()
        run(rest)
    else:
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, int(rest[0]))
        request = accept(listener, int(rest[1]))
        if request is not None:
            try:
                become(request)
                ended = SystemExit()
            except SystemExit as error:
                ended = error
            end(ended)
