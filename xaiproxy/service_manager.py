"""The message to a service manager that the service is ready: sd_notify(3) of systemd."""

import contextlib
import os
import socket
from collections.abc import MutableMapping


def announce_ready(environ: MutableMapping[str, str] = os.environ) -> None:
    """Send READY=1 if this process was started by a unit with Type=notify."""
    address = environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        # An abstract socket.
        address = "\0" + address[1:]
    # A manager that has ended needs no message.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", address)
