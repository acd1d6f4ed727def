"""Takes away what only Linux has, before a program imports anything: its names and /proc.

Python imports this module at its start if its folder is on PYTHONPATH, which WITHOUT_LINUX=1 causes
for the programs that tests start. What macOS has under another name or with another value is set.
"""

import ctypes
import os
import select
import socket
import sys
import time

# The names that typeshed has for Linux and not for macOS, of the modules that the package uses.
GONE = {
    os: "eventfd memfd_create pidfd_open posix_fallocate fdatasync sched_getaffinity splice O_PATH "
    "O_TMPFILE O_NOATIME RTLD_DEEPBIND",
    select: "epoll POLLRDHUP",
    socket: "TCP_INFO TCP_KEEPIDLE TCP_USER_TIMEOUT TCP_QUICKACK TCP_DEFER_ACCEPT SO_PEERCRED "
    "SO_DOMAIN SO_MARK SOCK_CLOEXEC SOCK_NONBLOCK MSG_MORE MSG_ERRQUEUE",
    time: "CLOCK_BOOTTIME CLOCK_TAI",
}


def refuse_proc(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


class Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> object:
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)


# The same option.
socket.TCP_KEEPALIVE = socket.TCP_KEEPIDLE
select.PIPE_BUF = 512
for module, names in GONE.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
            if name in getattr(module, "__all__", ()):
                module.__all__.remove(name)
ctypes.CDLL = Library
sys.addaudithook(refuse_proc)
